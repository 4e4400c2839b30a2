"""The search for the smallest share within a limit on the loss, with a loss that is known."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rankfold.allocation import BudgetError
from rankfold.pipeline.search import STEPS, smallest_within
from rankfold.plan import Plan


class Tries:
    """Tries whose rise of the loss is a function of the share; shares below a floor cannot be had."""

    def __init__(self, loss: Callable[[float], float], floor: float = 0.0) -> None:
        self.loss, self.floor = loss, floor
        self.shares: list[float] = []
        self.compressed = False

    def attempt(self, share: float, title: str) -> Plan:
        assert not self.compressed, "the dense layers are put back before another try"
        self.shares.append(share)
        self.compressed = True
        if share < self.floor:
            raise BudgetError("too small")
        return Plan(options=(), method="svd", allocation="uniform")

    def rise(self) -> float:
        assert self.compressed
        return self.loss(self.shares[-1])

    def restore(self) -> None:
        self.compressed = False

    def search(self, limit: float, fewest: float) -> tuple[float, float]:
        """The share that is there in the end, and its rise."""
        _, measured = smallest_within(limit, self.attempt, self.rise, self.restore, fewest)
        assert self.compressed
        return self.shares[-1], measured


@pytest.mark.parametrize("limit", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("fewest", [0.0, 0.14])
def test_few_tries_come_near_the_limit(limit: float, fewest: float) -> None:
    # Rounding: a factor of four a bit. Ranks: as a real model's, steeper the more is removed.
    rise = (lambda share: 60 * 4 ** (-16 * share)) if fewest else (lambda share: 3 * (1 - share) ** 1.6)
    tries = Tries(rise)
    share, measured = tries.search(limit, fewest)
    assert 0.8 * limit <= measured <= limit
    assert measured == rise(share)
    assert len(tries.shares) <= 5


def test_a_loss_that_jumps_is_bisected_and_the_best_try_is_carried_out_again() -> None:
    tries = Tries(lambda share: 0.01 if share >= 0.7 else 5.0)
    share, measured = tries.search(0.5, 0.0)
    assert measured == 0.01
    assert 0.7 <= share < 0.8
    assert len(tries.shares) <= STEPS + 1


@pytest.mark.parametrize("good", [0.04, 1e-4])
def test_a_line_that_does_not_help_is_left(good: float) -> None:
    tries = Tries(lambda share: good if share >= 0.7 else 5.0)
    share, _ = tries.search(0.05, 0.0)
    assert 0.7 <= share < 0.77
    assert len(tries.shares) <= STEPS + 1


@pytest.mark.parametrize(("height", "limit", "fewest"), [(60, 0.002, 0.14), (300, 0.01, 0.0625)])
def test_losses_flatter_than_usual_are_found_too(height: float, limit: float, fewest: float) -> None:
    rise = lambda share: height * 4 ** (-8 * share)  # noqa: E731
    share, measured = Tries(rise).search(limit, fewest)
    assert measured <= limit
    assert measured == rise(share)


def test_a_loss_that_is_no_number_costs_too_much() -> None:
    share, _ = Tries(lambda share: 0.01 if share >= 0.7 else float("inf")).search(0.05, 0.0)
    assert 0.7 <= share < 0.8


def test_shares_that_cannot_be_had_are_passed_over() -> None:
    share, measured = Tries(lambda share: 0.0, floor=0.6).search(0.1, 0.0)
    assert 0.6 <= share < 0.65
    assert measured == 0.0


def test_a_limit_that_nothing_keeps_within_says_what_was_tried() -> None:
    with pytest.raises(ValueError, match=r"removing 0\.016 of the sites already costs more"):
        Tries(lambda share: 1.0).search(0.1, 0.0)


def test_sizes_that_cannot_be_had_are_not_said_to_cost_too_much() -> None:
    with pytest.raises(ValueError, match=r"No size that was tried can be had, up to 0\.984 of the sites: too small"):
        Tries(lambda share: 1.0, floor=2.0).search(0.1, 0.0)
