"""Parameters of a model, and its bytes in memory and on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, cast

from torch import nn

from rankfold.modules import SpQRLinear
from rankfold.shards import shard_files


def parameter_count(model: Any) -> int:
    """Numbers in all parameters, shared ones counted once; a weight in few bits is one number."""
    total = 0
    for module in model.modules():
        if isinstance(module, SpQRLinear):
            total += module.out_features * module.in_features
    for parameter in model.parameters():
        # bitsandbytes packs two weights into a byte, and remembers their shape.
        state = getattr(parameter, "quant_state", None)
        total += parameter.numel() if state is None else state.shape.numel()
    return total


def memory_bytes(model: Any) -> int:
    """Bytes of all parameters and buffers, shared ones counted once."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


class Reading(NamedTuple):
    """What every decoded token asks of a machine, the key-value cache left aside."""

    bytes: int
    """Bytes of the matrices that are read."""
    multiplications: int
    """Multiplications with their entries."""


def reading(model: Any) -> Reading:
    """The matrices that a token passes, the output head included; an embedding's rows are looked up, not multiplied.

    Experts count as if a token passed all of them.
    """
    stored = multiplied = 0
    for module in model.modules():
        if isinstance(module, SpQRLinear):
            stored += sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
            multiplied += module.out_features * module.in_features
        elif isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            weight = cast(Any, module.weight)
            state = getattr(weight, "quant_state", None)
            stored += weight.numel() * weight.element_size()
            multiplied += weight.numel() if state is None else state.shape.numel()
    return Reading(stored, multiplied)


def disk_bytes(folder: str | Path) -> int | None:
    """Bytes of a checkpoint's weights; `None` for a model that is not in a local folder."""
    path = Path(folder)
    return sum(shard.stat().st_size for shard in shard_files(path)) if path.is_dir() else None
