"""Streaming moments against exact ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from conftest import stacked_experts

from rankfold import allocate, calibrate, factorize, find_sites
from rankfold.calibration import MomentAccumulator, calibrate_blocks
from rankfold.compression import factorize_blocks
from rankfold.modules import linear_at


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_moments_are_those_of_all_vectors_together(dtype: torch.dtype) -> None:
    x = (torch.randn(5000, 16) * torch.logspace(0, -3, 16) + 0.3).to(dtype)
    accumulator = MomentAccumulator(16)
    for part in x.split(700):
        accumulator.update(part.reshape(-1, 7, 16) if len(part) % 7 == 0 else part)
    moments = accumulator.moments()
    exact = x.double()
    assert moments.vectors == 5000
    torch.testing.assert_close(moments.mean, exact.mean(0), rtol=1e-6, atol=1e-9)
    second = exact.T @ exact / 5000
    assert (moments.second - second).norm() <= 1e-6 * second.norm()
    torch.testing.assert_close(moments.covariance, torch.cov(exact.T, correction=0), rtol=1e-3, atol=1e-6)


def test_chunks_in_float32_keep_the_sum_exact_where_float32_would_drift() -> None:
    """A million vectors of the same value: a float32 total would be off in the fourth digit."""
    accumulator = MomentAccumulator(1)
    value = torch.full((100_000, 1), 1.1)
    for _ in range(10):
        accumulator.update(value)
    assert float(accumulator.moments().second) == pytest.approx(float(value[0].double() ** 2), rel=5e-6)


def test_sites_that_share_an_input_share_one_accumulator() -> None:
    model = tiny.build("llama")
    statistics = calibrate(model, find_sites(model), [tiny.inputs(model)], method="whitened")
    query, key = (statistics[f"model.layers.0.self_attn.{name}_proj"] for name in "qk")
    assert query.inputs is key.inputs


def test_the_smaller_side_is_measured() -> None:
    model = tiny.build("llama")
    statistics = calibrate(model, find_sites(model), [tiny.inputs(model)], method="whitened")
    down = statistics["model.layers.0.mlp.down_proj"]
    assert down.inputs is None
    assert down.outputs is not None
    assert down.outputs.second.shape == (32, 32)


def test_only_one_blocks_moments_are_alive_at_a_time() -> None:
    model = tiny.build("llama")
    sites = find_sites(model).select()
    for block in calibrate_blocks(model, sites, [tiny.inputs(model)]):
        if block.step is None:
            assert not block.moments
            continue
        assert set(block.moments) == {site.name for site in sites if site.block == block.step.path}


def test_a_block_that_is_applied_again_is_measured_over_all_its_visits() -> None:
    """ALBERT: the moments are those of every application, and the block is factorized after its last one."""
    model = tiny.albert()
    sites = find_sites(model).select()
    assert {site.calls for site in sites} == {3}
    batches = [{"input_ids": torch.randint(3, 60, (4, 8))} for _ in range(2)]
    seen: list[torch.Tensor] = []
    handle = linear_at(model, sites[0].name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].flatten(0, 1))
    )
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    rows = torch.cat(seen).double()
    moments = calibrate(model, sites, batches, method="whitened")[sites[0].name].inputs
    assert moments is not None
    assert moments.vectors == len(rows) == 3 * 2 * 4 * 8
    torch.testing.assert_close(moments.second, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-5)
    together, blockwise = copy.deepcopy(model), copy.deepcopy(model)
    plan = allocate(sites, keep=0.7)
    factorize(together, plan, calibrate(together, sites, batches, method="whitened"))
    factorize_blocks(blockwise, plan, sites, batches)
    with torch.no_grad():
        torch.testing.assert_close(blockwise(**batches[0])[0], together(**batches[0])[0])


@pytest.mark.parametrize("name", [pytest.param("mixtral", marks=stacked_experts), "llama"])
def test_calibration_leaves_the_model_as_it_was(name: str) -> None:
    model = tiny.build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    implementation = model.config._experts_implementation if name == "mixtral" else None
    calibrate(model, find_sites(model), [tiny.inputs(model)], method="whitened")
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    if implementation is not None:
        assert model.config._experts_implementation == implementation


@stacked_experts
def test_an_expert_without_tokens_stays_dense_with_a_note() -> None:
    model = tiny.build("mixtral")
    with torch.no_grad():  # one expert that no token chooses
        for layer in model.model.layers:
            layer.mlp.gate.weight[2] = 0
            layer.mlp.gate.weight[[0, 1, 3]] *= 10
    sites = find_sites(model).select()
    plan = factorize_blocks(model, allocate(sites, keep=0.6), sites, [{"input_ids": torch.full((1, 2), 7)}])
    unreached = [option for option in plan.options if "no calibration token" in option.note]
    assert unreached
    planned = {name for option in plan.options for name in option.sites}
    assert planned == {site.name for site in sites}
    assert plan.parameters == sum(
        parameter.numel() for name in planned for parameter in linear_at(model, name).parameters()
    )


def test_values_that_are_not_finite_name_the_site() -> None:
    model = tiny.build("llama")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = float("nan")
    with pytest.raises(ValueError, match=r"model.layers.1.self_attn.*must be finite"):
        calibrate(model, find_sites(model), [tiny.inputs(model)], method="whitened")


def test_the_noise_of_a_moment_is_what_other_sequences_would_change() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(12, 12, generator=generator)

    def sample(sequences: int) -> Any:
        accumulator = MomentAccumulator(12)
        # Vectors of one sequence share a direction, so that they tell less than as many independent ones.
        common = torch.randn(sequences, 1, 12, generator=generator)
        accumulator.update((common + 0.3 * torch.randn(sequences, 20, 12, generator=generator)) @ root)
        return accumulator.moments()

    samples = [sample(16) for _ in range(200)]
    mean = torch.stack([moments.second for moments in samples]).mean(0)
    off = ~torch.eye(12, dtype=torch.bool)
    varied = torch.stack([(moments.second - mean)[off].square().sum() for moments in samples]).mean()
    estimated = sum(float(moments.spread) for moments in samples) / len(samples)
    assert abs(estimated - float(varied)) < 0.1 * float(varied)
    # Drawn towards the diagonal by that share it lies nearer to the truth than as it was measured.
    truth = root.double().T @ root.double() * 1.09
    raw, trusted = (
        sum(float((getattr(moments, name) - truth).square().sum()) for moments in samples)
        for name in ("second", "trusted")
    )
    assert trusted < 0.95 * raw
    assert sample(400).noise < 0.1 < sample(4).noise
    assert sample(1).noise == 0.0
