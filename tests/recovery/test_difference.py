"""The difference between two models as an adapter: right in every runtime, within its bytes, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file

from rankfold.calibration import calibrate, make_batches, summed_loss
from rankfold.checkpoint import load_model, save_adapters
from rankfold.modules import linear_at
from rankfold.quality import next_token_quality
from rankfold.quantization import Groups, gptq
from rankfold.recovery import (
    check_relatives,
    difference_adapter,
    difference_plan,
    differences,
    remaining_divergence,
)
from rankfold.sites import find_sites

peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install 'rankfold[recovery]'")


def rounded(name: str = "llama") -> Any:
    """A model whose matrices were rounded to nearest, in 3 bits."""
    model = tiny.build(name)
    with torch.no_grad():
        for site in find_sites(model).select():
            weight = linear_at(model, site.name).weight
            weight.copy_(gptq(weight, torch.eye(weight.shape[1]), Groups(3).bits, 16).matrix(16))
    return model


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any, Any, Any]:
    """A model, its rounded copy, the sites and what the text says of them."""
    target = tiny.build("llama")
    sites = find_sites(target).select()
    ids = torch.randint(0, 128, (16, 24), generator=torch.Generator().manual_seed(0))
    statistics = calibrate(target, sites, make_batches(target, ids), loss=summed_loss(target, "text", 0))
    return target, sites, statistics, ids


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits  # type: ignore[no-any-return]


def test_an_adapter_of_full_rank_is_the_target(pair: tuple[Any, Any, Any, Any]) -> None:
    target, sites, statistics, ids = pair
    plan, factors = difference_plan(sites, differences(rounded(), target, sites, statistics), rank=10**6)
    assert plan.predicted_loss == pytest.approx(0, abs=1e-9)
    adapted = difference_adapter(rounded(), factors)
    before = (logits(rounded(), ids) - logits(target, ids)).norm()
    assert (logits(adapted, ids) - logits(target, ids)).norm() < 0.02 * before


@pytest.mark.parametrize("compact", [False, True])
def test_a_budget_is_kept_and_spent_and_the_folder_loads(
    pair: tuple[Any, Any, Any, Any], tmp_path: Path, compact: bool
) -> None:
    target, sites, statistics, ids = pair
    base = tmp_path / "base"
    rounded().save_pretrained(base)
    carrier = load_model(base)
    plan, factors = difference_plan(sites, differences(carrier, target, sites, statistics), bytes=4000, compact=compact)
    assert (3400 if compact else 2400) <= plan.bytes <= 4000
    assert plan.predicted_loss < plan.calibration["loss_without"]
    adapted = difference_adapter(carrier, factors)
    save_adapters(adapted, None, tmp_path / "out", base=base)
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert sum(part.numel() * part.element_size() for part in stored.values()) == plan.bytes
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    ranks = {part.shape[0] for name, part in stored.items() if "lora_A" in name}
    if compact:
        assert len(ranks) > 1
        assert set(settings["rank_pattern"].values()) == set(settings["alpha_pattern"].values()) == ranks
    else:
        # One rank and alpha equal to it: PEFT, vLLM and llama.cpp all scale it by 1.
        assert ranks == {settings["r"]} == {settings["lora_alpha"]}
        assert not settings["rank_pattern"] and not settings["alpha_pattern"]  # noqa: PT018
    again = peft.PeftModel.from_pretrained(load_model(base), tmp_path / "out").eval()
    # Loaded again it computes in float32, here in the bfloat16 of its numbers.
    torch.testing.assert_close(logits(again, ids), logits(adapted, ids), atol=0.02, rtol=0.02)
    merged = load_model(base)
    with torch.no_grad():
        for name, (B, A) in factors.items():
            linear_at(merged, name).weight += (B.bfloat16().float() @ A.bfloat16().float()).to(torch.float32)
    torch.testing.assert_close(logits(again, ids), logits(merged, ids), atol=1e-4, rtol=1e-4)
    nearer = (logits(again, ids) - logits(target, ids)).norm() / (logits(rounded(), ids) - logits(target, ids)).norm()
    assert nearer < 0.9


def test_ranks_that_differ_cost_no_more_than_one_rank(pair: tuple[Any, Any, Any, Any]) -> None:
    target, sites, statistics, _ = pair
    for size in (1500, 4000, 9000):
        one, _ = difference_plan(sites, differences(rounded(), target, sites, statistics), bytes=size)
        mixed, _ = difference_plan(sites, differences(rounded(), target, sites, statistics), bytes=size, compact=True)
        assert mixed.predicted_loss <= 1.02 * one.predicted_loss


def test_what_remains_is_measured_with_an_adapter_that_is_not_there_yet(pair: tuple[Any, Any, Any, Any]) -> None:
    target, sites, statistics, ids = pair
    base = rounded()
    before = next_token_quality(base, ids, dense=target).kl
    found = differences(base, target, sites, statistics)
    remaining = remaining_divergence(base, target, ids)
    assert remaining({}) == pytest.approx(before)
    _, whole = difference_plan(sites, found, rank=10**6)
    assert remaining(whole) < 1e-3 * remaining({})
    _, some = difference_plan(sites, found, rank=4)
    adapted = difference_adapter(rounded().bfloat16(), some)
    expected = next_token_quality(adapted, ids, dense=target).kl
    assert remaining(some) == pytest.approx(expected, rel=0.1)
    assert next_token_quality(base, ids, dense=target).kl == before


def test_one_rank_for_all_is_chosen_by_what_was_measured(pair: tuple[Any, Any, Any, Any]) -> None:
    target, sites, statistics, _ = pair
    found = differences(rounded(), target, sites, statistics)
    size = 2 * sum(2 * (site.out_features + site.in_features) for site in sites)
    tried: list[int] = []

    def judge(factors: Any) -> float:
        ranks = {len(A) for _, A in factors.values()}
        assert len(ranks) == 1
        tried.append(ranks.pop())
        return abs(tried[-1] - 8.0)

    plan, factors = difference_plan(sites, found, bytes=size, judge=judge)
    # From the largest that all can have.
    assert tried == [2, 4, 8, 16]
    assert {len(A) for _, A in factors.values()} == {8}
    assert plan.bytes <= size
    everywhere, _ = difference_plan(sites, found, bytes=size, judge=lambda factors: -float(len(factors)))
    assert {option.ranks for option in everywhere.options} == {(2,)}


def test_both_sides_beat_the_plain_difference_at_equal_rank(pair: tuple[Any, Any, Any, Any]) -> None:
    target, sites, statistics, _ = pair
    carrier = rounded()
    plan, _ = difference_plan(sites, differences(carrier, target, sites, statistics), rank=4)
    plain = 0.0
    for site in sites:
        D = (linear_at(target, site.name).weight - linear_at(carrier, site.name).weight).detach().double()
        U, s, V = torch.linalg.svd(D)
        left = D - U[:, :4] * s[:4] @ V[:4]
        moments = statistics[site.name]
        S, G = moments.inputs.trusted, moments.gradients.trusted
        plain += 0.5 * float(((G @ left) * (left @ S)).sum())
    assert plan.predicted_loss < 0.9 * plain


def test_few_tokens_blow_no_adapter_up(pair: tuple[Any, Any, Any, Any]) -> None:
    target, sites, _, ids = pair
    batches = make_batches(target, ids[:2, :3])
    statistics = calibrate(target, sites, batches, loss=summed_loss(target, "text", 0))
    carrier = rounded()
    _, factors = difference_plan(sites, differences(carrier, target, sites, statistics), rank=8)
    for name, (B, A) in factors.items():
        difference = linear_at(target, name).weight - linear_at(carrier, name).weight
        assert float((B @ A).norm()) < 4 * float(difference.norm())


def test_transposed_layers_carry_adapters_too() -> None:
    target = tiny.build("gpt2")
    sites = find_sites(target).select()
    ids = torch.randint(0, 128, (8, 16), generator=torch.Generator().manual_seed(0))
    statistics = calibrate(target, sites, make_batches(target, ids), loss=summed_loss(target, "text", 0))
    carrier = tiny.build("gpt2")
    with torch.no_grad():
        for site in sites:
            linear_at(carrier, site.name).weight.mul_(0.9)
    before = logits(carrier, ids)
    _, factors = difference_plan(sites, differences(carrier, target, sites, statistics), rank=10**6)
    adapted = difference_adapter(carrier, factors)
    assert (logits(adapted, ids) - logits(target, ids)).norm() < 0.02 * (before - logits(target, ids)).norm()


def test_models_that_are_no_relatives_are_refused(pair: tuple[Any, Any, Any, Any]) -> None:
    target, sites, statistics, _ = pair
    with pytest.raises(ValueError, match="must be of one kind, but are Qwen2ForCausalLM and LlamaForCausalLM"):
        check_relatives(tiny.build("qwen2"), target, sites)
    wider = tiny.build("llama")
    wider.resize_token_embeddings(130)
    with pytest.raises(ValueError, match=r"embed_tokens.* base's is \(130, 32\) and the target's \(128, 32\)"):
        check_relatives(wider, target, sites)
    changed = rounded()
    with torch.no_grad():
        changed.model.embed_tokens.weight.mul_(1.1)
    with pytest.raises(ValueError, match=r"embed_tokens.weight: 1 weights that an adapter does not hold differ"):
        check_relatives(changed, target, sites)
    assert check_relatives(changed, target, sites, leave_others=True) == ["model.embed_tokens.weight"]
    assert check_relatives(rounded(), target, sites) == []
    for budget in ({}, {"bytes": 10, "rank": 1}, {"rank": 0}):
        with pytest.raises(ValueError, match="needs one of bytes and rank"):
            difference_plan(sites, differences(rounded(), target, sites, statistics), **budget)
    with pytest.raises(ValueError, match="holds no rank of any site"):
        difference_plan(sites, differences(rounded(), target, sites, statistics), bytes=3)


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="transformers 4 has no stacked experts")
def test_experts_in_a_stack_are_refused() -> None:
    experts = tiny.build("mixtral")
    with pytest.raises(ValueError, match="adapters are not made for experts in a stack"):
        check_relatives(tiny.build("mixtral"), experts, find_sites(experts).select())
