"""The loop over the blocks."""

from __future__ import annotations

import pytest
import tiny
import torch

from rankfold import find_sites
from rankfold.calibration import walk_blocks, walk_blocks_back
from rankfold.modules import linear_at


def test_blocks_come_in_order_and_every_batch_passes_each() -> None:
    model = tiny.build("t5")
    passed: list[str] = []
    batches = [tiny.inputs(model, seed=seed) for seed in range(3)]
    paths = []
    for step in walk_blocks(model, batches, on_step=lambda: passed.append("batch")):
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
    model = tiny.albert()
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


CHAINS = [name for name in tiny.ARCHITECTURES if name not in {"t5", "bert_masked", "bert_classifier", "roberta"}]


@pytest.mark.parametrize("name", CHAINS)
def test_a_walk_back_gives_the_gradients_of_ordinary_backpropagation(name: str) -> None:
    """Of every parameter of the blocks, and at the output of every layer."""
    model, same = tiny.build(name, torch.float64), tiny.build(name, torch.float64)
    batches = [
        {**tiny.inputs(model, seed=seed), "labels": tiny.inputs(model, seed=seed)["input_ids"]} for seed in (0, 1)
    ]
    for batch in batches:
        same(**batch).loss.backward()
    sites = [site for site in find_sites(model).select() if "experts" not in site.kind]
    at_outputs: dict[str, list[torch.Tensor]] = {site.name: [] for site in sites}
    for site in sites:

        def watch(_: object, __: object, output: torch.Tensor, name: str = site.name) -> None:
            if output.requires_grad:
                output.register_hook(at_outputs[name].append)

        linear_at(model, site.name).register_forward_hook(watch)
    paths = [step.path for step in walk_blocks_back(model, batches, lambda output, _: output.loss)]
    assert paths == [step.path for step in walk_blocks(same, batches)][::-1]
    expected = dict(same.named_parameters())
    in_blocks = {key: value for key, value in model.named_parameters() if any(key.startswith(path) for path in paths)}
    assert in_blocks
    for key, parameter in in_blocks.items():
        if expected[key].grad is not None:
            torch.testing.assert_close(parameter.grad, expected[key].grad, rtol=1e-5, atol=1e-7)
    assert all(len(gradients) == len(batches) for gradients in at_outputs.values())


def test_a_walk_back_through_two_stacks_is_an_error() -> None:
    with pytest.raises(ValueError, match="has an encoder and a decoder"):
        next(walk_blocks_back(tiny.build("t5"), [tiny.inputs(tiny.build("t5"))], lambda output, _: output.loss))
