"""A linear layer in few bits, and a low-rank layer beside it that makes good what rounding costs."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from rankfold.modules.factorized_linear import FactorizedLinear
from rankfold.modules.module_weight import ModuleWeight


class CompensatedLinear(FactorizedLinear):
    """`y = base(x) + up(down(x))`; all three are `nn.Linear` until a storage takes their place.

    >>> layer = CompensatedLinear(8, 6, (2,), bias=False)
    >>> layer(torch.ones(3, 8)).shape, layer.weight.shape, sum(p.numel() for p in layer.parameters())
    (torch.Size([3, 6]), torch.Size([6, 8]), 76)
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
        """An empty layer; `from_parts` makes a filled one."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        (self.rank,) = ranks
        self.base = nn.Linear(in_features, out_features, bias=False, device=device, dtype=dtype)
        self.down = nn.Linear(in_features, self.rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(self.rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def from_parts(cls, base: nn.Module, up: nn.Module, down: nn.Module) -> CompensatedLinear:
        """A layer of these layers, in whatever storage; the bias is that of `up`."""
        layer = cls(down.in_features, up.out_features, (up.in_features,), up.bias is not None, device="meta")  # type: ignore[arg-type]
        layer.base, layer.up, layer.down = base, up, down  # type: ignore[assignment]
        return layer

    def hidden(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch rank"]:
        """What the last factor reads."""
        hidden: Tensor = self.down(x)
        return hidden

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The layer's outputs."""
        output: Tensor = self.base(x) + self.up(self.hidden(x))
        return output

    def without_bias(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The matrix applied to `x`."""
        return self.base(x) + F.linear(self.hidden(x), self.up.weight)  # type: ignore[no-any-return]

    @property
    def weight(self) -> Tensor:
        """The sum of the matrix and the product of the factors (out, in), which `F.linear` runs as they are."""
        shape = (self.out_features, self.in_features)
        return ModuleWeight(self.up.weight, shape, self.without_bias, self.product)

    def product(self) -> Float[Tensor, "out in"]:
        """The matrix that the layers stand for, as an ordinary tensor."""
        return self.base.weight + self.up.weight @ self.down.weight

    def extra_repr(self) -> str:
        """Sizes and rank."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
