"""A linear module seen as its weight: code that reads `.weight` gets the matrix, `F.linear` calls the module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only


class ModuleWeight(torch.Tensor):
    """A tensor without storage that stands for the matrix of a factorized module.

    Models read weights directly: T5 asks for the dtype, Mamba multiplies by the matrix, experts index a stack
    and call `F.linear`. Asking for dtype, device or shape costs nothing here, `F.linear` runs the factors, and
    any other operation computes the product first, differentiably.
    """

    _is_hf_initialized = True
    """What transformers calls a weight that it must not draw anew while loading, as GPTBigCode's `c_proj` is: drawn
    anew are the factors, if anything."""
    _apply: Callable[[Tensor], Tensor]
    _matrix: Callable[[], Tensor]

    @staticmethod
    def __new__(
        cls, like: Tensor, shape: tuple[int, int], apply: Callable[[Tensor], Tensor], matrix: Callable[[], Tensor]
    ) -> ModuleWeight:
        """A weight of `shape` with the dtype and device of `like`."""
        weight: ModuleWeight = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        weight._apply = apply
        weight._matrix = matrix
        return weight

    def __init__(self, *args: Any) -> None:
        """Everything is set by `__new__`."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Metadata as it is, `F.linear` through the module, anything else on the product."""
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is F.linear:
            return _linear(*args, **kwargs)
        args, kwargs = tree_map_only(cls, lambda weight: weight._matrix(), (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The product for whatever reaches the dispatcher directly."""
        args, kwargs = tree_map_only(cls, lambda weight: weight._matrix(), (args, kwargs or {}))
        return func(*args, **kwargs)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` whose weight, or whose input, is a module's weight."""
    if isinstance(input, ModuleWeight):
        return F.linear(input._matrix(), weight, bias)
    assert isinstance(weight, ModuleWeight)
    output = weight._apply(input)
    return output if bias is None else output + bias


_METADATA = {
    *(getattr(torch.Tensor, name).__get__ for name in ("dtype", "device", "shape", "ndim", "layout", "is_cuda")),
    *(torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel),
}
