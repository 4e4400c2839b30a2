"""Moments of gradients against ordinary backpropagation, for every kind of model and loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import rankfold
from rankfold import calibrate, find_sites
from rankfold.calibration import IGNORED, calibrate_blocks, is_reached, masked_batches, summed_loss
from rankfold.modules import linear_at, matrix_of


def by_backpropagation(model: Any, names: list[str], batches: list[dict[str, Any]], loss: Any) -> dict[str, Any]:
    """Moments from one ordinary backward pass with hooks on the outputs."""
    second: dict[str, Any] = {}
    count: dict[str, int] = {}

    def watch(name: str) -> Any:
        def take(gradient: torch.Tensor) -> None:
            rows = gradient.reshape(-1, gradient.shape[-1]).double()
            second[name] = second.get(name, 0) + rows.T @ rows
            count[name] = count.get(name, 0) + len(rows)

        return lambda module, args, output: output.register_hook(take) and None

    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    for batch in batches:
        loss(model(**batch), batch).backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return {name: second[name] / count[name] for name in second}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert_masked", "opt", "t5", "mamba", "gpt_bigcode", "qwen2"])
def test_gradient_moments_are_those_of_backpropagation(name: str) -> None:
    model = tiny.build(name)
    batches = [tiny.inputs(model) for _ in range(2)]
    if not model.can_generate():
        batches = [{**batch, "labels": batch["input_ids"]} for batch in batches]
    sites = find_sites(model).select()
    names = [site.name for site in sites]
    expected = by_backpropagation(model, names, batches, summed_loss(model))
    measured = calibrate(model, sites, batches, loss=summed_loss(model))
    for site in names:
        gradients = measured[site].gradients
        assert gradients is not None
        torch.testing.assert_close(gradients.second, expected[site], rtol=1e-3, atol=1e-8)
        assert measured[site].inputs is not None


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "gpt_bigcode", "mixtral", "bert_masked"])
def test_moments_of_the_wider_side_may_be_measured_as_products(name: str) -> None:
    model = tiny.build(name)
    batches = [tiny.inputs(model) for _ in range(2)]
    if not model.can_generate():
        batches = [{**batch, "labels": batch["input_ids"]} for batch in batches]
    sites = find_sites(model).select()
    loss = summed_loss(model)
    whole = calibrate(model, sites, batches, loss=loss)
    kinds: set[str] = set()
    for block in calibrate_blocks(model, sites, batches, loss=loss, products=True):
        for path, found in block.moments.items():
            expected = whole[path]
            if not is_reached(expected, gradients=True):
                continue
            W, b = (None if part is None else part.double() for part in matrix_of(linear_at(model, path)))
            assert W is not None
            for one, other in ((found.inputs, expected.inputs), (found.gradients, expected.gradients)):
                assert one is not None
                assert other is not None
                assert one.vectors == other.vectors
                torch.testing.assert_close(one.mean, other.mean, rtol=1e-4, atol=1e-6)
                second = other.second.diagonal() if one.second.ndim == 1 else other.second
                torch.testing.assert_close(one.second, second, rtol=1e-4, atol=1e-7)
            if found.outputs is not None:
                kinds.add("outputs")
                covariance, mean = expected.output_moments(W, b, centred=True)
                torch.testing.assert_close(found.outputs.covariance, covariance, rtol=1e-3, atol=1e-6)
                torch.testing.assert_close(found.outputs.mean, mean, rtol=1e-4, atol=1e-6)
            if found.input_gradients is not None:
                kinds.add("input gradients")
                assert expected.gradients is not None
                product = W.T @ expected.gradients.second @ W
                torch.testing.assert_close(found.input_gradients.second, product, rtol=1e-3, atol=1e-8)
            assert found.share == expected.share
    assert kinds == {"outputs", "input gradients"}


def test_a_bias_beside_16_bits_does_not_hide_how_outputs_vary() -> None:
    model = tiny.build("gpt2")
    names = ["transformer.h.0.mlp.c_proj"]
    with torch.no_grad():
        model.get_submodule(names[0]).bias.fill_(100.0)
    batches = [tiny.inputs(model)]
    sites = find_sites(model).select(names)
    seen = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = model.to(dtype)
        loss = summed_loss(model)
        found = [block.moments for block in calibrate_blocks(model, sites, batches, loss=loss, products=True)]
        outputs = found[0][names[0]].outputs
        assert outputs is not None
        seen[dtype] = outputs.covariance
    assert (seen[torch.bfloat16] - seen[torch.float32]).norm() < 0.05 * seen[torch.float32].norm()


def test_parameters_collect_no_gradients_and_the_model_is_left_as_it_was() -> None:
    model = tiny.build("llama").train()
    batches = [tiny.inputs(model)]
    calibrate(model, find_sites(model).select(), batches, loss=summed_loss(model))
    assert model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_labels_may_be_drawn_from_the_model() -> None:
    model = tiny.build("llama")
    batches = [tiny.inputs(model)]
    sites = find_sites(model).select()
    first, again, other = (
        calibrate(model, sites, batches, loss=summed_loss(model, "sampled", seed))[sites[0].name].gradients
        for seed in (0, 0, 1)
    )
    assert first is not None
    assert again is not None
    assert other is not None
    torch.testing.assert_close(first.second, again.second)
    assert not torch.allclose(first.second, other.second)


def test_a_bare_encoder_is_probed_in_random_directions() -> None:
    model = tiny.build("bert_masked").base_model
    sites = find_sites(model).select()
    moments = calibrate(model, sites, [tiny.inputs(model)], loss=summed_loss(model, "sampled"))
    gradients = moments[sites[-1].name].gradients
    assert gradients is not None
    assert float(gradients.second.trace()) > 0


def test_masked_batches_score_the_masked_tokens_only() -> None:
    ids = torch.arange(2000).reshape(4, 500)
    (batch,) = masked_batches([{"input_ids": ids}], mask_token=7777, keep=range(100))
    scored = batch["labels"] != IGNORED
    assert 0.12 < float(scored.float().mean()) < 0.18
    assert bool((batch["input_ids"][scored] == 7777).all())
    assert bool((batch["labels"][scored] == ids[scored]).all())
    assert int(ids[scored].min()) >= 100


def test_text_labels_that_are_not_there_are_an_error() -> None:
    model = tiny.build("bert_masked")
    with pytest.raises(ValueError, match="needs labels in its batches.*labels='sampled'"):
        calibrate(model, find_sites(model).select(), [tiny.inputs(model)], loss=summed_loss(model))
    with pytest.raises(ValueError, match="must be `text` or `sampled`"):
        summed_loss(model, "guessed")


def test_infinite_gradients_are_an_error_with_the_site() -> None:
    model = tiny.build("llama")

    def exploding(output: Any, batch: Any) -> torch.Tensor:
        return output.logits.sum() * float("inf")

    with pytest.raises(ValueError, match=r"layers\.\d.*gradients: .* must be finite"):
        calibrate(model, find_sites(model).select(), [tiny.inputs(model)], loss=exploding)


def test_of_very_many_outputs_the_diagonal_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llama")
    batches = [tiny.inputs(model) for _ in range(2)]
    sites = find_sites(model).select(["lm_head"])
    loss = summed_loss(model)
    whole = calibrate(model, sites, batches, loss=loss)["lm_head"].gradients
    monkeypatch.setattr(rankfold.calibration.moments, "LARGEST", 100)
    diagonal = calibrate(model, sites, batches, loss=loss)["lm_head"].gradients
    assert whole is not None
    assert diagonal is not None
    torch.testing.assert_close(diagonal.second, whole.second.diagonal())
    assert diagonal.vectors == whole.vectors


@pytest.mark.parametrize(
    "budget", [{"keep": 0.9}, {"keep": 0.9, "effort": "best"}, {"bits": 4.5}, {"rank": 8}], ids=str
)
def test_a_head_of_very_many_outputs_is_compressed(
    budget: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.build("llama").save_pretrained(tmp_path / "dense")
    monkeypatch.setattr(rankfold.calibration.moments, "LARGEST", 100)
    model, _ = rankfold.load(tmp_path / "dense")
    ids = torch.randint(0, 128, (8, 16), generator=torch.Generator().manual_seed(0))
    plan = rankfold.compress(model, text=ids, sites=["lm_head", "mlp.down_proj"], batch_size=2, **budget)
    assert any("lm_head" in option.sites for option in plan.options)
    rankfold.save(model, None, tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(rankfold.load(tmp_path / "out")[0](ids).logits, model(ids).logits)
