"""What a user allows a compressed model, in one of several ways."""

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


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the user allows: exactly one of these; nothing given keeps 0.8 of the sites' parameters.

    Raises:
        ValueError: If more than one is given, or one is out of range.

    >>> Budget(bytes="9GB").bytes, Budget().keep
    (9000000000, 0.8)
    """

    keep: float | None = None
    """Fraction of the sites' parameters, in (0, 1]."""
    bytes: int | str | None = None
    """Bytes of the whole model, as a number or as people write them: `9GB`, `700MiB`."""
    bits: float | int | None = None
    """Average bits of a weight of the sites, counting everything that is stored for them."""
    max_loss_increase: float | None = None
    """Rise of the loss on held-out text, in nats per token."""
    speedup: float | int | None = None
    """How many times as fast the whole model shall be on this machine, as layers timed here predict."""
    rank: int | None = None
    """One rank for all sites."""
    plan: Plan | None = None
    """A plan whose forms and ranks are carried out as they are."""

    def __post_init__(self) -> None:
        """Refuse what contradicts itself or is out of range, wherever it is made."""
        named = [name for name, value in vars(self).items() if value is not None]
        if len(named) > 1:
            given = " and ".join(f"`{name}`" for name in named)
            ways = ", ".join(f"`{name}`" for name in vars(self))
            raise InputError(f"A budget is one of {ways}, but got {given}. Choose one.")
        if not named:
            object.__setattr__(self, "keep", 0.8)
        if self.max_loss_increase is not None and not self.max_loss_increase > 0:
            raise InputError(f"`max_loss_increase` must be above 0 nats per token, but got {self.max_loss_increase:g}.")
        if self.speedup is not None and not self.speedup > 1:
            raise InputError(f"`speedup` must be above 1 times the dense model's speed, but got {self.speedup:g}.")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise InputError(
                f"`keep` is the fraction of parameters kept and must lie in (0, 1], but got {self.keep:g}."
            )
        if self.bits is not None and not 0 < self.bits <= 16:
            raise InputError(f"`bits` is an average per weight and must lie in (0, 16], but got {self.bits:g}.")
        if isinstance(self.bytes, str):
            object.__setattr__(self, "bytes", parse_bytes(self.bytes))

    def keep_of(self, model: Any, sites: Sequence[Site], saved: int = 0) -> float | None:
        """The fraction of the sites' bytes (or parameters) that is left; `None` where it is searched or timed.

        Args:
            model: The dense model.
            sites: Its sites.
            saved: Bytes that embeddings in few bits will save of the whole.

        Raises:
            ValueError: If what is not factorized alone needs more.
        """
        if self.plan is not None:
            return min(1.0, self.plan.parameters / sum(site.parameters for site in sites))
        if self.bytes is None and self.bits is None:
            return self.keep
        assert not isinstance(self.bytes, str), "parsed when it was made"
        dense = sum(site.parameters * site.bytes_per_parameter for site in sites)
        if self.bits is not None:
            weights = sum(site.out_features * site.in_features for site in sites)
            return min(1.0, self.bits * weights / 8 / dense)
        assert self.bytes is not None, "one of both"
        rest = int(sum(p.numel() * p.element_size() for p in model.parameters())) - dense - saved
        if self.bytes <= rest:
            raise InputError(
                f"{self.bytes:,} bytes cannot hold the model: what is not factorized, such as its embeddings, needs "
                f"{rest:,} bytes. Raise `bytes`."
            )
        return min(1.0, (self.bytes - rest) / dense)
