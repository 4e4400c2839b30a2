"""Stacks of matrices decomposed together, in place, and saved as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rankfold.compression.replace import finish
from rankfold.errors import InputError
from rankfold.factorization import STACK_METHODS, JointFactors
from rankfold.modules import JointLinear, linear_at, linear_shape, matrix_of
from rankfold.plan import Option, Plan


@torch.no_grad()
def compress_stacks(
    model: Any, stacks: Sequence[Sequence[str]], form: str, ranks: tuple[int, ...], seed: int = 0
) -> tuple[Plan, list[JointFactors]]:
    """Decompose matrices of one shape together, in place.

    Args:
        model: A transformers model.
        stacks: Paths of the layers of each stack, such as the gate and up projections of a block.
        form: A key of `rankfold.factorization.STACK_METHODS`.
        ranks: Of every stack: `cp` (rank,), `tensor_train` (rank_stack, rank), `tucker_stack` (stack, out, in).
        seed: Seed of random starts.

    Returns:
        The plan, with an option for each stack, and the factors with their errors.

    Raises:
        ValueError: If the form is unknown, matrices of a stack differ in shape, or one is not finite.
    """
    if form not in STACK_METHODS:
        raise InputError(f"Stacks can be decomposed as {', '.join(STACK_METHODS)}, but got {form!r}.")
    options, made = [], []
    for names in stacks:
        linears = [linear_at(model, name) for name in names]
        matrices = [matrix_of(linear)[0] for linear in linears]
        if len({matrix.shape for matrix in matrices}) != 1:
            shapes = {name: tuple(matrix.shape) for name, matrix in zip(names, matrices, strict=True)}
            raise InputError(f"Matrices of a stack must have one shape, but got {shapes}.")
        factors = STACK_METHODS[form](torch.stack(matrices), ranks, seed)
        leader: JointLinear | None = None
        for name, linear, mix in zip(names, linears, factors.mix, strict=True):
            layer = _layer(linear, factors, mix, form, ranks, leader)
            leader = leader or layer
            model.set_submodule(name, layer)
        biases = sum(linear.bias.numel() for linear in linears if linear.bias is not None)
        parameters = factors.parameters() + biases
        options.append(
            Option(
                sites=tuple(names), form=form, method=form, ranks=ranks, bias=linears[0].bias is not None,
                parameters=parameters, bytes=parameters * linears[0].weight.element_size(),
            )
        )  # fmt: skip
        made.append(factors)
    plan = Plan(options=tuple(options), method=form, allocation="stacks", seed=seed)
    return finish(model, plan), made


def _layer(
    linear: Any, factors: JointFactors, mix: torch.Tensor, form: str, ranks: tuple[int, ...], leader: JointLinear | None
) -> JointLinear:
    out_features, in_features = linear_shape(linear)
    dtype, device = linear.weight.dtype, linear.weight.device
    layer = JointLinear(in_features, out_features, form, ranks, linear.bias is not None, device, dtype, leader)
    layer.mix = nn.Parameter(mix.to(device, dtype).clone())
    if linear.bias is not None:
        layer.own_bias = nn.Parameter(linear.bias.detach().clone())
    if leader is None:
        for name, part in factors.shared.items():
            setattr(layer.shared, name, nn.Parameter(part.to(device, dtype).contiguous()))
    return layer
