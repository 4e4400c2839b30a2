"""One matrix in few bits: what it would lose in each width and with each rank beside it, and the layer of an option."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from rankfold.allocation import MULTIPLE, WidthLosses
from rankfold.factorization import SiteMoments, ordered_kfac, predicted_loss, weighed
from rankfold.modules import WHOLE_MATRIX, WHOLE_ROW, CompensatedLinear, GroupLinear, LowRankLinear
from rankfold.plan import DENSE, Option
from rankfold.quantization.gptq import Groups, gptq, gptq_linear, gptq_widths

WIDTHS = ((2, 64), (3, 64), (4, 64), (5, 64), (6, 64), (8, 64))
"""Bits and groups that are offered."""

TRIED = 4
"""Bits up to which a matrix is rounded to see what that costs: beyond, the error falls as the square of the step."""

ALTERNATIONS = 2
"""Times that a matrix is rounded anew without what its compensation already holds."""


@torch.no_grad()
def width_losses(
    weight: Float[Tensor, "out in"],
    moments: SiteMoments,
    widths: Sequence[tuple[int, int]] = WIDTHS,
    centred: bool = False,
) -> WidthLosses:
    """Predicted rise of the loss of a matrix in every width, alone and with the best compensation of every rank.

    Of the error `D` of a rounded matrix the best compensation of rank `r` leaves the squared singular values of
    `G^(1/2) D S^(1/2)` after the first `r`, half of whose sum is the loss that remains (docs/mathematics.md, eq. 12).

    Args:
        weight: The matrix.
        moments: Of its inputs and of the gradients at its outputs.
        widths: Bits and size of groups to try.
        centred: Whether a bias keeps the mean output.
    """
    W = weight.float()
    moments = _trusting(moments, centred)
    assert moments.inputs is not None and moments.gradients is not None, "losses need both moments"  # noqa: PT018
    S, G = moments.inputs.second, moments.gradients.second
    rounded: dict[tuple[int, int], Tensor] = {}
    for group in dict.fromkeys(group for _, group in widths):
        bits = [width for width, size in widths if size == group]
        found = gptq_widths(W, S, [width for width in bits if width <= TRIED], group, G)
        rounded |= {(width, group): levels.matrix(group) for width, levels in found.items()}
    tail = _Tails(S.to(W.device), G.to(W.device), 0.5 * moments.share)
    curves = {width: tail(W - matrix) for width, matrix in rounded.items()}
    for width, group in widths:
        if width > TRIED:
            curves[width, group] = curves[TRIED, group] * ((2**TRIED - 1) / (2**width - 1)) ** 2
    return WidthLosses(tail(W), curves)


def _trusting(moments: SiteMoments, centred: bool) -> SiteMoments:
    """Moments drawn away from their sampling error, which makes cheap what is only misjudged."""
    inputs, gradients = moments.inputs, moments.gradients
    if inputs is not None:
        inputs = inputs.centred() if centred else inputs
        inputs = inputs._replace(second=inputs.trusted)
    if gradients is not None:
        gradients = gradients._replace(second=gradients.trusted)
    return moments._replace(inputs=inputs, gradients=gradients)


class _Tails:
    """Loss that is left of an error after its best compensation of every rank."""

    def __init__(
        self, S: Float[Tensor, "in in"], G: Float[Tensor, "out out"] | Float[Tensor, " out"], scale: float
    ) -> None:
        self.S, self.G, self.scale = S.double(), G.double(), scale
        self.of_outputs = len(G) <= len(S) and G.ndim == 2
        smaller = self.G if self.of_outputs else self.S
        values, vectors = torch.linalg.eigh(smaller)
        self.root = vectors * values.clamp(min=0).sqrt()

    def __call__(self, error: Float[Tensor, "out in"]) -> Any:
        D = error.double()
        inner = D @ self.S @ D.T if self.of_outputs else D.T @ weighed(self.G, D)
        values = torch.linalg.eigvalsh(self.root.T @ inner @ self.root).clamp(min=0)
        # Sums of the smallest, so that the first is the whole and the last nothing.
        left = torch.cat([values.new_zeros(1), values.cumsum(0)]).flip(0)
        return (self.scale * left[::MULTIPLE]).cpu().numpy().astype(np.float64)


class Fitted(NamedTuple):
    """What takes a layer's place, and what it is predicted to cost as it is stored."""

    layer: nn.Module
    matrix: Float[Tensor, "out in"]
    loss: float


