"""Storages: how the numbers of a layer lie in memory and on disk. One entry each, which everything else asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rankfold.errors import InputError
from rankfold.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Quantizer:
    """One way to quantize the numbers of a linear layer, counting statistics and padding.

    A quantizer of single layers has `quantize` and `module`, and is applied block by block during the walk; one that
    a library behind transformers applies has `by_library`.
    """

    settings: type[Any]
    """A dataclass of what may be chosen, all of it with defaults, as plain numbers that a checkpoint stores."""
    bytes: Callable[[int, int, Any], int]
    """Bytes on disk of a matrix of (out, in) with some settings, its bias left out."""
    few: Callable[[Any], bool] = lambda settings: False
    """Whether settings store so few bits that pivoted layers lose a lot (docs/lord.md)."""
    quantize: Callable[[Tensor, Tensor | None, Tensor, Any], nn.Module] | None = None
    """Maps weight (out, in), bias, second moment of the inputs (in, in) and settings to the layer that replaces them.

    A layer must have `weight` (out, in), `bias`, `to_dense()` and `structure`: what loading needs besides the
    settings to construct it empty, as plain data.
    """
    module: type[nn.Module] | None = None
    """The layer. Loading makes it as `module(in_features, out_features, structure, bias, settings, device, dtype)`."""
    by_library: Callable[..., Any] | None = None
    """`(source, settings, dtype=, device=)` to a quantized model and a summary of what was done to which layers."""

    def bits(self, shape: tuple[int, int], settings: Any) -> float:
        """Bits per weight of a matrix (out, in), counting everything that is stored."""
        return 8 * self.bytes(*shape, settings) / (shape[0] * shape[1])


QUANTIZERS: Registry[Quantizer] = Registry(
    "rankfold.quantizers",
    # In the room that knows how to quantize, which is above this one.
    later={
        "gptq": "rankfold.quantization.gptq:GPTQ",
        "spqr": "rankfold.quantization.spqr:SPQR",
        "int8": "rankfold.quantization.library:INT8",
        "nf4": "rankfold.quantization.library:NF4",
    },
)
"""The values of `rankfold quantize --scheme`."""


def quantizer_at(name: str) -> Quantizer:
    """The entry of a quantizer.

    Raises:
        ValueError: If there is none of this name.
    """
    if name not in QUANTIZERS:
        raise InputError(f"A scheme must be one of {', '.join(QUANTIZERS)}, but got {name!r}.")
    return QUANTIZERS[name]


def quantized_module(scheme: str) -> type[Any]:
    """The layer of a quantizer, for the code that loads checkpoints."""
    module = quantizer_at(scheme).module
    if module is None:
        raise InputError(f"{scheme}: layers of this scheme are loaded by transformers, not by a plan.")
    return module


def settings_for(scheme: str, given: Mapping[str, Any]) -> Any:
    """Settings of a quantizer from what a user gave, `None` standing for the default.

    Raises:
        ValueError: If the quantizer has no such setting, or one is out of range.
    """
    kind = quantizer_at(scheme).settings
    known: Sequence[str] = list(kind.__dataclass_fields__)
    chosen = {name: value for name, value in given.items() if value is not None}
    foreign = sorted(set(chosen) - set(known))
    if foreign:
        raise InputError(
            f"The scheme {scheme!r} has no setting {foreign[0]!r}: it has {', '.join(known) or 'none'}. Leave it out, "
            "or use another scheme."
        )
    return kind(**chosen)
