"""Streaming moments against exact ones."""

from __future__ import annotations

import pytest
import tiny
import torch

from rankfold import calibrate, find_sites
from rankfold.calibration import MomentAccumulator, calibrate_blocks


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
    statistics = calibrate(model, find_sites(model), [tiny.inputs(model)])
    query, key = (statistics[f"model.layers.0.self_attn.{name}_proj"] for name in "qk")
    assert query.inputs is key.inputs


def test_the_smaller_side_is_measured() -> None:
    model = tiny.build("llama")
    statistics = calibrate(model, find_sites(model), [tiny.inputs(model)])
    down = statistics["model.layers.0.mlp.down_proj"]
    assert down.inputs is None
    assert down.outputs is not None
    assert down.outputs.second.shape == (32, 32)


def test_only_one_blocks_moments_are_alive_at_a_time() -> None:
    model = tiny.build("llama")
    sites = find_sites(model).select()
    for block in calibrate_blocks(model, sites, [tiny.inputs(model)]):
        assert block.step is not None
        assert set(block.moments) == {site.name for site in sites if site.block == f"model.{block.step.path}"}


def test_values_that_are_not_finite_name_the_site() -> None:
    model = tiny.build("llama")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = float("nan")
    with pytest.raises(ValueError, match=r"model.layers.1.self_attn.*must be finite"):
        calibrate(model, find_sites(model), [tiny.inputs(model)])
