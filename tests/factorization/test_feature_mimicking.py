"""LoRD and the whitened SVD against naive implementations and against each other."""

from __future__ import annotations

import pytest
import torch

from rankfold.factorization import METHODS, Moments, SiteMoments, feature_mimicking, whitened_svd


def problem(out: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, SiteMoments]:
    W = torch.randn(out, columns, dtype=torch.float64)
    b = torch.randn(out, dtype=torch.float64)
    x = torch.randn(500, columns, dtype=torch.float64) @ torch.randn(columns, columns, dtype=torch.float64) + 1
    return W, b, x, SiteMoments(inputs=Moments(len(x), x.mean(0), x.T @ x / len(x)))


SHAPES = [(12, 12), (20, 8), (8, 20)]


@pytest.mark.parametrize("shape", SHAPES)
def test_whitening_is_the_svd_of_the_scaled_matrix_mapped_back(shape: tuple[int, int]) -> None:
    W, b, _, moments = problem(*shape)
    assert moments.inputs is not None
    values, vectors = torch.linalg.eigh(moments.inputs.second)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    U, s, Vh = torch.linalg.svd(W @ root, full_matrices=False)
    naive = U[:, :4] @ torch.diag(s[:4]) @ Vh[:4] @ torch.linalg.inv(root)
    torch.testing.assert_close(whitened_svd(W, b, moments, 4).product(), naive, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_feature_mimicking_is_the_pca_of_the_outputs(shape: tuple[int, int]) -> None:
    W, b, x, moments = problem(*shape)
    y = x @ W.T + b
    V = torch.linalg.eigh(torch.cov(y.T, correction=0)).eigenvectors[:, -4:]
    naive = (y - y.mean(0)) @ V @ V.T + y.mean(0)
    factors = feature_mimicking(W, b, moments, 4)
    assert factors.bias is not None
    torch.testing.assert_close(x @ factors.product().T + factors.bias, naive, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_centring_feature_mimicking_is_whitening(shape: tuple[int, int]) -> None:
    """With moments whose mean is zero both are the same projection."""
    W, _, _, moments = problem(*shape)
    assert moments.inputs is not None
    zero_mean = SiteMoments(inputs=moments.inputs._replace(mean=torch.zeros(shape[1], dtype=torch.float64)))
    lord, whitened = feature_mimicking(W, None, zero_mean, 4), whitened_svd(W, None, zero_mean, 4)
    torch.testing.assert_close(lord.product(), whitened.product())
    assert lord.bias is not None
    torch.testing.assert_close(lord.bias, torch.zeros(shape[0], dtype=torch.float64))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["lord", "whitened"])
def test_moments_of_outputs_give_what_moments_of_inputs_give(method: str, shape: tuple[int, int]) -> None:
    W, b, x, moments = problem(*shape)
    y = x @ W.T + b
    from_outputs = SiteMoments(outputs=Moments(len(y), y.mean(0), y.T @ y / len(y)))
    first = METHODS[method].factorize(W, b, moments, 4)
    second = METHODS[method].factorize(W, b, from_outputs, 4)
    torch.testing.assert_close(first.product(), second.product(), rtol=1e-6, atol=1e-8)
    assert first.bias is not None
    assert second.bias is not None
    torch.testing.assert_close(first.bias, second.bias, rtol=1e-6, atol=1e-8)


def test_centring_never_hurts_the_output_error() -> None:
    W, b, _, moments = problem(12, 12)
    for rank in range(1, 12):
        assert feature_mimicking(W, b, moments, rank).error <= whitened_svd(W, b, moments, rank).error * (1 + 1e-9)
