"""What a user allows a compressed model, in one of five ways."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rankfold.errors import InputError
from rankfold.plan import Plan
from rankfold.sites import Site

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_bytes(text: str) -> int:
    """Bytes from what a person writes.

    Raises:
        ValueError: If it is no number with a unit.

    >>> parse_bytes("9GB"), parse_bytes("1.5 MiB")
    (9000000000, 1572864)
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].lower() not in _UNITS or match[1].count(".") > 1 or match[1] == ".":
        raise InputError(f"Bytes must be a number and a unit, such as 9GB or 700MiB, but got {text!r}.")
    return int(float(match[1]) * _UNITS[match[2].lower()])


@dataclass(frozen=True)
class Budget:
    """What the user allows: exactly one of these."""

    keep: float | None = None
    """Fraction of the sites' parameters."""
    bytes: int | None = None
    """Bytes of the whole model."""
    max_loss_increase: float | None = None
    """Rise of the loss on held-out text, in nats per token."""
    rank: int | None = None
    plan: Plan | None = None
    """A plan whose forms and ranks are carried out as they are."""

    @classmethod
    def of(
        cls,
        *,
        keep: float | None = None,
        bytes_: str | None = None,
        max_loss_increase: float | None = None,
        rank: int | None = None,
        plan: Plan | None = None,
    ) -> Budget:
        """A budget from the options of the command line.

        Raises:
            ValueError: If more than one is given, or one is out of range.
        """
        given = {
            "--keep": keep,
            "--bytes": bytes_,
            "--max-loss-increase": max_loss_increase,
            "--rank": rank,
            "--plan": plan,
        }
        named = [name for name, value in given.items() if value is not None]
        if len(named) > 1:
            raise InputError(f"A budget is one of {', '.join(given)}, but got {' and '.join(named)}. Choose one.")
        if max_loss_increase is not None and max_loss_increase <= 0:
            raise InputError(f"--max-loss-increase must be above 0 nats per token, but got {max_loss_increase:g}.")
        if keep is not None and not 0 < keep <= 1:
            raise InputError(f"--keep is the fraction of parameters kept and must lie in (0, 1], but got {keep:g}.")
        stored = None if bytes_ is None else parse_bytes(bytes_)
        return cls(keep if named else 0.8, stored, max_loss_increase, rank, plan)

    def keep_of(self, model: Any, sites: Sequence[Site]) -> float | None:
        """The fraction of the sites' bytes (or parameters) that this budget leaves; `None` where it must be searched.

        Raises:
            ValueError: If what is not factorized alone needs more.
        """
        if self.plan is not None:
            return min(1.0, self.plan.parameters / sum(site.parameters for site in sites))
        if self.bytes is None:
            return self.keep
        dense = sum(site.parameters * site.bytes_per_parameter for site in sites)
        rest = int(sum(p.numel() * p.element_size() for p in model.parameters())) - dense
        if self.bytes <= rest:
            raise InputError(
                f"{self.bytes:,} bytes cannot hold the model: what is not factorized, such as its embeddings, needs "
                f"{rest:,} bytes. Raise --bytes."
            )
        return min(1.0, (self.bytes - rest) / dense)
