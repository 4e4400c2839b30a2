"""The design space counts itself, and a point says what the model becomes."""

from __future__ import annotations

import collections
import copy
import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from tiny import build
from transformers import AutoConfig, AutoModelForCausalLM

from rankfold import factorize, find_sites
from rankfold.cost import parameter_count
from rankfold.exploration import (
    DesignSpace,
    Policy,
    choices,
    front,
    hypervolume,
    multiplications,
    point_of,
    prices,
    project,
    starting_points,
)
from rankfold.plan import DENSE
from rankfold.sites import Site

RULES: dict[str, dict[str, Any]] = {
    "free": {},
    "tied": {"tied": True},
    "one choice": {"one_choice": True},
    "ends skipped": {"skip_first": 1, "skip_last": 1},
    "apart": {"distance": 2},
    "tied and apart": {"tied": True, "distance": 2, "skip_last": 1},
    "one choice and apart": {"one_choice": True, "distance": 3},
}


def small(**rules: Any) -> DesignSpace:
    sites = [Site(f"{b}.{k}", 64, 64, False, 4, str(b), k, k) for b in range(4) for k in "qk"]
    return DesignSpace(sites=tuple(sites), choices=choices(["svd"], [1, 0.25]), **rules)


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_size_is_the_number_of_points_that_the_rules_hold_for(rules: dict[str, Any]) -> None:
    space = small(**rules)
    points = list(space)
    assert len(points) == len(set(points)) == space.size
    everything = itertools.product(range(3), repeat=8)
    assert set(points) == {point for point in everything if space.holds(point)}


@pytest.mark.parametrize("rules", [RULES["tied"], RULES["apart"], RULES["one choice and apart"]])
def test_every_point_is_drawn_as_often_as_any_other(rules: dict[str, Any]) -> None:
    space, rng = small(**rules), random.Random(0)
    drawn = collections.Counter(space.sample(rng) for _ in range(100 * space.size))
    assert set(drawn) == set(space)
    # Counts of a fair draw are Poisson: 6 standard deviations around 100.
    assert 40 < min(drawn.values()) <= max(drawn.values()) < 160


def test_llama_2_has_the_space_that_the_paper_counts() -> None:
    config = AutoConfig.for_model(
        "llama", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sites = tuple(find_sites(model).select())
    ranks = choices(["tucker"], [1])
    assert DesignSpace(sites=sites, choices=ranks, tied=True).combinations == 2**32 * 2**7
    assert DesignSpace(sites=sites, choices=ranks).size == 2 ** (32 * 7)
    assert DesignSpace(sites=sites, choices=choices(["tucker"], [1, 64, 256])).size == 4 ** (32 * 7)
    # Three of 32 blocks at rank 1 are the paper's 9 %: 3 x 3.003 % less what rank 1 stores.
    space = DesignSpace(sites=sites, choices=ranks, tied=True, distance=6)
    plan = space.plan(space.tied_point([8, 16, 24], space.kinds, 1))
    removed = sum(site.parameters for site in sites) - plan.parameters
    assert removed / 6_738_415_616 == pytest.approx(0.0901, abs=1e-4)


def test_a_point_predicts_the_parameters_of_the_compressed_model() -> None:
    model = build("llama")
    sites = find_sites(model).select()
    space = DesignSpace(sites=tuple(sites), choices=choices(["svd", "tucker"], [2, 0.25]))
    point = space.sample(random.Random(1))
    plan = space.plan(point)
    before = parameter_count(model)
    factorized = copy.deepcopy(model)
    factorize(factorized, plan)
    assert before - parameter_count(factorized) == sum(site.parameters for site in sites) - plan.parameters
    assert multiplications(plan, sites) == plan.parameters  # no biases in a Llama
    assert {option.method for option in plan.options if option.form != DENSE} == {"svd", "tucker"}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_projection_finds_the_best_point(rules: dict[str, Any]) -> None:
    space, rng = small(**rules), np.random.default_rng(0)
    for _ in range(5):
        gains = np.concatenate([np.zeros((8, 1)), rng.normal(size=(8, 2))], axis=1)
        total = {point: gains[np.arange(8), point].sum() for point in space}
        found = project(space, gains)
        assert space.holds(found)
        if not space.tied:
            assert total[found] == pytest.approx(max(total.values()))
        else:
            # In turns, as documented: no better by another set of blocks or of kinds alone, so never worse than dense.
            assert total[found] >= 0


def test_a_policy_keeps_within_its_budget_and_believes_its_weights() -> None:
    space = small()
    losses = {"svd": {site.name: np.linspace(1, 0, 65).tolist() for site in space.sites}}
    table = prices(space, losses)
    plain = point_of(space, table, Policy(0.7, {}))
    assert space.plan(plain).parameters <= 0.7 * 8 * 64 * 64
    dear = point_of(space, table, Policy(0.7, {"q": 3.0}))
    kept = {kind: sum(n == 0 for n, s in zip(dear, space.sites, strict=True) if s.kind == kind) for kind in "qk"}
    assert kept["q"] > kept["k"]
    starts = list(starting_points(space, table))
    assert {name.split(",")[0] for name, *_ in starts} == {"dense", "knapsack", "paper's rule"}
    assert all(space.holds(point) for _, point, _ in starts)


def test_bad_spaces_say_what_must_hold() -> None:
    with pytest.raises(ValueError, match=r"Of 4 blocks 2 \+ 2 are skipped"):
        small(skip_first=2, skip_last=2)
    with pytest.raises(ValueError, match="this site is in none"):
        DesignSpace(sites=(Site("head", 8, 8, False, 4, None, "head", "head"),), choices=choices(["svd"], [1]))
    with pytest.raises(ValueError, match="one of svd, tucker"):
        choices(["cp"], [1])
    with pytest.raises(ValueError, match="share of the full rank"):
        choices(["svd"], [1.5])
    with pytest.raises(ValueError, match="do not allow"):
        small(distance=2).plan((1,) * 8)


def test_hypervolume_is_the_share_of_a_box_that_points_beat() -> None:
    rng = np.random.default_rng(0)
    for axes in (2, 3):
        points = rng.random((12, axes))
        reference = np.full(axes, 1.1)
        darts = rng.random((200_000, axes)) * reference
        beaten = np.zeros(len(darts), dtype=bool)
        for point in points:
            beaten |= (darts >= point).all(1)
        assert hypervolume(points.tolist(), reference.tolist()) == pytest.approx(
            beaten.mean() * reference.prod(), rel=0.02
        )
        best = front(points.tolist())
        assert hypervolume(points[best].tolist(), reference.tolist()) == pytest.approx(
            hypervolume(points.tolist(), reference.tolist())
        )
