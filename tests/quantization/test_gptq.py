"""GPTQ on one side and on both is what elimination by the definition gives, and stores what it says."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from rankfold.modules import WHOLE_MATRIX, WHOLE_ROW, GroupLinear, prefer, quantizer_at
from rankfold.quantization import Groups, gptq, gptq_linear
from rankfold.quantization.gptq import DAMPING, DAMPING_OF_BOTH, gptq_widths


def moment(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(20 * size, size, generator=generator) @ torch.randn(size, size, generator=generator)
    return X.T @ X / len(X)


def case(out_features: int = 24, in_features: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    W = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0))
    return W, moment(in_features, 1), moment(out_features, 2)


def predicted(W: Tensor, rounded: Tensor, S: Tensor, G: Tensor) -> float:
    D = (rounded - W).double()
    return float(((G.double() @ D) * (D @ S.double())).sum())


def damped(S: Tensor) -> Tensor:
    return S.double() + DAMPING_OF_BOTH * S.double().diagonal().mean() * torch.eye(len(S), dtype=torch.float64)


def eliminated(W: Tensor, scales: Tensor, zeros: Tensor, top: int, S: Tensor, G: Tensor) -> Tensor:
    """Levels one weight after the other, the rest moved to the optimum that the whole Hessian `G x S` leaves them."""
    out_features, in_features = W.shape
    H = torch.kron(damped(G), damped(S))
    target = W.double().flatten().clone()
    places = [(i, j) for j in S.diagonal().argsort(descending=True) for i in G.diagonal().argsort(descending=True)]
    left = [int(i) * in_features + int(j) for i, j in places]
    levels = torch.zeros(out_features * in_features, dtype=torch.uint8)
    scale, zero = scales.double().flatten(), zeros.double().flatten()
    while left:
        first, rest = left[0], left[1:]
        level = (target[first] / scale[first] + zero[first]).round().clamp(0, top)
        levels[first] = int(level)
        error = target[first] - (level - zero[first]) * scale[first]
        target[rest] += torch.linalg.solve(H[rest][:, rest], H[rest, first]) * error
        left = rest
    return levels.reshape(W.shape)


@pytest.mark.parametrize("shape", [(5, 8), (8, 5)])
@pytest.mark.parametrize("tile", [3, 64])
def test_both_sides_are_the_elimination_of_the_whole_hessian(
    shape: tuple[int, int], tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[Groups.__module__], "TILE", tile)
    W, S, G = case(*shape)
    levels = gptq(W, S, 3, 4, G)
    scales, zeros = (p.repeat_interleave(4, 1)[:, : shape[1]] for p in (levels.scales, levels.zeros))
    expected = eliminated(W, scales, zeros, 7, S, G)
    assert (levels.codes == expected).float().mean() > 0.97  # Ties of the rounding may fall either way.


def test_one_side_is_both_with_outputs_that_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[Groups.__module__], "DAMPING_OF_BOTH", DAMPING)
    W, S, _ = case(16, 24)
    assert (gptq(W, S, 3, 8).codes == gptq(W, S, 3, 8, torch.eye(16)).codes).float().mean() > 0.99


def test_each_side_that_is_known_lowers_the_predicted_loss() -> None:
    W, S, G = case(96, 160)
    nearest, one, both = (
        predicted(W, gptq(W, *sides).matrix(32), S, G) for sides in ((torch.eye(160), 3, 32), (S, 3, 32), (S, 3, 32, G))
    )
    assert both < 0.7 * one < 0.7 * nearest


def test_several_widths_at_once_are_each_of_them() -> None:
    W, S, G = case()
    together = gptq_widths(W, S, (2, 4, 5), 16, G)
    for bits, levels in together.items():
        alone = gptq(W, S, bits, 16, G)
        assert torch.equal(levels.scales, alone.scales)
        assert (levels.codes == alone.codes).float().mean() > 0.99
        assert int(levels.codes.max()) <= 2**bits - 1


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [16, 32, WHOLE_ROW, WHOLE_MATRIX])
def test_a_layer_holds_the_levels_in_the_bytes_that_it_says(bits: int, group: int) -> None:
    W, S, _ = case(32, 72)
    settings = Groups(bits, group)
    levels = gptq(W, S, bits, group)
    bias = torch.arange(32.0)
    layer = gptq_linear(levels, settings, bias, torch.float32)
    assert torch.equal(layer.dequantized(), levels.matrix(group))
    assert layer.stored_bytes == quantizer_at("gptq").bytes(32, 72, settings)
    loaded = GroupLinear(72, 32, None, True, {"bits": bits, "group": group})
    loaded.load_state_dict(layer.state_dict())
    x = torch.randn(3, 72, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(x), layer(x))
    torch.testing.assert_close(layer(x), x @ layer.dequantized().T + bias)


def test_whole_matrices_share_one_scale() -> None:
    W, S, _ = case()
    assert gptq(W, S, 4, WHOLE_MATRIX).scales.unique().numel() == 1


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (2, 64), (3, 64), (5, 64), (8, 128), (8, WHOLE_ROW)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_multiply_what_is_stored(bits: int, group: int, dtype: torch.dtype) -> None:
    W, S, _ = case(48, 128)
    layer = gptq_linear(gptq(W, S, bits, group), Groups(bits, group), None, dtype)
    assert (layer.kernel(dtype) is not None) == (dtype == torch.bfloat16)
    x = torch.randn(140, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = x.float() @ layer.dequantized().T
    with torch.no_grad():
        found = {}
        for what in ("balance", "memory", "speed"):
            prefer(layer, what)
            found[what], found[f"{what}, one"] = layer(x), torch.cat([layer(row[None]) for row in x])
            kept = sum(len(layer.__dict__.get(name, {})) for name in ("_matrices",))
            assert kept == {"balance": dtype == torch.float32, "memory": 0, "speed": 1}[what]
    tolerance = 1e-5 if dtype == torch.float32 else 6e-3
    for y in found.values():
        assert y.dtype == dtype
        assert float((y.float() - expected).norm()) <= tolerance * float(expected.norm())


@pytest.mark.parametrize("shape", [(40, 96), (8, 72), (48, 8)])
@pytest.mark.parametrize(("bits", "group"), [(4, WHOLE_ROW), (4, WHOLE_MATRIX), (8, WHOLE_ROW)])
def test_factors_of_any_size_have_a_kernel(shape: tuple[int, int], bits: int, group: int) -> None:
    W, S, _ = case(*shape)
    layer = gptq_linear(gptq(W, S, bits, group), Groups(bits, group), torch.ones(shape[0]), torch.bfloat16)
    assert layer.kernel(torch.bfloat16) is not None
    x = torch.randn(2, 3, shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = x.float() @ layer.dequantized().T + 1
    with torch.no_grad():
        found = layer(x)
    assert found.shape == expected.shape
    assert float((found.float() - expected).norm()) <= 6e-3 * float(expected.norm())


def test_gradients_pass_through_and_what_was_prepared_follows_the_buffers() -> None:
    W, S, _ = case(32, 64)
    layer = gptq_linear(gptq(W, S, 4, 32), Groups(4, 32), None, torch.float32)
    x = torch.randn(2, 64, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantized().sum(0).expand(2, 64))
    with torch.no_grad():
        before = layer(x)
        other = gptq_linear(gptq(-W, S, 4, 32), Groups(4, 32), None, torch.float32)
        layer.load_state_dict(other.state_dict())
        assert not torch.equal(layer(x), before)
        torch.testing.assert_close(layer(x), other(x))


def test_what_is_not_finite_or_cannot_be_stored_is_refused() -> None:
    W, S, G = case()
    for broken in ((W * torch.nan, S, 4, 16), (W, S * torch.inf, 4, 16), (W, S, 4, 16, G * torch.nan)):
        with pytest.raises(ValueError, match="must be finite"):
            gptq(*broken)
    with pytest.raises(ValueError, match="2 to 8 bits, but got 9"):
        Groups(9)
    with pytest.raises(ValueError, match="at least 2 weights"):
        Groups(4, 1)
    with pytest.raises(ValueError, match="balance, memory, speed, but got 'size'"):
        prefer(torch.nn.Linear(1, 1), "size")
