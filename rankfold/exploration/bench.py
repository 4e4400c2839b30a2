"""One model on which many points of a design space are tried, statistics and factors being made once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from rankfold.compression import factorize_site, with_layers
from rankfold.cost import memory_bytes, parameter_count, relative_cost
from rankfold.errors import InputError
from rankfold.exploration.space import DesignSpace, Losses, Point, multiplications
from rankfold.factorization import SiteMoments
from rankfold.modules import linear_at, use_eager_experts
from rankfold.plan import DENSE, Plan
from rankfold.quality import Score, Scorer, paired_difference

CACHE_BYTES = 4 * 2**30
"""Bytes of factors that are kept for later trials."""

LATENCY_ROUNDS = 7


class Trial(NamedTuple):
    """What was measured at a point."""

    plan: Plan
    values: dict[str, float]
    """Objectives by name, less of each being better."""
    error: float
    """Standard error of the quality."""


@dataclass
class Bench:
    """A dense model, what is known of its sites, and the factors that were made so far."""

    model: Any
    space: DesignSpace
    statistics: Mapping[str, SiteMoments]
    losses: Losses
    """By method, predicted losses of the sites."""
    score: Scorer
    _factors: OrderedDict[tuple[str, int], nn.Module] = field(default_factory=OrderedDict)
    _held: int = 0

    def __post_init__(self) -> None:
        """Remember the dense model."""
        self.dense_score: Score = self.score(self.model)
        self._dense = {site.name: linear_at(self.model, site.name) for site in self.space.sites}
        use_eager_experts(self.model)
        self.dense_parameters = parameter_count(self.model)
        self.dense_bytes = memory_bytes(self.model)
        self._site_parameters = sum(site.parameters for site in self.space.sites)
        self._site_bytes = sum(site.parameters * site.bytes_per_parameter for site in self.space.sites)

    def measure(self, point: Point, objectives: tuple[str, ...]) -> Trial:
        """All objectives at a point; the model is dense again afterwards.

        Raises:
            ValueError: If the model gives numbers that are not finite, or the point is none of the space.
        """
        plan = self.space.plan(point, self.losses)
        with self.installed(point, plan):
            values = {name: OBJECTIVES[name].measure(self, plan) for name in objectives}
            rise, error = values.get("quality", 0.0), 0.0
            if "quality" in values:
                rise, error = paired_difference(self.score(self.model).values, self.dense_score.values)
                values["quality"] = rise
        return Trial(plan, values, error)

    @contextmanager
    def installed(self, point: Point, plan: Plan) -> Iterator[None]:
        """The factors of a point in place of the dense layers."""
        try:
            for number, option in zip(point, plan.options, strict=True):
                if option.form != DENSE:
                    module = self._factorized(option.sites[0], number, option)
                    if module is not None:
                        self.model.set_submodule(option.sites[0], module)
            yield
        finally:
            for name, module in self._dense.items():
                linear_at(self.model, name)
                self.model.set_submodule(name, module)

    def _factorized(self, name: str, number: int, option: Any) -> nn.Module | None:
        key = (name, number)
        if key not in self._factors:
            made = factorize_site(self.model, name, option, option.method, self.statistics.get(name))
            if made is None:
                return None
            self._factors[key] = made
            self._held += memory_bytes(made)
            while self._held > CACHE_BYTES and len(self._factors) > 1:
                self._held -= memory_bytes(self._factors.popitem(last=False)[1])
        self._factors.move_to_end(key)
        return self._factors[key]

    def parameters(self, plan: Plan) -> int:
        """Of the whole model, by the plan."""
        return self.dense_parameters - self._site_parameters + plan.parameters

    def bytes(self, plan: Plan) -> int:
        """Of the whole model, by the plan."""
        return self.dense_bytes - self._site_bytes + sum(option.bytes for option in plan.options)

    def slowdown(self, phase: str) -> float:
        """Seconds of the installed model over those of the dense one, both taking turns."""
        dense = with_layers(self.model, self._dense)
        ratio = relative_cost(dense, self.model, rounds=LATENCY_ROUNDS)[f"{phase}_ratio"]
        if ratio is None:
            raise InputError(f"A {type(self.model).__name__} does not decode: choose the objective prefill.")
        return float(ratio)


class Objective(NamedTuple):
    """What a search can minimize."""

    unit: str
    measure: Callable[[Bench, Plan], float]
    about: str


OBJECTIVES: dict[str, Objective] = {
    # The quality is replaced by the paired difference, which has an error.
    "quality": Objective("nat/token", lambda bench, plan: 0.0, "increase in loss on held-out text"),
    "parameters": Objective("1", lambda bench, plan: bench.parameters(plan), "parameters of the model"),
    "bytes": Objective("byte", lambda bench, plan: bench.bytes(plan), "bytes of the model"),
    "multiplications": Objective(
        "1", lambda bench, plan: multiplications(plan, bench.space.sites), "multiplications of a token with the sites"
    ),
    "prefill": Objective("1", lambda bench, plan: bench.slowdown("prefill"), "seconds of a prefill over the dense"),
    "decode": Objective("1", lambda bench, plan: bench.slowdown("decode"), "seconds of a token over the dense"),
}
"""The values of `rankfold explore --objective`."""
