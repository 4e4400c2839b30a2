"""The loop over the blocks."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import AlbertConfig, AlbertModel

from rankfold.calibration import walk_blocks


def test_blocks_come_in_order_and_every_batch_passes_each() -> None:
    model = tiny.build("t5")
    passed: list[str] = []
    batches = [tiny.inputs(model, seed=seed) for seed in range(3)]
    paths = []
    for step in walk_blocks(model, batches, on_batch=lambda: passed.append("batch")):
        paths.append(step.path)
        assert len(step.calls) == 3
    assert paths == [f"{stack}.block.{i}" for stack in ("encoder", "decoder") for i in (0, 1)]
    assert len(passed) == 3 * (len(paths) + 1)


def test_before_run_a_block_may_be_called_and_changed() -> None:
    """Compression as a step of the walk: later blocks read what the changed block gives."""
    model = tiny.build("llama")
    expected = tiny.build("llama")
    batches = [tiny.inputs(model)]
    with torch.no_grad():
        expected.model.layers[0].mlp.down_proj.weight.mul_(0.5)
    inputs: dict[str, torch.Tensor] = {}
    for step in walk_blocks(model, batches):
        call = step.calls[0]
        with torch.no_grad():
            call.module(*call.args, **call.kwargs)
        inputs[step.path] = call.args[0]
        if step.path == "model.layers.0":
            with torch.no_grad():
                model.model.layers[0].mlp.down_proj.weight.mul_(0.5)
        step.run()
        assert step.calls == []
    seen: list[torch.Tensor] = []
    expected.model.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        expected(**batches[0])
    assert torch.equal(inputs["model.layers.1"], seen[0])


def test_gradients_may_be_computed_between_blocks() -> None:
    model = tiny.build("llama")
    for step in walk_blocks(model, [tiny.inputs(model)]):
        assert torch.is_grad_enabled()
        call = step.calls[0]
        assert not call.args[0].requires_grad


def test_a_block_that_is_called_again_comes_again() -> None:
    config = AlbertConfig(
        vocab_size=64,
        embedding_size=8,
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=3,
    )
    model = AlbertModel(config).eval()
    steps = [step.path for step in walk_blocks(model, [{"input_ids": torch.ones(1, 4, dtype=torch.long)}])]
    assert steps == ["encoder.albert_layer_groups.0"] * 3


def test_a_walk_that_is_left_early_leaves_no_hooks() -> None:
    model = tiny.build("llama")
    for _ in walk_blocks(model, [tiny.inputs(model)]):
        break
    assert not any(module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        model(**tiny.inputs(model))


def test_no_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        list(walk_blocks(tiny.build("llama"), []))


def test_an_error_inside_the_model_comes_out_of_the_walk() -> None:
    with pytest.raises(IndexError):
        list(walk_blocks(tiny.build("llama"), [{"input_ids": torch.full((1, 4), 9999)}]))
