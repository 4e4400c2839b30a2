"""What every layer in few bits offers to code that expects an `nn.Linear`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

FEW_ROWS, SOME_ROWS = 16, 128
"""Vectors up to which a kernel for few bits is faster than a 16-bit product, which is then bound by memory; and than
such a product with a matrix that has to be multiplied out first, where one call of the kernel does."""


class QuantizedLinear(nn.Module):
    """`y = W x + b` with a quantized `W`, stored in buffers only; each scheme defines what `W` is.

    What a forward pass reads is prepared in the first one and kept beside the buffers, never saved: the matrix of a
    kernel where the scheme has one on this device, else the whole matrix (`prefer`).
    """

    in_features: int
    out_features: int
    bias: nn.Parameter | None
    dtype: torch.dtype
    prefers: str = "balance"

    @property
    def structure(self) -> Any:
        """What loading needs, besides the settings of the scheme, to construct this layer empty: plain data."""
        return None

    def dequantized(self) -> Float[Tensor, "out in"]:
        """The matrix, in float32."""
        raise AssertionError("each scheme defines it")

    def matrix(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """The matrix, rounded to a dtype."""
        return self.dequantized().to(dtype)

    @property
    def rows_by_kernel(self) -> int:
        """Vectors up to which the kernel is faster than multiplying the matrix out."""
        return SOME_ROWS

    def kernel(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
        """A product of vectors (rows, in) in a dtype with the matrix as it is stored, if this device has one."""
        return None

    @property
    def stored_bytes(self) -> int:
        """Bytes of everything that stands for the matrix."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    @property
    def bits_per_weight(self) -> float:
        """Average stored bits per weight, including all statistics."""
        return 8 * self.stored_bytes / (self.out_features * self.in_features)

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The matrix, in the dtype of the model; recomputed on every access."""
        return self.matrix(self.dtype)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The layer's outputs."""
        if torch.is_grad_enabled() and (x.requires_grad or (self.bias is not None and self.bias.requires_grad)):
            # Kernels have no gradients.
            return F.linear(x, self._kept(x.dtype), self.bias)
        few = x.numel() <= (FEW_ROWS if self.prefers == "speed" else self.rows_by_kernel) * self.in_features
        product = self._product(x.dtype) if few else None
        if product is None:
            return F.linear(x, self._kept(x.dtype), self.bias)
        y = product(x.reshape(-1, self.in_features)).reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _product(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
        """The kernel's product in a dtype, prepared once."""
        kept = self.__dict__.setdefault("_products", {})
        if dtype not in kept:
            kept[dtype] = self.kernel(dtype)
        return kept[dtype]  # type: ignore[no-any-return]

    def _kept(self, dtype: torch.dtype) -> Tensor:
        """The whole matrix in a dtype, multiplied out once, or anew where memory is preferred or a kernel serves."""
        kept = self.__dict__.setdefault("_matrices", {})
        if dtype in kept:
            return kept[dtype]  # type: ignore[no-any-return]
        matrix = self.matrix(dtype)
        keeps = self.prefers == "speed" or (self.prefers == "balance" and self._product(dtype) is None)
        if keeps and matrix.device.type != "meta":
            kept[dtype] = matrix
        return matrix

    def _forget(self) -> None:
        """Drop what was prepared: the buffers have changed."""
        self.__dict__.pop("_products", None)
        self.__dict__.pop("_matrices", None)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """Move or cast; what was prepared was so for another place."""
        self._forget()
        # Buffers of whole numbers do not say in which dtype the model computes.
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Copies prepare for themselves."""
        return {key: value for key, value in self.__dict__.items() if key not in ("_products", "_matrices")}

    def to_dense(self) -> nn.Linear:
        """An `nn.Linear` with the same outputs."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        dense.weight = nn.Parameter(self.weight)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone())
        return dense
