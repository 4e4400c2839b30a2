"""What every layer in few bits offers to code that expects an `nn.Linear`."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class QuantizedLinear(nn.Module):
    """`y = W x + b` with a quantized `W`, stored in buffers only; each scheme defines what `W` is."""

    in_features: int
    out_features: int
    bias: nn.Parameter | None
    dtype: torch.dtype

    @property
    def structure(self) -> Any:
        """What loading needs, besides the settings of the scheme, to construct this layer empty: plain data."""
        return None

    def dequantized(self) -> Float[Tensor, "out in"]:
        """The matrix, in float32."""
        raise AssertionError("each scheme defines it")

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
        return self.dequantized().to(self.dtype)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The layer's outputs."""
        return F.linear(x, self.dequantized().to(x.dtype), self.bias)

    def to_dense(self) -> nn.Linear:
        """An `nn.Linear` with the same outputs."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        dense.weight = nn.Parameter(self.weight)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone())
        return dense
