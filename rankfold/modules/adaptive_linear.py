"""A low-rank linear layer that takes a small rank for most tokens and a large one for those that need it."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from rankfold.modules.low_rank_linear import LowRankLinear


class AdaptiveLinear(LowRankLinear):
    """`y = up(down(x))` of rank `small` for every token, of rank `large` where the small one reads too little of it.

    The factors are ordered, most important first. A token needs the rest of them if the share of its squared length
    that the first `small` rows of `down` read is below `threshold`; nothing else is computed beyond the products. What
    stands for a matrix, `product` and `to_dense`, is that of the large rank.
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
        """An empty layer of two ranks, the small one first."""
        self.small, large = ranks
        super().__init__(in_features, out_features, (large,), bias, device, dtype)
        self.register_buffer("threshold", torch.zeros((), device=device, dtype=torch.float32))
        self.threshold: Tensor

    @classmethod
    def from_low_rank(cls, layer: LowRankLinear, small: int) -> AdaptiveLinear:
        """A layer with the ordered factors of another; its threshold is 0, so no token needs the rest."""
        up = layer.up
        made = cls(layer.in_features, layer.out_features, (small, layer.rank), up.bias is not None, device="meta")
        made.down, made.up = layer.down, up
        made.threshold = torch.zeros((), device=up.weight.device)
        return made

    def read_share(
        self, x: Float[Tensor, "*batch in"], first: Float[Tensor, "*batch small"]
    ) -> Float[Tensor, "*batch"]:
        """How much of a token's squared length the first rows of `down` read, up to a constant of the layer."""
        return first.float().square().sum(-1) / x.float().square().sum(-1).clamp(min=1e-12)

    def needs_more(self, x: Float[Tensor, "*batch in"], first: Float[Tensor, "*batch small"]) -> Bool[Tensor, "*batch"]:
        """The tokens that take the large rank."""
        return self.read_share(x, first) < self.threshold

    def hidden(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch rank"]:
        """What `up` reads, zero where a token does without."""
        first = nn.functional.linear(x, self.down.weight[: self.small])
        more = self.needs_more(x, first)
        rest = first.new_zeros(*first.shape[:-1], self.rank - self.small)
        rest[more] = nn.functional.linear(x[more], self.down.weight[self.small :])
        return torch.cat([first, rest], -1)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The layer's outputs; the rest of the factors is multiplied for the tokens that need it only."""
        first = nn.functional.linear(x, self.down.weight[: self.small])
        output = nn.functional.linear(first, self.up.weight[:, : self.small], self.up.bias)
        more = self.needs_more(x, first)
        if bool(more.any()):
            rest = nn.functional.linear(x[more], self.down.weight[self.small :])
            output[more] += nn.functional.linear(rest, self.up.weight[:, self.small :])
        return output

    def extra_repr(self) -> str:
        """Sizes and ranks."""
        return f"in_features={self.in_features}, out_features={self.out_features}, ranks=({self.small}, {self.rank})"
