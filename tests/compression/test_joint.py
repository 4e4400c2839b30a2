"""Stacks decomposed together: exact at full rank, as large as declared, saved and run without their matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import build

from rankfold.checkpoint import export_dense, load_model, save
from rankfold.compression import compress_stacks
from rankfold.cost import parameter_count
from rankfold.factorization import STACK_METHODS, tucker_stack
from rankfold.modules import JointLinear

FULL = {"cp": (48,), "tucker_stack": (3, 6, 8), "tensor_train": (3, 8)}
SMALL = {"cp": (5,), "tucker_stack": (2, 4, 5), "tensor_train": (2, 4)}


def stack() -> torch.Tensor:
    return torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("form", STACK_METHODS)
def test_full_rank_is_exact_and_the_error_is_the_one_claimed(form: str) -> None:
    X = stack()
    assert STACK_METHODS[form](X, FULL[form], 0).error < 1e-4 * float(X.square().sum())
    found = STACK_METHODS[form](X, SMALL[form], 0)
    assert found.error == pytest.approx(float((found.product() - X).square().sum()), rel=1e-6)
    assert 0 < found.error < float(X.square().sum())


def test_each_form_stores_what_its_ranks_say() -> None:
    X = stack()
    assert STACK_METHODS["cp"](X, (5,), 0).parameters() == 5 * (3 + 6 + 8)
    assert STACK_METHODS["tucker_stack"](X, (2, 4, 5), 0).parameters() == 3 * 2 + 2 * 4 * 5 + 6 * 4 + 5 * 8
    assert STACK_METHODS["tensor_train"](X, (2, 4), 0).parameters() == 3 * 2 + 2 * 6 * 4 + 4 * 8


def test_the_tensor_train_is_within_the_root_of_the_best_errors_of_its_cuts() -> None:
    X = stack()
    found = STACK_METHODS["tensor_train"](X, (2, 4), 0)
    cuts = (X.flatten(1), X.flatten(0, 1))
    tails = [float(torch.linalg.svdvals(cut)[rank:].square().sum()) for cut, rank in zip(cuts, (2, 4), strict=True)]
    assert max(tails) - 1e-9 <= found.error <= sum(tails) + 1e-9
    assert STACK_METHODS["tucker_stack"](X, (2, 4, 5), 0).error == pytest.approx(tucker_stack(X, (2, 4, 5)).error)


def test_cp_depends_on_its_seed_and_says_so_in_the_error() -> None:
    errors = {round(STACK_METHODS["cp"](stack(), (6,), seed).error, 8) for seed in range(5)}
    assert len(errors) > 1


@pytest.mark.parametrize("form", STACK_METHODS)
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_stack_is_saved_and_runs_as_it_was(form: str, name: str, tmp_path: Path) -> None:
    model: Any = build(name)
    before = parameter_count(model)
    ends = ("self_attn.q_proj", "self_attn.o_proj" if name == "llama" else "self_attn.out_proj")
    paths = [path for path, _ in model.named_modules() if path.endswith(ends)]
    stacks = [[path for path in paths if path.endswith(end)] for end in ends]
    dense = [sum(p.numel() for path in group for p in model.get_submodule(path).parameters()) for group in stacks]
    ranks = {"cp": (6,), "tucker_stack": (2, 6, 6), "tensor_train": (1, 6)}[form]
    plan, factors = compress_stacks(model, stacks, form, ranks)
    assert before - parameter_count(model) == sum(dense) - plan.parameters
    layer = model.get_submodule(stacks[0][1])
    assert isinstance(layer, JointLinear)
    torch.testing.assert_close(layer.product(), factors[0].product()[1], atol=1e-5, rtol=1e-4)
    x = torch.randn(2, layer.in_features)
    expected = torch.nn.functional.linear(x, layer.product(), layer.bias)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)
    ids = torch.arange(3, 11)[None]
    save(model, None, tmp_path / "joint")
    loaded = load_model(tmp_path / "joint", dtype=torch.float32)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert parameter_count(loaded) == parameter_count(model)
    export_dense(loaded, None, tmp_path / "dense")
    torch.testing.assert_close(
        load_model(tmp_path / "dense", dtype=torch.float32)(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4
    )


def test_what_is_no_stack_says_so() -> None:
    model = build("llama")
    with pytest.raises(ValueError, match="must have one shape"):
        compress_stacks(model, [["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"]], "cp", (2,))
    with pytest.raises(ValueError, match="decomposed as tucker_stack, cp, tensor_train"):
        compress_stacks(model, [], "parafac", (2,))


def test_a_second_compression_keeps_the_first(tmp_path: Path) -> None:
    model: Any = build("llama")
    for block in range(2):
        paths = [f"model.layers.{block}.mlp.{name}" for name in ("gate_proj", "up_proj")]
        compress_stacks(model, [paths], "cp", (6,))
    save(model, None, tmp_path / "both")
    ids = torch.arange(3, 11)[None]
    assert torch.equal(load_model(tmp_path / "both", dtype=torch.float32)(ids).logits, model(ids).logits)


def test_ranks_that_a_train_cannot_have_are_refused() -> None:
    with pytest.raises(ValueError, match="rank must lie between 1 and"):
        STACK_METHODS["tensor_train"](stack(), (4, 8), 0)