@torch.no_grad()
def fit(
    weight: Float[Tensor, "out in"], moments: SiteMoments, option: Option, dtype: torch.dtype, centred: bool = False
) -> Fitted:
    """A matrix in the bits and the rank of an option, without a bias.

    Args:
        weight: The matrix.
        moments: Of the inputs that it will read, and of the gradients at its outputs.
        option: Its form, ranks and bits.
        dtype: In which the layer computes.
        centred: Whether a bias keeps the mean output.
    """
    moments = _trusting(moments, centred)
    assert moments.inputs is not None, "moments of the inputs"
    S = moments.inputs.second
    G = None if moments.gradients is None else moments.gradients.second
    if option.form == "low_rank":
        up, down = _factors(weight, moments, option.ranks[0])
        return _priced(_pair(up, down, S, weight, option.factor_bits, dtype), weight, moments)
    assert option.bits is not None, "a matrix in few bits"
    settings = Groups(option.bits, option.group or 0)
    if option.form == DENSE:
        layer = gptq_linear(gptq(weight, S, settings.bits, settings.group, G), settings, None, dtype)
        return _priced(layer, weight, moments)
    best: Fitted | None = None
    held = torch.zeros_like(weight)
    for _ in range(ALTERNATIONS):
        base = gptq_linear(gptq(weight - held, S, settings.bits, settings.group, G), settings, None, dtype)
        error = weight - base.dequantized()
        up, down = _factors(error, moments, option.ranks[0])
        pair = _pair(up, down, S, error, option.factor_bits, dtype)
        made = CompensatedLinear.from_parts(base, pair.up, pair.down)
        held = _matrix(pair)
        found = _priced(made, weight, moments, base.dequantized() + held)
        if best is not None and found.loss >= best.loss:
            break
        best = found
    assert best is not None, "at least one alternation"
    return best


def _factors(weight: Tensor, moments: SiteMoments, rank: int) -> tuple[Tensor, Tensor]:
    ordered = ordered_kfac(weight, None, moments)
    return ordered.up[:, :rank].float(), ordered.down[:rank].float()


def _pair(up: Tensor, down: Tensor, S: Tensor, target: Tensor, bits: int | None, dtype: torch.dtype) -> LowRankLinear:
    """Two factors in few bits: the first rounded, the second fitted to what it has become, and rounded too."""
    if bits is None:
        return LowRankLinear.from_factors(up.to(dtype), down.to(dtype))
    # Columns of one size share a scale, which the rows of the other factor take on.
    size = up.square().mean(0).sqrt().clamp(min=1e-30)
    lower = Groups(bits, WHOLE_ROW)
    first = gptq_linear(gptq(down * size[:, None], S, bits, WHOLE_ROW), lower, None, dtype)
    D = first.dequantized().double()
    S = S.double()
    moment = D @ S @ D.T
    damped = moment + 1e-6 * moment.diagonal().mean() * torch.eye(len(D), dtype=D.dtype, device=D.device)
    fitted = torch.linalg.solve(damped, D @ S @ target.double().T).T.float()
    if not bool(torch.isfinite(fitted).all()):
        fitted = up / size
    upper = Groups(bits, WHOLE_MATRIX)
    second = gptq_linear(gptq(fitted, moment, bits, WHOLE_MATRIX), upper, None, dtype)
    layer = LowRankLinear(down.shape[1], len(up), (len(down),), bias=False, device="meta")
    layer.up, layer.down = second, first  # type: ignore[assignment]
    return layer


def _matrix(layer: Any) -> Tensor:
    """The matrix that a layer stands for, in float32."""
    if isinstance(layer, GroupLinear):
        return layer.dequantized()
    if isinstance(layer, LowRankLinear):
        return _matrix(layer.up) @ _matrix(layer.down)
    return layer.weight.float()  # type: ignore[no-any-return]


def _priced(layer: nn.Module, weight: Tensor, moments: SiteMoments, matrix: Tensor | None = None) -> Fitted:
    matrix = _matrix(layer) if matrix is None else matrix
    return Fitted(layer, matrix, predicted_loss(weight, matrix, moments))
