"""How a model is compressed, and whether it can be in this way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rankfold.allocation import ALLOCATIONS, MULTIPLE, WAYS, WidthLosses, allocate, check_ways, form_for
from rankfold.cost import SPEED_OF
from rankfold.errors import InputError
from rankfold.factorization import METHODS, Method
from rankfold.pipeline.budget import Budget
from rankfold.plan import Plan
from rankfold.quantization import EMBEDDING_BITS, WIDTHS, find_embeddings
from rankfold.sites import Site

REFINE_TOWARD = ("predictions", "block")
"""What refined blocks aim at: the model's predictions, or the dense block's own output."""


class Effort(NamedTuple):
    """How much is measured, unless a caller says otherwise of one of these."""

    sequences: int
    """Windows of the calibration text."""
    rounds: int
    """Rounds after the first in which statistics are measured again, where ranks alone are chosen."""
    drift: float
    """Share of the drift that is corrected, there."""
    drift_in_bits: float
    """The same where bits are shared out; statistics are measured once then."""


EFFORTS = {
    "quick": Effort(32, 0, 0.0, 0.0),
    "default": Effort(128, 0, 0.0, 0.5),
    "best": Effort(128, 2, 0.5, 0.5),
}
"""What one word stands for. Rounds and drift pay for themselves on models of under a million parameters, more text on
SmolLM2-135M (docs/log.md)."""

UNTOUCHED = 16
"""Bits of embeddings that are left as they are."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a model is compressed: the default engine, put together here and nowhere else."""

    method: str = "kfac"
    """A key of `rankfold.factorization.METHODS`."""
    allocation: str | None = None
    """A key of `rankfold.allocation.ALLOCATIONS`; without it the one that suits method and budget."""
    form: str | None = None
    """A key of `rankfold.modules.FORMS`; without it the method's own."""
    allow: tuple[str, ...] | None = None
    """What the budget may be spent on (`rankfold.allocation.WAYS`); without it what suits method and budget."""
    multiple: int | None = None
    """Ranks are lowered to a multiple of this; without it to one that suits the allocation."""
    rounds: int | None = None
    """Rounds after the first in which statistics are measured again, for methods that are ordered; without them those
    of the effort."""
    drift: float | None = None
    """Share of the drift that is corrected, 0 to 1, for the same; without it that of the effort."""
    effort: str = "default"
    """A key of `EFFORTS`."""
    memory: int | None = None
    """Bytes of intermediate results that wait in memory, not on disk; without it 3 % of what is free."""
    refine: int = 0
    """Gradient steps on each block after its factorization."""
    refine_toward: str = "predictions"
    """One of `REFINE_TOWARD`."""
    labels: str | None = None
    """`text` or `sampled` (`rankfold.calibration.LABELS`); without it those of the text where it holds them."""
    speed_of: str = "decode"
    """What a speed-up is of: a key of `rankfold.cost.SPEED_OF`."""
    embeddings: int | None = None
    """Bits of the embeddings and the head: 2 to 8, or 16 to leave them; without it what suits bytes or a limit."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse unknown names before any work is done."""
        allocation = self.allocation or "knapsack"
        named = (
            ("method", self.method, METHODS),
            ("allocation", allocation, ALLOCATIONS),
            ("effort", self.effort, EFFORTS),
            ("speed_of", self.speed_of, SPEED_OF),
        )
        for what, value, known in (*named, ("refine_toward", self.refine_toward, REFINE_TOWARD)):
            if value not in known:
                raise InputError(f"`{what}` must be one of {', '.join(known)}, but got {value!r}.")
        form_for(self.method, self.form)
        if self.allow is not None:
            check_ways(self.allow)
        if self.shares_bits is None and "bits" in (self.allow or ()):
            raise InputError(
                "Bits are shared out by the predicted losses of kfac and a knapsack, in forms of their own and without "
                f"refinement, but got the method {self.method}, the allocation {self.allocation}, the form {self.form} "
                f"and {self.refine} steps of refinement. Leave these out, or `allow` rank alone."
            )
        if self.embeddings is not None and self.embeddings != UNTOUCHED and not 2 <= self.embeddings <= 8:
            raise InputError(
                f"`embeddings` must be 2 to 8 bits, or {UNTOUCHED} to leave them, but got {self.embeddings}."
            )
        multiple = 1 if self.multiple is None else self.multiple
        if (self.rounds or 0) < 0 or not 0 <= (self.drift or 0) <= 1 or multiple < 1 or self.refine < 0:
            raise InputError(
                "`rounds` and `refine` must be >= 0, `drift` in [0, 1] and `multiple` >= 1, but got "
                f"{self.rounds}, {self.refine}, {self.drift} and {multiple}."
            )

    @property
    def entry(self) -> Method:
        """What the method offers."""
        return METHODS[self.method]

    @property
    def shares_bits(self) -> bool | None:
        """Whether bits may be shared out; `None` where the other settings rule it out."""
        fits = self.method == "kfac" and self.allocation in (None, "knapsack") and not self.form and not self.refine
        return None if not fits else self.allow is None or "bits" in self.allow

    def ways(self, budget: Budget) -> tuple[str, ...]:
        """What a budget is spent on: bits too where it speaks of bytes, bits or the loss, unless told otherwise."""
        if self.allow is not None:
            return check_ways(self.allow)
        in_ranks = budget.keep is not None or budget.rank is not None or budget.plan is not None
        return WAYS if self.shares_bits and not in_ranks else ("rank",)

    def rounds_for(self, budget: Budget) -> int:
        """Rounds after the first: those asked for, or those of the effort; none where bits are shared out."""
        if self.rounds is not None:
            return self.rounds
        return 0 if "bits" in self.ways(budget) else EFFORTS[self.effort].rounds

    def drift_for(self, budget: Budget) -> float:
        """Share of the drift that is corrected: the one asked for, or that of the effort."""
        if self.drift is not None:
            return self.drift
        effort = EFFORTS[self.effort]
        return effort.drift_in_bits if "bits" in self.ways(budget) else effort.drift

    def ranks_by(self, budget: Budget) -> str:
        """The allocation, by default the one that suits method and budget."""
        shares_out = self.entry.needs_gradients and budget.rank is None
        return self.allocation or ("knapsack" if shares_out else "uniform")

    def needs_gradients(self, budget: Budget) -> bool:
        """Whether a loss is followed back: for the method, or for predicted losses to share out a budget by."""
        predicts = budget.plan is None and ALLOCATIONS[self.ranks_by(budget)].needs_losses
        return self.entry.needs_gradients or predicts

    def needs_text(self, budget: Budget) -> bool:
        """Whether anything is measured on text."""
        searched = budget.max_loss_increase is not None
        return self.entry.needs_data or self.needs_gradients(budget) or self.refine > 0 or searched

    def embedding_bits(self, model: Any, budget: Budget) -> tuple[int, ...]:
        """Widths of the embeddings among which is chosen; none where they are left as they are.

        Raises:
            ValueError: If a width is asked for that this model or budget does not allow.
        """
        if self.embeddings == UNTOUCHED:
            return ()
        shares = "bits" in self.ways(budget)
        if self.embeddings is not None:
            if not shares:
                raise InputError(
                    "Embeddings in few bits go with a budget over bits: give `bits`, `bytes` or `max_loss_increase`. "
                    "Otherwise leave `embeddings` out."
                )
            find_embeddings(model)
            return (self.embeddings,)
        # Only where the whole model is asked to be small, and what each width costs can be measured.
        if not shares or (budget.bytes is None and budget.max_loss_increase is None):
            return ()
        try:
            find_embeddings(model)
        except InputError:
            return ()
        return (*EMBEDDING_BITS, UNTOUCHED)

    def most_saved(self, model: Any, budget: Budget) -> int:
        """The most bytes of the whole model that embeddings in few bits can save."""
        widths = [bits for bits in self.embedding_bits(model, budget) if bits != UNTOUCHED]
        if not widths:
            return 0
        found = find_embeddings(model)
        return found.bytes - min(found.bytes_in(bits) for bits in widths)

    def choice(self, budget: Budget, keep: float | None) -> dict[str, Any]:
        """What is handed to `allocate`."""
        return {
            "keep": keep,
            "rank": budget.rank,
            "method": self.method,
            "allocation": self.ranks_by(budget),
            "multiple": self.multiple,
            "form": self.form,
            "seed": self.seed,
            "price": "bytes" if budget.bytes is not None else "parameters",
        }

    def check(self, model: Any, sites: Sequence[Site], budget: Budget) -> None:
        """Whether the model can be compressed in this way, asked before anything is measured.

        Raises:
            ValueError: If the budget is out of reach, or a limit on the loss is asked for and the model has no
                next-token loss.
        """
        self.embedding_bits(model, budget)
        if budget.plan is not None:
            _check_plan(budget.plan, sites)
        elif "bits" in self.ways(budget):
            if budget.rank is not None:
                raise InputError("A `rank` leaves no budget over bits. Give `bits`, `bytes`, `keep` or a limit.")
            if budget.max_loss_increase is None and budget.speedup is None:
                keep = budget.keep_of(model, sites, self.most_saved(model, budget))
                allocate(sites, keep=keep, losses=_even(sites), allow=self.ways(budget), multiple=self.multiple)
        elif budget.max_loss_increase is None and budget.speedup is None:
            even = {site.name: [1.0] * min(site.out_features, site.in_features) + [0.0] for site in sites}
            allocate(sites, **self.choice(budget, budget.keep_of(model, sites)), losses=even)
        if budget.speedup is not None and any(site.kind.endswith(".*") for site in sites):
            raise InputError(
                "`speedup` is predicted from the time of each layer, but of a stack of experts only some run for a "
                "token, and which is not known. Give `bytes`, `bits` or `keep`, or leave the experts out (`sites`)."
            )
        causal = model.can_generate() and not model.config.is_encoder_decoder
        if budget.max_loss_increase is not None and not causal:
            raise InputError(
                f"`max_loss_increase` is measured on the next-token loss, which a {type(model).__name__} does not "
                "have. Give `keep` or `bytes`."
            )


