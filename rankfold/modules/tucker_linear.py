"""A linear layer in Tucker form, its core kept between two factors."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rankfold.modules.factorized_linear import FactorizedLinear
from rankfold.modules.low_rank_linear import LowRankLinear


class TuckerLinear(FactorizedLinear):
    """`y = up(core(down(x)))`, in the place of an `nn.Linear`.

    With the core folded into a factor this is a `LowRankLinear`, smaller and faster; the core is kept for
    fidelity to the literature, for cores that are trained, and for unequal ranks.

    >>> layer = TuckerLinear(8, 6, (2, 3), bias=False)
    >>> layer.weight.shape, sum(p.numel() for p in layer.parameters())
    (torch.Size([6, 8]), 42)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ranks: tuple[int, ...],
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """An empty layer of ranks (output mode, input mode); `from_factors` makes a filled one."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.rank_out, self.rank_in = ranks
        self.down = nn.Linear(in_features, self.rank_in, bias=False, device=device, dtype=dtype)
        self.core = nn.Linear(self.rank_in, self.rank_out, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(self.rank_out, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def from_factors(
        cls,
        up: Float[Tensor, "out rank_out"],
        core: Float[Tensor, "rank_out rank_in"],
        down: Float[Tensor, "rank_in in"],
        bias: Float[Tensor, " out"] | None = None,
    ) -> TuckerLinear:
        """A layer that holds these factors, in their dtype and on their device."""
        ranks = (core.shape[0], core.shape[1])
        layer = cls(down.shape[1], up.shape[0], ranks, bias is not None, device="meta", dtype=up.dtype)
        layer.down.weight = nn.Parameter(down.contiguous())
        layer.core.weight = nn.Parameter(core.contiguous())
        layer.up.weight = nn.Parameter(up.contiguous())
        if bias is not None:
            layer.up.bias = nn.Parameter(bias)
        return layer

    def hidden(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch rank"]:
        """What the last factor reads."""
        hidden: Tensor = self.core(self.down(x))
        return hidden

    def product(self) -> Float[Tensor, "out in"]:
        """The matrix that core and factors stand for, as an ordinary tensor."""
        return self.up.weight @ self.core.weight @ self.down.weight

    def fold(self) -> LowRankLinear:
        """The same layer in two factors: the core multiplied into the larger one, which costs nothing at run time."""
        up, core, down = (linear.weight.detach() for linear in (self.up, self.core, self.down))
        bias = None if self.bias is None else self.bias.detach()
        if self.out_features >= self.in_features:
            return LowRankLinear.from_factors(up @ core, down, bias)
        return LowRankLinear.from_factors(up, core @ down, bias)

    def extra_repr(self) -> str:
        """Sizes and ranks."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, rank_out={self.rank_out}, rank_in={self.rank_in}"
