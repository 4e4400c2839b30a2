"""Linear layers in bfloat16 whose matrix lies in the order in which a CPU's kernels read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class PackedLinear(nn.Linear):
    """An `nn.Linear` with the same numbers, reordered once for oneDNN.

    A plain layer has its matrix reordered in every call, or read as it lies, which takes up to twice as long where
    few vectors are multiplied. The reordered matrix takes the place of the plain one, unless that is shared with
    another layer; `weight` and the state on disk are what they were.
    """

    _packed: Tensor

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The matrix, put into order at every access unless it is shared."""
        plain = self._parameters.get("weight")
        return self._packed.to_dense() if plain is None else plain

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The layer's outputs."""
        if torch.compiler.is_compiling():
            # A compiler cannot look into such a matrix; the graph is broken here.
            return cast(Tensor, _uncompiled(self, x))
        trains = torch.is_grad_enabled() and (x.requires_grad or (self.bias is not None and self.bias.requires_grad))
        if trains or x.dtype != torch.bfloat16:
            return F.linear(x, self.weight, self.bias)
        return _product(x, self._packed, self.bias)

    def __setattr__(self, name: str, value: Any) -> None:
        """Another matrix makes it a plain layer."""
        if name == "weight":
            unpack_linear(self)
        nn.Linear.__setattr__(self, name, value)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """Move or cast a plain layer: the order is this CPU's and this dtype's."""
        unpack_linear(self)
        return self._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        unpack_linear(self)
        self._load_from_state_dict(*args, **kwargs)

    def train(self, mode: bool = True) -> Any:
        """Training needs a plain matrix."""
        if mode:
            unpack_linear(self)
        return nn.Linear.train(self, mode)

    def __getstate__(self) -> dict[str, Any]:
        """Copies hold the plain matrix, and pack it again."""
        state = {key: value for key, value in self.__dict__.items() if key != "_packed"}
        weight = nn.Parameter(self.weight.detach(), requires_grad=False)
        return state | {"_parameters": {"weight": weight} | self._parameters}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy's matrix, reordered for it."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _pack(self, shared=False)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _uncompiled(layer: PackedLinear, x: Tensor) -> Tensor:
    return layer.forward(x)


def _product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")
    return product


def can_pack(linear: nn.Module) -> bool:
    """Whether this is a plain linear layer in bfloat16 on a CPU that multiplies such numbers."""
    # What replaces `forward` on the instance, as accelerate's hooks do, would not see another class.
    if type(linear) is not nn.Linear or "forward" in linear.__dict__:
        return False
    weight = linear.weight
    fits = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and weight.numel() > 0
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return fits and available and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_linears(model: nn.Module) -> None:
    """Reorder the matrix of every plain linear layer that can be, in place."""
    uses = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    for module in model.modules():
        if can_pack(module):
            _pack(module, shared=uses[id(module.weight)] > 1)


def unpack_linears(model: nn.Module) -> None:
    """Give every layer its plain matrix back, bit for bit."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            unpack_linear(module)


def unpack_linear(linear: nn.Linear) -> None:
    """Give a layer its plain matrix back, bit for bit."""
    weight = linear.weight
    linear.__dict__.pop("_packed")
    linear.__class__ = nn.Linear  # type: ignore[assignment]
    if linear._parameters.get("weight") is None:
        # The name was taken out of its place, which is the first.
        others = dict(linear._parameters)
        linear._parameters.clear()
        linear._parameters.update({"weight": nn.Parameter(weight, linear.__dict__.pop("_trains", True)), **others})


def _pack(linear: Any, *, shared: bool) -> None:
    plain = linear._parameters["weight"]
    linear.__dict__["_packed"] = torch.ops.mkldnn._reorder_linear_weight(plain.detach(), 1)
    linear.__class__ = PackedLinear
    if not shared:
        linear.__dict__["_trains"] = plain.requires_grad
        del linear._parameters["weight"]
