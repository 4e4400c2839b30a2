"""What every factorized linear layer offers to code that expects an `nn.Linear`."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from rankfold.modules.module_weight import ModuleWeight


class FactorizedLinear(nn.Module):
    """A linear layer `y = up(hidden(x))` whose matrix is a product; each form says what `hidden` is."""

    in_features: int
    out_features: int
    up: nn.Linear
    is_pair: ClassVar[bool] = False
    """Whether `up` reads what `down` gives and nothing else, so that it can be fitted to what rounding made of it."""
    tolerates_few_bits: ClassVar[bool] = True
    """Whether 4 bits and fewer cost it no more than a dense layer (docs/lord.md)."""
    structure: ClassVar[tuple[str, ...]] = ()
    """Non-numeric attributes, as text: a plan stores them, and loading passes them to the constructor."""

    def hidden(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch rank"]:
        """What the last factor reads."""
        raise AssertionError("each form defines it")

    def product(self) -> Float[Tensor, "out in"]:
        """The matrix that the factors stand for, as an ordinary tensor."""
        raise AssertionError("each form defines it")

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The layer's outputs."""
        output: Tensor = self.up(self.hidden(x))
        return output

    def without_bias(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The matrix applied to `x`."""
        return F.linear(self.hidden(x), self.up.weight)

    @property
    def weight(self) -> Tensor:
        """The product of the factors (out, in); `F.linear` with it runs the factors instead."""
        shape = (self.out_features, self.in_features)
        return ModuleWeight(self.up.weight, shape, self.without_bias, self.product)

    @property
    def bias(self) -> Tensor | None:
        """The bias, or `None`."""
        return self.up.bias

    def to_dense(self) -> nn.Linear:
        """An `nn.Linear` with the same outputs, in the same dtype and on the same device."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        dense.weight = nn.Parameter(self.product().detach())
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone())
        return dense
