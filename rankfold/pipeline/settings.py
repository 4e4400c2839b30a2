"""How a model is compressed, and whether it can be in this way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rankfold.allocation import ALLOCATIONS, allocate
from rankfold.errors import InputError
from rankfold.factorization import METHODS
from rankfold.pipeline.budget import Budget
from rankfold.plan import Plan
from rankfold.sites import Site

REFINE_TOWARD = ("predictions", "block")
"""What refined blocks aim at: the model's predictions, or the dense block's own output."""


@dataclass(frozen=True)
class Settings:
    """How a model is compressed."""

    method: str = "kfac"
    allocation: str | None = None
    form: str | None = None
    multiple: int = 1
    refine: int = 0
    refine_toward: str = "predictions"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse unknown names before any work is done."""
        allocation = self.allocation or "knapsack"
        named = (("method", self.method, METHODS), ("allocation", allocation, ALLOCATIONS))
        for what, value, known in (*named, ("refine-toward", self.refine_toward, REFINE_TOWARD)):
            if value not in known:
                raise InputError(f"--{what} must be one of {', '.join(known)}, but got {value!r}.")
        if self.allocation == "knapsack" and not METHODS[self.method].needs_gradients:
            raise InputError(f"--allocation knapsack needs predicted losses, which {self.method} has not: use kfac.")

    def ranks_by(self, budget: Budget) -> str:
        """The allocation, by default the one that suits method and budget."""
        shares_out = METHODS[self.method].needs_gradients and budget.rank is None
        return self.allocation or ("knapsack" if shares_out else "uniform")

    def needs_text(self, budget: Budget) -> bool:
        """Whether anything is measured on text."""
        return METHODS[self.method].needs_data or self.refine > 0 or budget.max_loss_increase is not None

    def check(self, model: Any, sites: Sequence[Site], budget: Budget) -> None:
        """Whether the model can be compressed in this way, asked before anything is measured.

        Raises:
            ValueError: If the budget is out of reach, or a limit on the loss is asked for and the model has no
                next-token loss.
        """
        if budget.plan is not None:
            _check_plan(budget.plan, sites)
        elif budget.max_loss_increase is None:
            even = {site.name: [1.0] * min(site.out_features, site.in_features) + [0.0] for site in sites}
            choice: dict[str, Any] = {"keep": budget.keep_of(model, sites), "rank": budget.rank}
            choice |= {
                "method": self.method,
                "allocation": self.ranks_by(budget),
                "multiple": self.multiple,
                "form": self.form,
            }
            allocate(sites, **choice, losses=even)
        causal = model.can_generate() and not model.config.is_encoder_decoder
        if budget.max_loss_increase is not None and not causal:
            raise InputError(
                f"--max-loss-increase is measured on the next-token loss, which a {type(model).__name__} has not. "
                "Give --keep or --bytes."
            )


def _check_plan(plan: Plan, sites: Sequence[Site]) -> None:
    """Whether the sites have room for the ranks of a plan, and one method fills it."""
    limits = {site.name: min(site.out_features, site.in_features) for site in sites}
    methods = {option.method for option in plan.factorized}
    if len(methods) != 1 or not methods <= set(METHODS):
        raise InputError(
            f"A plan must be filled by one method of {', '.join(METHODS)}, but this one names "
            f"{', '.join(sorted(methods)) or 'none'}. Carry it out in Python, with rankfold.compress(model, plan, ...)."
        )
    for option in plan.factorized:
        for name in option.sites:
            if not 1 <= min(option.ranks) <= max(option.ranks) <= limits.get(name, 0):
                raise InputError(
                    f"{name}: the plan asks for the ranks {option.ranks}, but this matrix of the model has at most "
                    f"{limits.get(name, 0)}. It was made for another model."
                )
