"""bitsandbytes' 4-bit layers keep their storage, whichever layout a kernel gives them while the model runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_FIELDS = ("absmax", "offset", "state2", "nested", "dtype")
"""What the library overwrites of a quantization state when it packs a weight for a CPU kernel."""


def keep_storage(model: nn.Module) -> nn.Module:
    """Make what `state_dict` gives of 4-bit layers independent of whether the model has run, in place.

    On CPUs with AVX-512 BF16 bitsandbytes (0.50) repacks a weight in its first forward pass, rounds its scales to
    16 bits, and takes only half of that back when the layer is saved. Here the scales are kept before a pass, and
    put back, with the weight in its order on disk, before anything reads the state.
    """
    for layer in _four_bit_layers(model):
        if not getattr(layer, "_keeps_storage", False):
            layer._keeps_storage = True
            layer.register_forward_pre_hook(_remember)
            layer.register_state_dict_pre_hook(_restore)
    return model


def restore_storage(model: nn.Module) -> None:
    """Put every 4-bit layer back into the layout that is saved, also those that ran before `keep_storage`."""
    for layer in _four_bit_layers(model):
        _restore(layer)


def _four_bit_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(getattr(module, "weight", None), "quant_state")]


def _is_packed(layer: Any) -> bool:
    return bool(getattr(layer.weight.quant_state, "packing_format_for_cpu", False))


def _remember(layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
    state = layer.weight.quant_state
    if layer.training or inputs[0].requires_grad:
        # The packed kernel has no gradient and would cut the graph without a word.
        _restore(layer)
    if state is not None and not _is_packed(layer):
        layer._stored = {name: getattr(state, name, None) for name in _FIELDS}


def _restore(layer: Any, *_: Any) -> None:
    if not _is_packed(layer):
        return
    state = layer.weight.quant_state
    layer.weight.data = _unpacked(layer.weight.data, tuple(state.shape)).reshape(state.original_qshape)
    kind = getattr(state, "original_storage_type", None)
    if kind is not None:
        layer.weight.data = layer.weight.data.view(kind)
    stored = getattr(layer, "_stored", None)
    if stored is None:
        # It ran before anybody watched: its scales stay rounded, but are put in their order.
        scales = state.absmax.T.contiguous().reshape(-1).float()
        stored = {"absmax": scales, "nested": False, "dtype": state.original_dtype}
    for name, value in stored.items():
        setattr(state, name, value)
    state.packing_format_for_cpu = False


def _unpacked(packed: torch.Tensor, shape: tuple[int, ...], rows: int = 32) -> torch.Tensor:
    """Two numbers of 4 bits a byte, neighbours in a row, from the kernel's blocks of 32 rows.

    A block holds, column by column, the numbers of its 32 rows in its rows' order: the first 32 in low halves of
    bytes, the next 32, of the next column, in high ones.
    """
    out_features, in_features = shape
    halves = packed.reshape(-1, rows)
    pairs = torch.stack([halves & 0xF, halves >> 4], 1)
    blocks = pairs.reshape(out_features // rows, in_features // 2, rows, 2)
    numbers = blocks.transpose(1, 2).reshape(-1, 2)
    return (numbers[:, 0] << 4) | numbers[:, 1]
