"""Budgets become ranks."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
from conftest import stacked_experts
from hypothesis import given, settings
from hypothesis import strategies as st

from rankfold import Site, allocate, find_sites
from rankfold.allocation import ALLOCATIONS, break_even_rank, rank_within
from rankfold.factorization import METHODS
from rankfold.modules import stored_parameters
from rankfold.plan import DENSE


def site(out: int, columns: int, bias: bool = False, name: str = "m") -> Site:
    return Site(name, out, columns, bias, 4, "block", name, name)


SITES = [site(64, 64, name="q"), site(16, 64, name="k"), site(64, 256, True, "down"), site(256, 64, name="up")]

LOSSES = {s.name: [1 - r / min(s.out_features, s.in_features) for r in range(65)] for s in SITES}


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 90_000), st.booleans())
@settings(deadline=None)
def test_rank_within_is_the_largest_that_fits(out: int, columns: int, budget: int, bias: bool) -> None:
    for form in ("low_rank", "tucker", "pivoted"):
        rank = rank_within(form, site(out, columns), budget, bias)
        ranks = (rank, rank) if form == "tucker" else (rank,)
        above = tuple(r + 1 for r in ranks)
        if rank >= 1:
            assert stored_parameters(form, out, columns, ranks, bias) <= budget
        if rank < min(out, columns):
            assert stored_parameters(form, out, columns, above, bias) > budget or rank < 0


@pytest.mark.parametrize(("shape", "rank"), [((64, 64), 31), ((16, 64), 12), ((64, 256), 51), ((4096, 11008), 2985)])
def test_break_even_is_the_aspect_ratio_formula(shape: tuple[int, int], rank: int) -> None:
    """r* = m n / (m + n), which is min / (1 + aspect): below it two factors are smaller."""
    m, n = shape
    assert break_even_rank("low_rank", site(m, n), bias=False) == rank
    assert rank * (m + n) < m * n <= (rank + 1) * (m + n)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep", [0.9, 0.5, 0.2])
def test_no_more_is_kept_than_asked(allocation: str, method: str, keep: float) -> None:
    plan = allocate(SITES, keep=keep, method=method, allocation=allocation, losses=LOSSES)
    total = sum(s.parameters for s in SITES)
    assert plan.parameters <= keep * total
    for option in plan.options:
        if option.form != DENSE:
            s = next(s for s in SITES if s.name == option.sites[0])
            stored = stored_parameters(option.form, s.out_features, s.in_features, option.ranks, option.bias)
            assert stored == option.parameters < s.parameters


def test_parity_spends_the_budget_and_keeps_square_sites_dense_longest() -> None:
    plan = allocate(SITES, keep=0.85, allocation="parity", method="svd")
    forms = {option.sites[0]: option for option in plan.options}
    assert forms["q"].form == DENSE
    assert "break-even rank 31" in forms["q"].note
    assert forms["down"].form == forms["up"].form == "low_rank"
    fractions = [forms[name].ranks[0] / 64 for name in ("down", "up")]
    assert fractions[0] == fractions[1]
    assert plan.parameters > 0.8 * sum(s.parameters for s in SITES)


@pytest.mark.parametrize("allocation", ["uniform", "parity"])
def test_an_explicit_rank_past_break_even_stays_dense_and_says_so(allocation: str) -> None:
    plan = allocate(SITES[:1] + SITES[2:], rank=40, allocation=allocation, method="svd")
    forms = {option.sites[0]: option for option in plan.options}
    assert forms["q"].form == DENSE
    assert "rank 40 would store more than the dense matrix (break-even rank 31)" in forms["q"].note
    assert forms["up"].ranks == (40,)


def test_ranks_are_lowered_to_a_multiple() -> None:
    plan = allocate(SITES, keep=0.8, method="svd", multiple=8)
    assert all(option.ranks[0] % 8 == 0 for option in plan.factorized)
    assert all(
        option.ranks[0] <= other.ranks[0]
        for option, other in zip(plan.factorized, allocate(SITES, keep=0.8, method="svd").factorized, strict=True)
    )


def test_keep_one_leaves_everything_dense() -> None:
    for allocation in ALLOCATIONS:
        assert not allocate(SITES, keep=1.0, allocation=allocation, losses=LOSSES).factorized


@stacked_experts
def test_the_slices_of_a_stack_of_experts_are_one_option() -> None:
    sites = find_sites(tiny.build("mixtral")).select(["mlp.experts.gate_up_proj.*"])
    plan = allocate(sites, keep=0.5, method="svd")
    assert [len(option.sites) for option in plan.options] == [4, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 0.0}, r"must lie in \(0, 1\], but got 0"),
        ({"keep": 1.2}, r"must lie in \(0, 1\], but got 1.2"),
        ({"keep": -1.0}, r"must lie in \(0, 1\], but got -1"),
        ({}, "Exactly one of keep and rank"),
        ({"keep": 0.5, "rank": 4}, "Exactly one of keep and rank"),
        ({"rank": 17}, r"k: rank must lie between 1 and min\(out, in\) = 16, but got 17"),
        ({"rank": 0}, "q: rank must lie between 1"),
        ({"keep": 0.001}, "q: keeping 0.001 of 4096 parameters leaves no room for rank 1"),
        ({"keep": 0.001, "allocation": "parity"}, "leaves no room for rank 1 everywhere"),
        ({"keep": 0.5, "method": "magic"}, "method must be one of .*'lord'.* but got 'magic'"),
        ({"keep": 0.5, "allocation": "magic"}, "allocation must be one of .* but got 'magic'"),
        ({"keep": 0.5, "multiple": 0}, "multiple of 1 or more"),
    ],
)
def test_impossible_budgets_say_why(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        allocate(SITES, **arguments)


def test_no_sites_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one site"):
        allocate([], keep=0.5)


@pytest.mark.parametrize(
    ("rank", "billions"), [(4480, 14.98), (4096, 14.51), (3584, 13.88), (3072, 13.25), (2560, 12.62), (2304, 12.31)]
)
def test_the_published_starcoder_sizes_come_out(rank: int, billions: float) -> None:
    """LoRD's models: the MLP down-projection (6144 x 24576) of all 40 blocks of 15.517 B parameters."""
    downs = [site(6144, 24576, True, f"h.{i}") for i in range(40)]
    plan = allocate(downs, rank=rank, method="svd", allocation="parity")
    saved = sum(s.parameters for s in downs) - plan.parameters
    assert (15.517e9 - saved) / 1e9 == pytest.approx(billions, abs=0.01)


def test_a_matrix_too_small_for_any_rank_stays_dense_with_its_reason() -> None:
    """Gemma 3n has one of 2 x 2 in every block."""
    sites = [Site("big", 64, 64, False, 4, None, "big", "big"), Site("tiny", 2, 2, False, 4, None, "tiny", "tiny")]
    big, tiny = allocate(sites, keep=0.5, method="svd").options
    assert (big.form, tiny.form) == ("low_rank", "dense")
    assert "too small for any rank" in tiny.note
    with pytest.raises(ValueError, match="leaves no room for rank 1"):
        allocate(sites[1:], keep=0.5, method="svd")


def test_parity_keeps_to_the_multiple_of_ranks() -> None:
    plan = allocate([site(48, 64)], keep=0.95, method="svd", allocation="parity", multiple=16)
    assert [(option.ranks, option.parameters) for option in plan.options] == [((16,), 1792)]
