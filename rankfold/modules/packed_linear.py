"""Linear layers in bfloat16 that also hold their matrix in the order in which a CPU's kernels read it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class PackedLinear(nn.Linear):
    """An `nn.Linear` with a copy of its matrix that was reordered once for oneDNN.

    A plain layer has its matrix reordered in every call, or read as it lies, which takes up to twice as long where
    few vectors are multiplied. The copy is made in the first pass without gradients, is never saved, and is dropped
    whenever the matrix is asked for or has changed: the next pass makes another, at the price of one plain call.
    """

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        """The matrix; whoever asks for it may change it."""
        self.__dict__.pop("_packed", None)
        plain: nn.Parameter = self._parameters["weight"]  # type: ignore[assignment]
        return plain

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The layer's outputs."""
        plain: Any = self._parameters["weight"]
        trains = torch.is_grad_enabled() and any(
            part is not None and part.requires_grad for part in (x, plain, self.bias)
        )
        # A compiler reorders by itself, and cannot look into such a matrix.
        if trains or torch.compiler.is_compiling() or not _has_kernel(plain) or x.dtype != torch.bfloat16:
            return F.linear(x, plain, self.bias)
        kept = self.__dict__.get("_packed")
        if kept is None or kept[0] is not plain or kept[1] != plain._version:
            kept = (plain, plain._version, torch.ops.mkldnn._reorder_linear_weight(plain.detach(), 1))
            self.__dict__["_packed"] = kept
        product: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, kept[2], self.bias, "none", [], "")
        return product

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """Move or cast."""
        self.__dict__.pop("_packed", None)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        """Copies reorder for themselves."""
        return {key: value for key, value in self.__dict__.items() if key != "_packed"}


def _has_kernel(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16


def can_pack(linear: nn.Module) -> bool:
    """Whether this is a plain linear layer in bfloat16 on a CPU that multiplies such numbers."""
    # What replaces `forward` on the instance, as accelerate's hooks do, would not see another class.
    if type(linear) is not nn.Linear or "forward" in linear.__dict__ or not linear.weight.numel():
        return False
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return _has_kernel(linear.weight) and available and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_linears(model: nn.Module) -> None:
    """Let every plain linear layer that can hold its matrix reordered too, in place."""
    for module in model.modules():
        if can_pack(module):
            module.__class__ = PackedLinear


def unpack_linears(model: nn.Module) -> None:
    """Make them plain layers again."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.__dict__.pop("_packed", None)
            module.__class__ = nn.Linear  # type: ignore[assignment]
