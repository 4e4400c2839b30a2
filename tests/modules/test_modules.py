"""Factorized modules behave as a user of nn.Linear expects."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rankfold.modules import FORMS, FactorizedLinear, LinearStack, LowRankLinear, PivotedLinear, TuckerLinear

MAKERS: dict[str, Callable[..., FactorizedLinear]] = {
    "low_rank": lambda **settings: LowRankLinear(8, 6, (3,), **settings),
    "tucker": lambda **settings: TuckerLinear(8, 6, (3, 2), **settings),
    "pivoted": lambda **settings: PivotedLinear(8, 6, (3,), **settings),
}
MADE = [name for name, form in FORMS.items() if form.make is not None]
forms = pytest.mark.parametrize("form", MADE)


def test_every_form_is_tested() -> None:
    assert set(MAKERS) == set(MADE)


@forms
@pytest.mark.parametrize("bias", [True, False])
def test_the_dense_layer_gives_the_same_outputs(form: str, bias: bool) -> None:
    layer = MAKERS[form](bias=bias)
    dense, x = layer.to_dense(), torch.randn(2, 5, 8)
    assert isinstance(dense, nn.Linear)
    assert (dense.bias is not None) == (layer.bias is not None) == bias
    torch.testing.assert_close(dense(x), layer(x))
    assert dense.weight.requires_grad


@forms
def test_weight_is_the_product(form: str) -> None:
    layer, x = MAKERS[form](), torch.randn(5, 8)
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    assert (weight.dtype, weight.shape, weight.device) == (torch.float32, (6, 8), torch.device("cpu"))
    torch.testing.assert_close(weight.clone(), layer.product())
    torch.testing.assert_close(weight @ x.T, layer.product() @ x.T)
    torch.testing.assert_close(F.linear(x, weight, layer.bias), layer(x))
    torch.testing.assert_close(F.linear(input=x, weight=weight), x @ layer.product().T)
    assert torch.equal(weight.to(torch.float64), layer.product().double())
    torch.linalg.matrix_norm(weight).backward()
    assert layer.up.weight.grad is not None


@forms
def test_reading_the_dtype_of_the_weight_computes_nothing(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = MAKERS[form]()
    monkeypatch.setattr(type(layer), "product", lambda self: pytest.fail("the product was computed"))
    assert layer.weight.dtype == torch.float32
    assert F.linear(torch.randn(2, 8), layer.weight).shape == (2, 6)


@forms
def test_gradients_are_those_of_the_dense_layer(form: str) -> None:
    layer, x = MAKERS[form](), torch.randn(5, 8, requires_grad=True)
    dense, x_dense = layer.to_dense(), x.detach().clone().requires_grad_()
    layer(x).square().sum().backward()
    dense(x_dense).square().sum().backward()
    torch.testing.assert_close(x.grad, x_dense.grad)
    assert all(parameter.grad is not None for parameter in layer.parameters())
    if form == "pivoted":  # its bias lies in both parts: that of the pivots reaches the other rows too
        rest = layer.bias is not None and layer.up.bias.grad
        torch.testing.assert_close(rest, dense.bias.grad[3:])
    else:
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad)


@forms
def test_state_dict_deepcopy_dtype_and_meta(form: str, tmp_path: Path) -> None:
    layer, other, x = MAKERS[form](), MAKERS[form](), torch.randn(3, 8)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    empty = MAKERS[form](device="meta")
    assert empty.weight.is_meta
    assert empty.to_empty(device="cpu")(x).shape == (3, 6)
    assert "rank" in repr(layer)


@forms
def test_factors_are_plain_linear_layers_that_other_libraries_find(form: str) -> None:
    children = [module for module in MAKERS[form]().modules() if isinstance(module, nn.Linear)]
    assert len(children) == (3 if form == "tucker" else 2)
    assert all(type(child) is nn.Linear for child in children)


COMPILES = """
import torch
from rankfold.modules import LowRankLinear, PivotedLinear, TuckerLinear
for layer in (LowRankLinear(8, 6, (3,)), TuckerLinear(8, 6, (3, 2)), PivotedLinear(8, 6, (3,))):
    x = torch.randn(4, 8)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))
"""


def test_forms_compile_without_a_graph_break() -> None:
    """In a process of its own: the shape checks that wrap functions during tests do not compile."""
    run = subprocess.run([sys.executable, "-c", COMPILES], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize("shape", [(8, 6), (6, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_folded_core_leaves_the_outputs_and_fewer_parameters(shape: tuple[int, int], bias: bool) -> None:
    layer, x = TuckerLinear(*shape, (3, 2), bias=bias), torch.randn(5, shape[0])
    folded = layer.fold()
    torch.testing.assert_close(folded(x), layer(x))
    assert (folded.bias is not None) == bias
    assert folded.rank == (3 if shape[1] < shape[0] else 2)


def test_from_factors_holds_them() -> None:
    up, core, down, bias = torch.randn(6, 3), torch.randn(3, 2), torch.randn(2, 8), torch.randn(6)
    torch.testing.assert_close(TuckerLinear.from_factors(up, core, down, bias).product(), up @ core @ down)
    layer = LowRankLinear.from_factors(up[:, :2].double(), down.double())
    assert layer.bias is None
    assert layer.weight.dtype == torch.float64


def test_a_stack_stands_for_its_parameter() -> None:
    parameter = nn.Parameter(torch.randn(3, 6, 8))
    stack, x = LinearStack.from_parameter(parameter), torch.randn(5, 8)
    for index in (0, torch.tensor(2), -1):
        torch.testing.assert_close(F.linear(x, stack[index]), x @ parameter[index].T)
    calls: list[int] = []
    stack.get_submodule("1").register_forward_hook(lambda *_: calls.append(1))
    F.linear(x, stack[1])
    assert calls == [1]
    assert stack.get_submodule("0").weight.data_ptr() == parameter.data_ptr()
    stack.set_submodule("1", LowRankLinear(8, 6, (2,), bias=False))
    assert F.linear(x, stack[1]).shape == (5, 6)
    torch.testing.assert_close(stack[1] @ x.T, stack.get_submodule("1").product() @ x.T)
