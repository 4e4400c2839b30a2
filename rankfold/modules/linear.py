"""What a linear layer is, known here alone: `nn.Linear`, GPT-2's transposed `Conv1D`, a library's, one expert."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rankfold.errors import InputError
from rankfold.modules.linear_stack import LinearStack
from rankfold.precision import float64_device


def is_transposed(module: nn.Module) -> bool:
    """Whether a layer stores its weight as (in, out): GPT-2's `Conv1D`, which is told by its name and its `nf`."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer; libraries that quantize derive theirs from `nn.Linear`."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def linear_shape(linear: Any) -> tuple[int, int]:
    """(out, in) of a linear or factorized layer."""
    if is_transposed(linear):
        return linear.weight.shape[1], linear.weight.shape[0]
    return linear.out_features, linear.in_features


def stored_matrix(linear: Any) -> Tensor:
    """The weight (out, in) of a linear layer as it is stored, sharing its memory."""
    weight: Tensor = linear.weight
    return weight.T if is_transposed(linear) else weight


def matrix_of(linear: Any) -> tuple[Tensor, Tensor | None]:
    """Weight (out, in) and bias of a linear layer in float32 at least, on a device that has float64."""
    weight, bias = stored_matrix(linear).detach(), linear.bias
    place, dtype = float64_device(weight.device), torch.promote_types(weight.dtype, torch.float32)
    return weight.to(place).to(dtype), None if bias is None else bias.detach().to(place).to(dtype)


def set_matrix(linear: Any, matrix: Tensor) -> None:
    """Give a linear layer another matrix (out, in), in place and in its own dtype."""
    with torch.no_grad():
        linear.weight.copy_(matrix.T if is_transposed(linear) else matrix)


def linear_at(model: nn.Module, path: str) -> Any:
    """The linear module at a path; a slice of a 3-D parameter becomes a module of its own first.

    Raises:
        ValueError: If the model has nothing at this path.
    """
    if not has_layer(model, path):
        raise InputError(f"{path}: {type(model).__name__} has no such layer. Was the plan made for another model?")
    parent_path, _, name = path.rpartition(".")
    owner_path, _, stack_name = parent_path.rpartition(".")
    owner = model.get_submodule(owner_path)
    stacked = getattr(owner, stack_name, None)
    if name.isdigit() and isinstance(stacked, nn.Parameter):
        delattr(owner, stack_name)
        setattr(owner, stack_name, LinearStack.from_parameter(stacked))
    return model.get_submodule(path)


def has_layer(model: nn.Module, path: str) -> bool:
    """Whether a model has a layer, or a slice of a stack, at a path."""
    owner: Any = model
    for name in path.split("."):
        if isinstance(owner, nn.Parameter):
            return name.isdigit() and int(name) < len(owner)
        if isinstance(owner, LinearStack) and name.isdigit():
            owner = owner._modules.get(name)
        else:
            owner = getattr(owner, name, None)
        if owner is None:
            return False
    return True
