"""What becomes of each weight: the form, the rank and the cost that were chosen, as plain data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rankfold.errors import InputError

PLAN_VERSION = 3
"""Version of the stored plan; a reader refuses a newer one instead of guessing. From 3 on bits are an option's own."""

DENSE = "dense"


@dataclass(frozen=True, kw_only=True)
class Option:
    """One choice for a tuple of sites; a plan holds the chosen ones, an allocation compares many."""

    sites: tuple[str, ...]
    """Module paths of the weights; several for a joint form or the slices of a stack of experts."""
    form: str = DENSE
    """`dense`, or the form that takes the weights' place: a key of `rankfold.modules.FORMS`."""
    method: str = ""
    """The factorization that fills it; empty when dense."""
    ranks: tuple[int, ...] = ()
    """One rank, or one per mode of the form (`tucker`: output mode, input mode); empty when dense."""
    structure: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """What the form stores of each site besides numbers, such as the pivots of `pivoted` (`Form.structure`)."""
    bias: bool = False
    """Whether the module has a bias afterwards."""
    bits: int | None = None
    """Bits of a weight of the matrix, dense or beside its compensation; `None` keeps the model's own dtype."""
    group: int | None = None
    """Weights that share a scale, where the matrix is quantized."""
    factor_bits: int | None = None
    """Bits of a number of the factors; `None` keeps the model's own dtype."""
    parameters: int = 0
    """Numbers stored for these sites, biases and cores included."""
    bytes: int = 0
    """Bytes stored for these sites."""
    loss: float | None = None
    """Predicted rise of the loss in nats per token, where it was predicted."""
    shrinkage: float | None = None
    """How far the inverted moment was shrunk towards a multiple of the identity, 0 to 1: the maximum over its sites."""
    note: str = ""
    """Why, where that is not obvious: for example why a site stays dense."""

    def __hash__(self) -> int:
        """By sites, form, ranks and bits: what tells the options of one plan apart."""
        return hash((self.sites, self.form, self.ranks, self.bits, self.factor_bits))

    @property
    def changes(self) -> bool:
        """Whether anything becomes of the sites."""
        return self.form != DENSE or self.bits is not None

    @property
    def described(self) -> str:
        """The form and its bits in a few words, as tables show them.

        >>> Option(sites=("up",), form="compensated", bits=3, factor_bits=8).described
        '3 bits + low rank in 8'
        >>> Option(sites=("up",), form="pivoted").described, Option(sites=("up",), bits=4).described
        ('pivoted', '4 bits')
        """
        factors = "" if self.factor_bits is None else f" in {self.factor_bits}"
        if self.bits is None:
            return f"{self.form}{factors} bits" if factors else self.form
        return f"{self.bits} bits" + ("" if self.form == DENSE else f" + low rank{factors}")

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults, ready for JSON."""
        defaults = Option(sites=())
        return {name: value for name, value in asdict(self).items() if value != getattr(defaults, name)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Option:
        """The inverse of `to_dict`."""
        known = {**data, "sites": tuple(data["sites"]), "ranks": tuple(data.get("ranks", ()))}
        # Version 1 knew pivots alone, and predicted seconds that nothing predicted.
        pivots = known.pop("pivots", None)
        known.pop("seconds", None)
        structure = data.get("structure") or ({"pivots": pivots} if pivots else {})
        known["structure"] = {name: tuple(texts) for name, texts in structure.items()}
        return cls(**known)


@dataclass(frozen=True, kw_only=True, repr=False)
class Plan:
    """The chosen option of every site, and how it was found: enough to reproduce it.

    >>> option = Option(sites=("layers.0.up",), form="low_rank", ranks=(8,), parameters=1024)
    >>> Plan.from_json(Plan(options=(option,), method="svd").to_json()).options[0].ranks
    (8,)
    """

    options: tuple[Option, ...]
    method: str
    """The factorization: a key of `rankfold.factorization.METHODS`."""
    allocation: str = "uniform"
    """How ranks were chosen: a key of `rankfold.allocation.ALLOCATIONS`."""
    keep: float | None = None
    """Fraction of the chosen sites' parameters, or bytes, that was asked to be kept."""
    rank: int | None = None
    """The explicit rank that was asked for."""
    bound: float | None = None
    """What the sum of predicted losses cannot fall below within the budget, where the allocation knows it."""
    seed: int = 0
    calibration: Mapping[str, Any] = field(default_factory=dict)
    """Corpus, its SHA-256, sequences, tokens: what the statistics were measured on; empty without data."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of rankfold and of the libraries that made it."""

    def __repr__(self) -> str:
        """A line for the whole, and one for each kind of site: how many, in which form, at which ranks."""
        asked = f"keep {self.keep:g}" if self.keep is not None else f"rank {self.rank}" if self.rank else "given"
        loss = "" if self.predicted_loss is None else f", predicted increase {self.predicted_loss:.4g} nat/token"
        lines = [
            f"Plan: {self.method}, {self.allocation}, {asked}: {len(self.changed)} of {len(self.options)} options "
            f"compressed, {self.parameters:,} parameters, {self.bytes:,} bytes{loss}"
        ]
        kinds: dict[tuple[str, str], list[int]] = {}
        for option in self.options:
            for name in option.sites:
                kind = ".".join("*" if part.isdigit() else part for part in name.split("."))
                kinds.setdefault((kind, option.described), []).extend(option.ranks[:1] or [0])
        for (kind, what), ranks in kinds.items():
            shown = f"ranks {min(ranks)} to {max(ranks)}" if max(ranks) > min(ranks) else f"rank {max(ranks)}"
            lines.append(f"  {kind:<44} {len(ranks):>4} x {what}" + (f", {shown}" if max(ranks) else ""))
        return "\n".join(lines)

    @property
    def parameters(self) -> int:
        """Numbers stored for all planned sites."""
        return sum(option.parameters for option in self.options)

    @property
    def bytes(self) -> int:
        """Bytes stored for all planned sites."""
        return sum(option.bytes for option in self.options)

    @property
    def predicted_loss(self) -> float | None:
        """Sum of the options' predicted losses in nats per token, where they were predicted."""
        losses = [option.loss for option in self.options if option.loss is not None]
        return sum(losses) if losses else None

    @property
    def factorized(self) -> tuple[Option, ...]:
        """The options that are factorized."""
        return tuple(option for option in self.options if option.form != DENSE)

    @property
    def changed(self) -> tuple[Option, ...]:
        """The options of which anything becomes: factorized, quantized, or both."""
        return tuple(option for option in self.options if option.changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the version first."""
        data = {name: getattr(self, name) for name in ("method", "allocation", "keep", "rank", "bound", "seed")}
        return {
            "plan_version": PLAN_VERSION,
            **data,
            "calibration": dict(self.calibration),
            "versions": dict(self.versions),
            "options": [option.to_dict() for option in self.options],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The inverse of `to_dict`.

        Raises:
            ValueError: If the plan was written by a newer rankfold, or is no plan.
        """
        version = data.get("plan_version")
        if not isinstance(version, int):
            raise InputError(f"A plan must hold an integer `plan_version`, but this one holds {version!r}.")
        if version > PLAN_VERSION:
            raise InputError(
                f"This rankfold reads plans up to version {PLAN_VERSION}, but got one of version {version}. "
                "Install a newer rankfold: pip install --upgrade rankfold"
            )
        fields = {name: data[name] for name in cls.__dataclass_fields__ if name in data and name != "options"}
        return cls(options=tuple(Option.from_dict(option) for option in data["options"]), **fields)

    def to_json(self) -> str:
        """The plan as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The inverse of `to_json`."""
        return cls.from_dict(json.loads(text))
