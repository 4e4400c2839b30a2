"""A linear layer as the product of two thin ones."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rankfold.modules.factorized_linear import FactorizedLinear


class LowRankLinear(FactorizedLinear):
    """`y = up(down(x))`, in the place of an `nn.Linear` (or of GPT-2's `Conv1D`).

    Both factors are plain `nn.Linear`, so that PEFT, bitsandbytes and torchao find them.

    >>> layer = LowRankLinear(8, 6, (2,), bias=False)
    >>> layer(torch.ones(3, 8)).shape, layer.weight.shape, sum(p.numel() for p in layer.parameters())
    (torch.Size([3, 6]), torch.Size([6, 8]), 28)
    """

    is_pair = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ranks: tuple[int, ...],
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """An empty layer; `from_factors` makes a filled one."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        (self.rank,) = ranks
        self.down = nn.Linear(in_features, self.rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(self.rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def from_factors(
        cls,
        up: Float[Tensor, "out rank"],
        down: Float[Tensor, "rank in"],
        bias: Float[Tensor, " out"] | None = None,
    ) -> LowRankLinear:
        """A layer that holds these factors, in their dtype and on their device."""
        layer = cls(down.shape[1], up.shape[0], (up.shape[1],), bias is not None, device="meta", dtype=up.dtype)
        layer.down.weight = nn.Parameter(down.contiguous())
        layer.up.weight = nn.Parameter(up.contiguous())
        if bias is not None:
            layer.up.bias = nn.Parameter(bias)
        return layer

    def hidden(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch rank"]:
        """What the last factor reads."""
        hidden: Tensor = self.down(x)
        return hidden

    def product(self) -> Float[Tensor, "out in"]:
        """The matrix that the factors stand for, as an ordinary tensor."""
        return self.up.weight @ self.down.weight

    def extra_repr(self) -> str:
        """Sizes and rank."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
