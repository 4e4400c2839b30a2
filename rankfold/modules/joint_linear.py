"""Linear layers that share their factors: each holds the few numbers that tell it from the others of its stack."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from rankfold.modules.factorized_linear import FactorizedLinear
from rankfold.modules.module_weight import ModuleWeight

JOINT_FORMS = ("cp", "tucker_stack", "tensor_train")


class SharedFactors(nn.Module):
    """What the layers of a stack have in common."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        form: str,
        ranks: tuple[int, ...],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Empty factors of one form."""
        super().__init__()

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        last = ranks[-1]
        self.down = empty(last, in_features)
        self.core = empty(*ranks) if form == "tucker_stack" else None
        carriages = (ranks[0], out_features, last) if form == "tensor_train" else (out_features, ranks[-2:][0])
        self.up = empty(*carriages)


class JointLinear(FactorizedLinear):
    """One layer of a stack: the first one holds the shared factors, the others refer to it.

    `cp`: `up (mix * (down x))`. `tucker_stack`: `up (sum of mix * core) (down x)`. `tensor_train`: the sum of
    `mix * up`, applied to `down x`. The matrix is never formed.
    """

    def __init__(  # noqa: PLR0913, PLR0917
        self,
        in_features: int,
        out_features: int,
        form: str,
        ranks: tuple[int, ...],
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        leader: JointLinear | None = None,
    ) -> None:
        """An empty layer; without `leader` it is the first of its stack."""
        super().__init__()
        self.in_features, self.out_features, self.form, self.ranks = in_features, out_features, form, ranks
        self.mix = nn.Parameter(torch.empty(ranks[0], device=device, dtype=dtype))
        self.own_bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        if leader is None:
            self.shared = SharedFactors(in_features, out_features, form, ranks, device, dtype)
        # In a tuple, so that it is not a part of this module, and is saved once.
        self._leader = (leader,)

    @property
    def factors(self) -> SharedFactors:
        """The factors of the stack."""
        (leader,) = self._leader
        return self.shared if leader is None else leader.shared

    def without_bias(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The matrix applied to `x`."""
        shared = self.factors
        hidden = F.linear(x, shared.down)
        if self.form == "tensor_train":
            return F.linear(hidden, torch.einsum("a,aor->or", self.mix, shared.up))
        if shared.core is not None:
            return F.linear(F.linear(hidden, torch.einsum("a,aoi->oi", self.mix, shared.core)), shared.up)
        return F.linear(hidden * self.mix, shared.up)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The layer's outputs."""
        output = self.without_bias(x)
        return output if self.own_bias is None else output + self.own_bias

    def product(self) -> Float[Tensor, "out in"]:
        """The matrix that the factors stand for, as an ordinary tensor."""
        identity = torch.eye(self.in_features, device=self.mix.device, dtype=self.mix.dtype)
        return self.without_bias(identity).T

    @property
    def weight(self) -> Tensor:
        """The product of the factors (out, in); `F.linear` with it runs the factors instead."""
        return ModuleWeight(self.mix, (self.out_features, self.in_features), self.without_bias, self.product)

    @property
    def bias(self) -> Tensor | None:
        """The bias, or `None`."""
        return self.own_bias

    def extra_repr(self) -> str:
        """Sizes, form and ranks."""
        return f"in_features={self.in_features}, out_features={self.out_features}, form={self.form}, ranks={self.ranks}"
