"""The knapsack against enumeration, its bound, and what a budget must allow."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankfold import allocate
from rankfold.allocation import Allowance, dense_option, knapsack, option_at, site_options
from rankfold.sites import Site


def site(name: str, out: int, inside: int) -> Site:
    return Site(name, out, inside, False, 4, "b", name, name)


def falling(full: int, seed: int) -> list[float]:
    """Losses that fall to zero at the full rank, in no regular way."""
    generator = torch.Generator().manual_seed(seed)
    return [*torch.rand(full, generator=generator).sort(descending=True).values.tolist(), 0.0]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), keep=st.floats(0.35, 0.95), form=st.sampled_from(["low_rank", "pivoted"]))
def test_no_choice_is_better_than_the_bound_and_enumeration_is_nearly_reached(
    seed: int, keep: float, form: str
) -> None:
    sites = [site("a", 6, 5), site("b", 4, 7), site("c", 5, 5)]
    losses = {s.name: falling(min(s.out_features, s.in_features), seed + i) for i, s in enumerate(sites)}
    budget = keep * sum(s.parameters for s in sites)
    choices = [
        [(dense_option([s]).parameters, 0.0)]
        + [
            (option_at(form, [s], rank, False).parameters, losses[s.name][rank])
            for rank in range(1, min(s.out_features, s.in_features))
            if option_at(form, [s], rank, False).form == form
        ]
        for s in sites
    ]
    allowed = [c for c in itertools.product(*choices) if sum(p for p, _ in c) <= budget]
    if not allowed:
        with pytest.raises(ValueError, match="must allow at least"):
            knapsack(site_options(sites, form, losses), Allowance(keep))
        return
    best = min(sum(loss for _, loss in c) for c in allowed)
    options, bound = knapsack(site_options(sites, form, losses), Allowance(keep))
    found = sum(option.loss for option in options if option.loss)
    assert sum(option.parameters for option in options) <= budget
    assert bound <= best + 1e-9 <= found + 2e-9


def test_a_full_budget_keeps_everything_dense() -> None:
    sites = [site("a", 8, 8), site("b", 8, 16)]
    losses = {"a": falling(8, 0), "b": falling(8, 1)}
    plan = allocate(sites, keep=1.0, method="kfac", allocation="knapsack", losses=losses)
    assert not plan.factorized
    assert plan.predicted_loss == plan.bound == 0


def test_wide_matrices_get_few_different_ranks() -> None:
    sites = [site(f"{number}", 640, 512) for number in range(24)]
    losses = {site.name: [(1 + seed) * loss**4 for loss in falling(512, seed)] for seed, site in enumerate(sites)}
    chosen = {
        multiple: allocate(sites, keep=0.7, method="kfac", form="low_rank", losses=losses, multiple=multiple)
        for multiple in (None, 1)
    }
    ranks = {n: {o.ranks[0] for o in plan.factorized} for n, plan in chosen.items()}
    assert all(rank % 16 == 0 or rank < 16 for rank in ranks[None])
    assert len(ranks[None]) < len(ranks[1])
    predicted = {n: sum(o.loss for o in plan.options) for n, plan in chosen.items()}
    assert predicted[1] <= predicted[None] <= 1.05 * predicted[1]


def test_ranks_are_multiples_and_no_site_falls_below_its_floor() -> None:
    sites = [site(f"s{i}", 256, 512) for i in range(4)]
    losses = {s.name: [v * 10.0**-i for v in falling(256, i)] for i, s in enumerate(sites)}
    plan = allocate(sites, keep=0.3, method="kfac", allocation="knapsack", losses=losses, multiple=16)
    ranks = [option.ranks[0] for option in plan.factorized]
    assert all(rank % 16 == 0 or rank < 16 for rank in ranks)
    assert min(ranks) >= 256 / 64
    assert len(set(ranks)) > 1


def test_a_budget_may_be_counted_in_bytes_or_in_seconds() -> None:
    sites = [site("a", 64, 64), Site("b", 64, 64, False, 2, "b", "b", "b")]
    losses = {"a": falling(64, 0), "b": falling(64, 1)}
    plan = allocate(sites, keep=0.5, method="kfac", allocation="knapsack", losses=losses, price="bytes")
    assert sum(option.bytes for option in plan.options) <= 0.5 * (64 * 64 * 6)
    seconds = {"a": 1.0, "b": 3.0}
    plan = allocate(
        sites,
        keep=0.5,
        method="kfac",
        allocation="knapsack",
        losses=losses,
        price=lambda option: seconds[option.sites[0]] * option.parameters,
    )
    assert sum(seconds[option.sites[0]] * option.parameters for option in plan.options) <= 0.5 * 4 * 64 * 64


def test_sites_without_a_prediction_stay_dense() -> None:
    sites = [site("a", 64, 64), site("b", 64, 64)]
    losses = {"a": falling(64, 0)}
    plan = allocate(sites, keep=0.8, method="kfac", allocation="knapsack", losses=losses)
    assert [option.form for option in plan.options] == ["pivoted", "dense"]
    assert "no calibration token reached it" in plan.options[1].note


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.001}, "must allow at least"),
        ({"rank": 4}, "pass `keep` instead of a `rank`"),
        ({"keep": 0.5, "losses": None}, "needs predicted losses"),
        ({"keep": 0.5, "price": "euros"}, "counted in parameters or bytes"),
        ({"keep": 0.5, "form": "tucker"}, "low_rank or pivoted, but got the form 'tucker'"),
    ],
)
def test_a_bad_budget_says_what_must_hold(settings: dict[str, object], message: str) -> None:
    arguments = {"method": "kfac", "allocation": "knapsack", "losses": {"a": falling(64, 0)}, **settings}
    with pytest.raises(ValueError, match=message):
        allocate([site("a", 64, 64)], **arguments)  # type: ignore[arg-type]


def test_the_sites_of_a_model_of_seven_billion_parameters_come_near_the_bound() -> None:
    shapes = 4 * [(4096, 4096)] + 2 * [(11008, 4096)] + [(4096, 11008)]
    sites = [site(f"{block}.{i}", *shape) for block in range(32) for i, shape in enumerate(shapes)]
    tail = torch.linspace(1, 0, 4097).pow(3)
    losses = {s.name: (tail * (1 + i % 7)).tolist() for i, s in enumerate(sites)}
    plan = allocate(sites, keep=0.8, method="kfac", allocation="knapsack", losses=losses)
    assert plan.predicted_loss is not None
    assert plan.predicted_loss <= 1.001 * plan.bound
