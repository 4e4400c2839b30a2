"""Forms: which matrices stand for a weight. One entry each, which everything else asks; no other place knows names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from rankfold.errors import InputError
from rankfold.factorization import Factors, pivoted
from rankfold.modules.adaptive_linear import AdaptiveLinear
from rankfold.modules.compensated_linear import CompensatedLinear
from rankfold.modules.factorized_linear import FactorizedLinear
from rankfold.modules.low_rank_linear import LowRankLinear
from rankfold.modules.pivoted_linear import PivotedLinear
from rankfold.modules.tucker_linear import TuckerLinear
from rankfold.plan import DENSE
from rankfold.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Form:
    """One way to represent the matrix of a layer with fewer numbers."""

    module: type[FactorizedLinear]
    """The layer. Loading makes it as `module(in_features, out_features, ranks, bias, device, dtype, **structure)`,
    with what it names as its `structure`."""
    parameters: Callable[[int, int, tuple[int, ...]], int]
    """Numbers stored for a matrix of (out, in) at some ranks, without its bias."""
    make: Callable[[Factors, torch.dtype], FactorizedLinear] | None = None
    """The layer that holds factors, in a dtype; `None` where it is made from another layer, not from factors."""
    modes: int = 1
    """Ranks that it has: one, or one per mode."""
    takes: str = "two factors"
    """Factors from which it can be made: `two factors` or `core`."""
    structure_bytes: Callable[[int, int, tuple[int, ...]], int] = lambda out, into, ranks: 0
    """Bytes of what a plan stores of a matrix as text (`FactorizedLinear.structure`)."""

    def at(self, rank: int) -> tuple[int, ...]:
        """The ranks of all modes at one rank."""
        return (rank,) * self.modes


def _cast(factors: Factors, dtype: torch.dtype) -> Factors:
    core, bias = (None if part is None else part.to(dtype) for part in (factors.core, factors.bias))
    return Factors(factors.up.to(dtype), factors.down.to(dtype), core, bias, factors.error)


def _low_rank(factors: Factors, dtype: torch.dtype) -> FactorizedLinear:
    up, down, _, bias, _ = _cast(factors, dtype)
    return LowRankLinear.from_factors(up, down, bias)


def _tucker(factors: Factors, dtype: torch.dtype) -> FactorizedLinear:
    up, down, core, bias, _ = _cast(factors, dtype)
    assert core is not None, "a Tucker form is made from factors with a core"
    return TuckerLinear.from_factors(up, core, down, bias)


def _pivoted(factors: Factors, dtype: torch.dtype) -> FactorizedLinear:
    # Rounded while it is pivoted, so that later numbers compensate the rounding of earlier ones.
    parts = pivoted(factors.up, factors.down, dtype)
    return PivotedLinear.from_pivoted(*parts, None if factors.bias is None else factors.bias.to(dtype))


FORMS: Registry[Form] = Registry(
    "rankfold.forms",
    {
        "low_rank": Form(
            module=LowRankLinear, parameters=lambda out, into, ranks: ranks[0] * (out + into), make=_low_rank
        ),
        "tucker": Form(
            module=TuckerLinear,
            parameters=lambda out, into, ranks: out * ranks[0] + ranks[0] * ranks[1] + ranks[1] * into,
            make=_tucker,
            modes=2,
            takes="core",
        ),
        "pivoted": Form(
            module=PivotedLinear,
            parameters=lambda out, into, ranks: ranks[0] * (out + into - ranks[0]),
            make=_pivoted,
            # One bit a row, in hexadecimal.
            structure_bytes=lambda out, into, ranks: 2 * -(-out // 8),
        ),
        "compensated": Form(
            module=CompensatedLinear,
            parameters=lambda out, into, ranks: out * into + ranks[0] * (out + into),
        ),
        "adaptive": Form(module=AdaptiveLinear, parameters=lambda out, into, ranks: ranks[1] * (out + into), modes=2),
    },
)
"""The values of `rankfold compress --form`, and what layers make of themselves later (docs/mathematics.md, eq. 1)."""


def forms_for(takes: str) -> tuple[str, ...]:
    """Names of the forms that can be made from such factors."""
    return tuple(name for name, form in FORMS.loadable().items() if form.make is not None and form.takes == takes)


def form_at(name: str) -> Form:
    """The entry of a form.

    Raises:
        ValueError: If there is none of this name.
    """
    if name not in FORMS:
        raise InputError(f"A form must be `{DENSE}` or one of {', '.join(FORMS)}, but got {name!r}.")
    return FORMS[name]


def factorized_module(factors: Factors, form: str = "low_rank", like: torch.Tensor | None = None) -> FactorizedLinear:
    """The module that holds these factors in a form, with the dtype and on the device of another tensor.

    Raises:
        ValueError: If the form is unknown, or cannot be made from such factors.
    """
    entry = form_at(form)
    found = "two factors" if factors.core is None else "core"
    if entry.make is None or entry.takes != found:
        raise InputError(f"The form {form!r} cannot be made from {found}: use {' or '.join(forms_for(found))}.")
    like = factors.up if like is None else like
    return entry.make(factors, like.dtype).to(like.device)


def stored_parameters(form: str, out_features: int, in_features: int, ranks: tuple[int, ...], bias: bool) -> int:
    """Numbers that one matrix needs in a form, its bias included.

    >>> stored_parameters("low_rank", 100, 50, (10,), bias=True)
    1600
    """
    weights = out_features * in_features
    if form != DENSE:
        weights = form_at(form).parameters(out_features, in_features, ranks)
    return weights + out_features * bias


def stored_bytes(form: str, shape: tuple[int, int], ranks: tuple[int, ...], bias: bool, size: int) -> int:
    """Bytes that one matrix (out, in) of numbers of `size` bytes needs in a form, its bias and its structure included.

    >>> stored_bytes("pivoted", (100, 50), (10,), bias=False, size=2)
    2826
    """
    structure = 0 if form == DENSE else form_at(form).structure_bytes(*shape, ranks)
    return stored_parameters(form, *shape, ranks, bias) * size + structure


@lru_cache(maxsize=4096)
def largest_rank(form: str, out_features: int, in_features: int, numbers: int) -> int:
    """Largest rank at which a form needs at most so many numbers, bias left out; 0 where none does.

    >>> largest_rank("low_rank", 100, 50, 1500), largest_rank("tucker", 100, 50, 1500)
    (10, 9)
    """
    entry = form_at(form)
    low, high = 0, min(out_features, in_features)
    while low < high:
        middle = (low + high + 1) // 2
        if entry.parameters(out_features, in_features, entry.at(middle)) <= numbers:
            low = middle
        else:
            high = middle - 1
    return low


def module_of(form: str) -> type[Any]:
    """The layer of a form, for the code that loads checkpoints."""
    return form_at(form).module


def structure_of(form: str, layers: Iterable[Any]) -> dict[str, tuple[str, ...]]:
    """What a plan stores of the layers of one option besides their numbers, a text for each layer."""
    layers = list(layers)
    return {name: tuple(str(getattr(layer, name)) for layer in layers) for name in form_at(form).module.structure}