def _even(sites: Sequence[Site]) -> dict[str, WidthLosses]:
    """Losses that tell nothing apart, to see whether a budget can be met."""
    curves = {site.name: np.ones(min(site.out_features, site.in_features) // MULTIPLE + 1) for site in sites}
    return {name: WidthLosses(curve, dict.fromkeys(WIDTHS, curve)) for name, curve in curves.items()}


def _check_plan(plan: Plan, sites: Sequence[Site]) -> None:
    """Whether the sites have room for the ranks of a plan, and one method fills it."""
    limits = {site.name: min(site.out_features, site.in_features) for site in sites}
    methods = {option.method for option in plan.factorized}
    if len(methods) != 1 or not methods <= set(METHODS):
        raise InputError(
            f"A plan must use a single method of {', '.join(METHODS)}, but this one names "
            f"{', '.join(sorted(methods)) or 'none'}. Carry it out with rankfold.factorize(model, plan, ...)."
        )
    for option in plan.factorized:
        for name in option.sites:
            if not 1 <= min(option.ranks) <= max(option.ranks) <= limits.get(name, 0):
                raise InputError(
                    f"{name}: the plan asks for the ranks {option.ranks}, but this matrix of the model has at most "
                    f"{limits.get(name, 0)}. It was made for another model."
                )
