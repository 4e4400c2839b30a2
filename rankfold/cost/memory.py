"""Parameters of a model, and its bytes in memory and on disk."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from rankfold.cost.latency import cache_of
from rankfold.modules import JointLinear, QuantizedLinear, SharedFactors, is_linear
from rankfold.precision import device_of
from rankfold.shards import shard_files
from rankfold.sites import text_arguments


def parameter_count(model: Any) -> int:
    """Numbers in all parameters, shared ones counted once; a weight in few bits is one number."""
    total = 0
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
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


@torch.no_grad()
def cache_bytes(model: Any, tokens: int, batch_size: int = 1) -> int | None:
    """Bytes that a model caches of so many tokens to continue them: keys and values, or a state.

    `None` for a model that keeps nothing.
    """
    if not model.can_generate() or model.config.is_encoder_decoder:
        return None
    ids = torch.full((batch_size, tokens), 3, device=device_of(model))
    cache = cache_of(model(input_ids=ids, use_cache=True))
    found: dict[int, Tensor] = {}
    _collect(cache, found, set())
    # Views of one storage are one piece of memory; what shares it with the weights is none of the cache's.
    own = {part.untyped_storage().data_ptr() for part in model.parameters()}
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in found.values()}
    return sum(size for place, size in storages.items() if place not in own) or None


def _collect(value: Any, found: dict[int, Tensor], seen: set[int]) -> None:
    """All tensors that hang on something."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        found[id(value)] = value
    elif isinstance(value, Mapping):
        for part in value.values():
            _collect(part, found, seen)
    elif isinstance(value, (list, tuple)):
        for part in value:
            _collect(part, found, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type)):
        for part in vars(value).values():
            _collect(part, found, seen)


@torch.no_grad()
def peak_bytes(model: Any, tokens: int, batch_size: int = 1) -> tuple[int | None, str]:
    """Most bytes that a prefill holds beyond what was held before it, and how that was found.

    On an accelerator by PyTorch's own count; on Linux by the peak of the resident process, in pages of the system; the
    allocator may have held some of it before. Elsewhere `None`.
    """
    device = device_of(model)
    ids = torch.full((batch_size, tokens), 3, device=device)
    inputs = text_arguments(model, ids)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        model(**inputs)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, "device, PyTorch's allocator"
    marks = Path("/proc/self/clear_refs")
    try:
        marks.write_text("5")
    except OSError as error:
        return None, f"unavailable: the peak of the process cannot be set back ({error.strerror})"
    _give_back()
    before = _resident("VmRSS")
    model(**inputs)
    return _resident("VmHWM") - before, "host, resident pages"


def _give_back() -> None:
    """Let the C library return what it holds free, which would hide new memory; others than glibc have no such call."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))


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
        if isinstance(module, QuantizedLinear):
            stored += module.stored_bytes
            multiplied += module.out_features * module.in_features
        elif is_linear(module):
            weight = cast(Any, module.weight)
            state = getattr(weight, "quant_state", None)
            stored += weight.numel() * weight.element_size()
            multiplied += weight.numel() if state is None else state.shape.numel()
        else:
            numbers = sum(part.numel() for part in _loose_matrices(module))
            stored += sum(part.numel() * part.element_size() for part in _loose_matrices(module))
            multiplied += numbers
    return Reading(stored, multiplied)


def _loose_matrices(module: nn.Module) -> list[Tensor]:
    """Matrices that no linear layer holds: experts in one 3-D parameter, factors that a stack of layers shares."""
    own = list(module.parameters(recurse=False))
    if isinstance(module, (SharedFactors, JointLinear)):
        return [part for part in own if part is not getattr(module, "own_bias", None)]
    return [part for part in own if part.ndim == 3]


def disk_bytes(folder: str | Path) -> int | None:
    """Bytes of a checkpoint's weights; `None` for a model that is not in a local folder."""
    path = Path(folder)
    return sum(shard.stat().st_size for shard in shard_files(path)) if path.is_dir() else None
