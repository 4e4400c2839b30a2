"""Ranks chosen late: a part of a nested checkpoint is its static twin, and an adaptive layer's cost is what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import build

from rankfold import allocate, calibrate, factorize, find_sites
from rankfold.calibration import load_corpus, make_batches, predicted_losses, random_windows, summed_loss, token_stream
from rankfold.checkpoint import load_model, load_tokenizer, save
from rankfold.compression import adapt, nest, shrink
from rankfold.cost import parameter_count
from rankfold.modules import AdaptiveLinear


@pytest.fixture(scope="module")
def setting(bundled: Path) -> dict[str, Any]:
    model, tokenizer = load_model(bundled, dtype=torch.float32), load_tokenizer(bundled)
    stream = token_stream(tokenizer, load_corpus("bundled:calibration").texts)
    batches = make_batches(model, random_windows(stream, 8, 64, 0), 4)
    sites = find_sites(model).select()
    statistics = calibrate(model, sites, batches, loss=summed_loss(model, "text", 0))
    losses = predicted_losses(model, sites, statistics, "kfac")
    return {"folder": bundled, "tokenizer": tokenizer, "batches": batches, "statistics": statistics, "losses": losses}


def fresh(setting: dict[str, Any]) -> tuple[Any, Any]:
    model = load_model(setting["folder"], dtype=torch.float32)
    return model, find_sites(model).select()


IDS = torch.arange(3, 27)[None]


def test_a_part_of_a_nested_checkpoint_is_its_static_twin(setting: dict[str, Any], tmp_path: Path) -> None:
    nested, sites = fresh(setting)
    before = nested(IDS).logits
    nest(nested, sites, setting["statistics"])
    torch.testing.assert_close(nested(IDS).logits, before, atol=2e-3, rtol=1e-3)
    save(nested, setting["tokenizer"], tmp_path / "nested")
    for keep in (0.9, 0.6):
        loaded = load_model(tmp_path / "nested", dtype=torch.float32)
        plan = shrink(loaded, keep)
        assert plan.parameters <= keep * sum(site.parameters for site in sites)
        static, own = fresh(setting)
        choice = {"keep": keep, "method": "kfac", "form": "low_rank", "allocation": "knapsack"}
        twin = factorize(static, allocate(own, losses=setting["losses"], **choice), setting["statistics"])
        ranks = {option.sites: option.ranks for option in plan.options}
        assert {option.sites: option.ranks for option in twin.options} == ranks
        torch.testing.assert_close(loaded(IDS).logits, static(IDS).logits, atol=2e-3, rtol=1e-3)
        save(loaded, setting["tokenizer"], tmp_path / f"keep{keep}")
        again = load_model(tmp_path / f"keep{keep}", dtype=torch.float32)
        assert torch.equal(again(IDS).logits, loaded(IDS).logits)
        with pytest.raises(ValueError, match="Only a nested model"):
            shrink(again, 0.5)


def test_an_adaptive_layer_takes_the_rank_that_each_token_needs(setting: dict[str, Any], tmp_path: Path) -> None:
    model, sites = fresh(setting)
    plan = factorize(
        model,
        allocate(sites, rank=16, method="kfac", form="low_rank"),
        setting["statistics"],
    )
    whole = model(IDS).logits
    plan = adapt(model, plan, setting["batches"], small=0.5, share=1.0)
    torch.testing.assert_close(model(IDS).logits, whole, atol=1e-4, rtol=1e-4)
    layer = next(module for module in model.modules() if isinstance(module, AdaptiveLinear))
    layer.threshold.fill_(0.0)
    x = torch.randn(3, 5, layer.in_features)
    expected = torch.nn.functional.linear(
        torch.nn.functional.linear(x, layer.down.weight[: layer.small]), layer.up.weight[:, : layer.small], layer.bias
    )
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.without_bias(x), expected - (0 if layer.bias is None else layer.bias))
    save(model, setting["tokenizer"], tmp_path / "adaptive")
    again = load_model(tmp_path / "adaptive", dtype=torch.float32)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert parameter_count(again) == parameter_count(model)


def test_thresholds_give_the_share_of_tokens_that_was_asked_for(setting: dict[str, Any]) -> None:
    model, sites = fresh(setting)
    plan = factorize(model, allocate(sites, rank=16, method="kfac", form="low_rank"), setting["statistics"])
    adapt(model, plan, setting["batches"], small=0.25, share=0.3)
    counts: list[tuple[int, int]] = []

    def hook(layer: AdaptiveLinear, args: Any) -> None:
        first = torch.nn.functional.linear(args[0], layer.down.weight[: layer.small])
        more = layer.needs_more(args[0], first)
        counts.append((int(more.sum()), more.numel()))

    layer = model.model.layers[0].self_attn.q_proj
    layer.register_forward_pre_hook(hook)
    for batch in setting["batches"]:
        model(**batch)
    taken, total = map(sum, zip(*counts, strict=True))
    assert taken / total == pytest.approx(0.3, abs=0.02)


def test_what_cannot_be_adapted_says_why(setting: dict[str, Any]) -> None:
    model, sites = fresh(setting)
    plan = factorize(model, allocate(sites, rank=16, method="svd"))
    with pytest.raises(ValueError, match="between 0 and 1"):
        adapt(model, plan, setting["batches"], small=1.5)
    model, sites = fresh(setting)
    plan = factorize(model, allocate(sites, rank=16, method="tucker"))
    with pytest.raises(ValueError, match="no low-rank site"):
        adapt(model, plan, setting["batches"])
    with pytest.raises(ValueError, match="Only a nested model"):
        shrink(model, 0.5)


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "opt"])
def test_other_layers_are_nested_cut_saved_and_loaded(name: str, tmp_path: Path) -> None:
    if name == "mixtral" and transformers.__version__.startswith("4."):
        pytest.skip("transformers 4 has no stacked experts")
    model: Any = build(name)
    ids = torch.arange(3, 19)[None]
    batches = [{"input_ids": torch.randint(3, 100, (8, 16))} for _ in range(4)]
    sites = find_sites(model).select()
    before = model(ids).logits
    nest(model, sites, calibrate(model, sites, batches, loss=summed_loss(model, "text", 0)))
    torch.testing.assert_close(model(ids).logits, before, atol=1e-3, rtol=1e-2)
    save(model, None, tmp_path / "nested")
    loaded = load_model(tmp_path / "nested", dtype=torch.float32)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    shrink(loaded, 0.9)
    save(loaded, None, tmp_path / "cut")
    again = load_model(tmp_path / "cut", dtype=torch.float32)
    torch.testing.assert_close(again(ids).logits, loaded(ids).logits)
