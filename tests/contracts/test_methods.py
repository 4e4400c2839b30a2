"""Promises that every factorization keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankfold.factorization import METHODS, Factors, Moments, SiteMoments
from rankfold.modules import FORMS, factorized_module, stored_parameters

SHAPES = [(12, 12), (20, 8), (8, 20), (1, 6), (6, 1)]


def problem(shape: tuple[int, int], side: str, bias: bool = True) -> tuple[Tensor, Tensor | None, SiteMoments, Tensor]:
    """Weight, bias, moments of inputs or outputs, and the inputs themselves (600 vectors with a mean)."""
    generator = torch.Generator().manual_seed(sum(shape))
    W = torch.randn(shape, generator=generator, dtype=torch.float64)
    b = torch.randn(shape[0], generator=generator, dtype=torch.float64) if bias else None
    mix = torch.randn(shape[1], shape[1], generator=generator, dtype=torch.float64)
    x = torch.randn(600, shape[1], generator=generator, dtype=torch.float64) @ mix + 0.5
    seen = x if side == "inputs" else x @ W.T + (0 if b is None else b)
    known = {side: moments_of(seen)}
    if side == "inputs":
        g = torch.randn(600, shape[0], generator=generator, dtype=torch.float64)
        known["gradients"] = moments_of(g @ torch.randn(shape[0], shape[0], generator=generator, dtype=torch.float64))
    return W, b, SiteMoments(**known), x


def moments_of(vectors: Tensor) -> Moments:
    fourth = float(vectors.square().sum(1).square().mean())
    return Moments(len(vectors), vectors.mean(0), vectors.T @ vectors / len(vectors), fourth)


def skip_if_unsuited(method: str, side: str) -> None:
    if METHODS[method].needs_gradients and side != "inputs":
        pytest.skip("this method always reads moments of the inputs")


def outputs(factors: Factors, x: Tensor) -> Tensor:
    return x @ factors.product().T + (0 if factors.bias is None else factors.bias)


def claimed_error(method: str, W: Tensor, b: Tensor | None, factors: Factors, x: Tensor, moments: SiteMoments) -> float:
    """What the method says it minimizes, measured."""
    if METHODS[method].needs_gradients:
        assert moments.gradients is not None
        lost = x @ W.T + (0 if b is None else b) - outputs(factors, x)
        return 0.5 * float((lost * (lost @ moments.gradients.second)).sum(1).mean())
    if not METHODS[method].needs_data:
        return float((W - factors.product()).square().sum())
    y = x @ W.T + (0 if b is None else b)
    return float((y - outputs(factors, x)).square().sum(1).mean())


@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_full_rank_is_exact(method: str, shape: tuple[int, int], side: str) -> None:
    skip_if_unsuited(method, side)
    W, b, moments, x = problem(shape, side)
    factors = METHODS[method].factorize(W, b, moments, min(shape))
    torch.testing.assert_close(factors.product(), W)
    torch.testing.assert_close(outputs(factors, x), x @ W.T + b)


@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(12, 12), (20, 8), (8, 20)])
@pytest.mark.parametrize("method", METHODS)
def test_the_error_is_the_one_claimed(method: str, shape: tuple[int, int], bias: bool, side: str) -> None:
    skip_if_unsuited(method, side)
    W, b, moments, x = problem(shape, side, bias)
    for rank in (1, 3, 6):
        factors = METHODS[method].factorize(W, b, moments, rank)
        assert factors.error == pytest.approx(claimed_error(method, W, b, factors, x, moments), rel=1e-5)


@pytest.mark.parametrize("shape", [(12, 12), (20, 8), (8, 20)])
@pytest.mark.parametrize("method", METHODS)
def test_no_perturbation_of_the_factors_lowers_the_error(method: str, shape: tuple[int, int]) -> None:
    if not METHODS[method].is_optimal:
        pytest.skip("a heuristic: it claims no optimum")
    W, b, moments, x = problem(shape, "inputs")
    factors = METHODS[method].factorize(W, b, moments, 3)
    best = claimed_error(method, W, b, factors, x, moments)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        step = 1e-3 * torch.randn(factors.up.shape, generator=generator, dtype=torch.float64)
        moved = factors._replace(up=factors.up + step)
        assert claimed_error(method, W, b, moved, x, moments) >= best * (1 - 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_dtype_is_kept_and_parameters_are_as_declared(method: str, dtype: torch.dtype) -> None:
    W, b, moments, _ = problem((20, 8), "inputs")
    assert b is not None
    factors = METHODS[method].factorize(W.to(dtype), b.to(dtype), moments, 3)
    form = METHODS[method].form
    module = factorized_module(factors, form)
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    ranks = FORMS[form].at(3)
    assert sum(p.numel() for p in module.parameters()) == stored_parameters(form, 20, 8, ranks, bias=True)


@pytest.mark.parametrize("method", METHODS)
def test_a_bias_is_added_only_where_the_method_says_so(method: str) -> None:
    W, _, moments, _ = problem((20, 8), "inputs", bias=False)
    factors = METHODS[method].factorize(W, None, moments, 3)
    assert (factors.bias is not None) == METHODS[method].adds_bias


@pytest.mark.parametrize("rank", [0, -1, 9])
@pytest.mark.parametrize("method", METHODS)
def test_a_rank_out_of_range_is_an_error(method: str, rank: int) -> None:
    W, b, moments, _ = problem((20, 8), "inputs")
    with pytest.raises(ValueError, match=r"between 1 and min\(out, in\) = 8, but got"):
        METHODS[method].factorize(W, b, moments, rank)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", METHODS)
def test_a_weight_that_is_not_finite_is_an_error(method: str, value: float) -> None:
    W, b, moments, _ = problem((20, 8), "inputs")
    W[3, 4] = value
    with pytest.raises(ValueError, match="1 of 160 entries are NaN or infinite"):
        METHODS[method].factorize(W, b, moments, 2)


@pytest.mark.parametrize("method", METHODS)
def test_a_zero_matrix_and_a_singular_moment_do_no_harm(method: str) -> None:
    W, b, _, _ = problem((12, 8), "inputs")
    u = torch.ones(8, dtype=torch.float64)
    v = torch.ones(12, dtype=torch.float64)
    rank_one = SiteMoments(
        inputs=Moments(10, u, torch.outer(u, u), 64.0), gradients=Moments(10, v, torch.outer(v, v), 144.0)
    )
    for weight in (W, torch.zeros_like(W)):
        factors = METHODS[method].factorize(weight.float(), b, rank_one, 3)
        assert all(torch.isfinite(part).all() for part in (factors.up, factors.down))
        assert factors.error >= 0
