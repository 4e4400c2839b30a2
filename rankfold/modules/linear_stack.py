"""A stack of matrices that mixture-of-experts models keep in one 3-D parameter, as separate linear layers."""

from __future__ import annotations

import itertools
import operator

import torch
from torch import Tensor, nn

from rankfold.modules.module_weight import ModuleWeight


class LinearStack(nn.ModuleList):
    """Linear layers that stand where a parameter of shape (experts, out, in) stood.

    Model code writes `F.linear(x, stack[i])`; indexing gives a weight that runs the i-th layer, dense or
    factorized, of any rank. The stock grouped kernels need one tensor, so the model must use its eager experts.
    """

    dtype: torch.dtype = torch.get_default_dtype()
    """Of the parameter, in which layers in few bits compute too."""

    @classmethod
    def from_parameter(cls, stacked: nn.Parameter) -> LinearStack:
        """One `nn.Linear` per slice; the slices stay views of the stacked parameter."""
        made = cls([_layer_around(nn.Parameter(matrix, stacked.requires_grad)) for matrix in stacked.detach()])
        made.dtype = stacked.dtype
        return made

    def __getitem__(self, index: int | Tensor) -> Tensor:  # type: ignore[override]
        """The weight of one layer."""
        layer = self._modules[str(operator.index(index) % len(self))]
        assert layer is not None
        like: Tensor | None = next((part for part in layer.parameters() if part.is_floating_point()), None)
        if like is None:
            # A layer in few bits may have no parameter that says in which dtype it computes.
            place = next(itertools.chain(layer.parameters(), layer.buffers())).device
            like = torch.empty(0, dtype=self.dtype, device=place)
        return ModuleWeight(
            like,
            (layer.out_features, layer.in_features),  # type: ignore[arg-type]
            layer,
            lambda: layer.weight,  # type: ignore[arg-type, return-value]
        )  # type: ignore[return-value]


def _layer_around(weight: nn.Parameter) -> nn.Linear:
    """An `nn.Linear` without bias around an existing parameter."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    linear.weight = weight
    return linear


def restack(model: nn.Module) -> None:
    """Give stacks whose layers are all dense back their one parameter."""
    for path, stack in list(model.named_modules()):
        if isinstance(stack, LinearStack) and all(type(layer) is nn.Linear for layer in stack.children()):
            owner_path, _, name = path.rpartition(".")
            owner = model.get_submodule(owner_path)
            stacked = torch.stack([parameter.detach() for parameter in stack.parameters()])
            delattr(owner, name)
            setattr(owner, name, nn.Parameter(stacked))
