"""SpQR: a matrix in few bits, its errors compensated in later columns, outliers kept, scales quantized too."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from rankfold.errors import InputError
from rankfold.modules import Quantizer, SpQRLinear, pack, statistics

COLUMNS = 128
"""Columns, or so, whose errors are gathered before the columns after them are corrected."""

SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Shares of a group's range that are tried; a little is often cut off for finer steps."""


@dataclass(frozen=True)
class Grid:
    """How finely a matrix is stored.

    Raises:
        ValueError: If a setting is out of range.
    """

    bits: int = 3
    """Bits of a weight."""
    group: int = 16
    """Consecutive weights of a row that share a scale and a zero point."""
    rows: int = 16
    """Rows whose scales, and zero points, of one group of columns share a range."""
    statistics_bits: int = 3
    """Bits of a scale and of a zero point."""
    outliers: float = 0.01
    """Share of the weights that are kept in 16 bits."""

    def __post_init__(self) -> None:
        """Refuse what cannot be stored."""
        if not 2 <= self.bits <= 8 or not 2 <= self.statistics_bits <= 8:
            raise InputError(
                f"SpQR stores weights and their statistics in 2 to 8 bits, but got {self.bits} and "
                f"{self.statistics_bits}."
            )
        if self.group < 2 or self.rows < 1 or not 0 <= self.outliers < 0.5:
            raise InputError(
                "SpQR needs groups of at least 2 weights and 1 row, and a share of outliers in [0, 0.5), but got "
                f"{self.group}, {self.rows} and {self.outliers:g}."
            )


class Quantized(NamedTuple):
    """A matrix in few bits; `rankfold.modules.SpQRLinear` stores it."""

    codes: Integer[Tensor, "out in"]
    """Level of every weight, outliers' being meaningless."""
    scale_codes: Integer[Tensor, "out groups"]
    zero_codes: Integer[Tensor, "out groups"]
    ranges: Float[Tensor, "4 blocks groups"]
    """Lowest scale, step of scales, lowest zero point, step of zero points, of each block of rows: bfloat16."""
    outliers: Integer[Tensor, "kept 2"]
    """Row and column of the weights that are kept."""
    values: Float[Tensor, " kept"]
    """Those weights, in bfloat16."""


@torch.no_grad()
def spqr(
    weight: Float[Tensor, "out in"], second: Float[Tensor, "in in"], grid: Grid, damping: float = 0.01
) -> Quantized:
    """A matrix in few bits that changes the layer's outputs little (Dettmers et al. 2023, arXiv:2306.03078).

    Columns are rounded in order, and each error is compensated in the columns after it by way of the inverse moment
    (GPTQ, Frantar et al. 2022, arXiv:2210.17323; docs/mathematics.md, eq. 11). Weights without which their group
    would be rounded much better are kept in 16 bits. Scales and zero points are rounded too, before they are used.

    Args:
        weight: The matrix.
        second: Second moment of the layer's inputs, `E[x x^T]`.
        grid: Bits, groups and outliers.
        damping: Share of the mean input power that is added to every input's, so that the moment can be inverted.

    Raises:
        ValueError: If a weight or a moment is not finite.
    """
    if not bool(torch.isfinite(weight).all()) or not bool(torch.isfinite(second).all()):
        raise InputError(
            "Weights and moments must be finite to be quantized, but some are NaN or infinite: the checkpoint is "
            "damaged, or its activations overflow. Take another, or load a float16 model with `dtype` bfloat16."
        )
    W = weight.float().clone()
    out_features, in_features = W.shape
    factor = _inverse_factor(second, damping).float()
    power = factor.diagonal().square()
    threshold = _threshold(W, power, grid)
    codes = torch.zeros_like(W, dtype=torch.uint8)
    kept = torch.zeros_like(W, dtype=torch.bool)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    exact = W.clone()
    width = grid.group * max(1, COLUMNS // grid.group)
    for start in range(0, in_features, width):
        end = min(start + width, in_features)
        errors = torch.zeros(out_features, end - start, device=W.device)
        for column in range(start, end):
            if (column - start) % grid.group == 0:
                span = slice(column, min(column + grid.group, end))
                kept[:, span] = _outliers(W[:, span], power[span], grid.bits, threshold)
                parts.append(_fit(W[:, span], ~kept[:, span], power[span], grid))
                scale, zero = (part[:, 0] for part in statistics(*parts[-1], grid.rows))
            w = W[:, column]
            level = _levels(w, scale, zero, grid.bits)
            codes[:, column] = level.to(torch.uint8)
            exact[:, column] = w.bfloat16().float()
            rounded = torch.where(kept[:, column], exact[:, column], (level - zero) * scale)
            error = (w - rounded) / factor[column, column]
            W[:, column:end] -= torch.outer(error, factor[column, column:end])
            errors[:, column - start] = error
        W[:, end:] -= errors @ factor[start:end, end:]
    scale_codes, zero_codes, ranges = (torch.cat(part, -1) for part in zip(*parts, strict=True))
    return Quantized(codes, scale_codes, zero_codes, ranges, kept.nonzero(), exact[kept].bfloat16())


def _inverse_factor(second: Float[Tensor, "in in"], damping: float) -> Float[Tensor, "in in"]:
    """Upper Cholesky factor of the inverse of the damped moment, in float64."""
    S = second.double().clone()
    mean = float(S.diagonal().mean()) or 1.0
    S.diagonal().add_(damping * mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(S))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def _levels(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return (w / scale + zero).round().clamp(0, 2**bits - 1)


def _scale_and_zero(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Step and zero point of a range that holds 0."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-9)
    return scale, -low / scale


def _outliers(w: Tensor, power: Tensor, bits: int, threshold: float) -> Tensor:
    """Weights without which the others of their group lose less by more than a threshold."""
    return _gains(w, power, bits) > threshold


def _gains(w: Float[Tensor, "out group"], power: Float[Tensor, " group"], bits: int) -> Float[Tensor, "out group"]:
    """By how much the weighted squared error of a group falls when one weight is kept and the range fits the others."""
    base = _weighted_error(w, *_scale_and_zero(w.amin(1), w.amax(1), bits), power, bits).sum(1, keepdim=True)
    size = w.shape[1]
    gains = torch.zeros_like(w)
    for index in range(size):
        rest = [other for other in range(size) if other != index]
        if not rest:
            continue
        others = w[:, rest]
        error = _weighted_error(others, *_scale_and_zero(others.amin(1), others.amax(1), bits), power[rest], bits)
        gains[:, index] = (base - error.sum(1, keepdim=True))[:, 0]
    return gains


def _weighted_error(w: Tensor, scale: Tensor, zero: Tensor, power: Tensor, bits: int) -> Tensor:
    scale, zero = scale[:, None], zero[:, None]
    return ((_levels(w, scale, zero, bits) - zero) * scale - w).square() / power


def _threshold(W: Tensor, power: Tensor, grid: Grid) -> float:
    """The gain that as many weights exceed as may be kept, before any error was compensated."""
    if grid.outliers == 0:
        return float("inf")
    groups = range(0, W.shape[1], grid.group)
    spans = [slice(start, start + grid.group) for start in groups]
    gains = torch.cat([_gains(W[:, span], power[span], grid.bits).flatten() for span in spans])
    rank = max(1, int((1 - grid.outliers) * gains.numel()))
    return max(0.0, float(gains.kthvalue(rank).values))


def _fit(w: Tensor, used: Tensor, power: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Rounded scale and zero point of a group in every row, its outliers left out."""
    low = torch.where(used, w, torch.inf).amin(1)
    high = torch.where(used, w, -torch.inf).amax(1)
    low, high = (torch.where(part.isfinite(), part, 0.0) for part in (low, high))
    best = torch.full_like(low, torch.inf)
    scale, zero = _scale_and_zero(low, high, grid.bits)
    for shrink in SHRINKS:
        tried = _scale_and_zero(shrink * low, shrink * high, grid.bits)
        error = torch.where(used, _weighted_error(w, *tried, power, grid.bits), 0.0).sum(1)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = (torch.where(better, new, old) for new, old in zip(tried, (scale, zero), strict=True))
    scale_codes, scale_range = _rounded(scale, grid, floor=True)
    zero_codes, zero_range = _rounded(zero, grid)
    return scale_codes[:, None], zero_codes[:, None], torch.cat([scale_range, zero_range])[..., None]


def _rounded(values: Tensor, grid: Grid, floor: bool = False) -> tuple[Tensor, Tensor]:
    """Numbers of all rows in few bits, and the range of each block of rows: lowest value and step."""
    blocks = -(-len(values) // grid.rows)
    padded = torch.cat([values, values[-1:].expand(blocks * grid.rows - len(values))]).reshape(blocks, grid.rows)
    low = padded.amin(1).bfloat16()
    if floor:
        low = low.clamp(min=torch.finfo(torch.bfloat16).tiny)
    step = ((padded.amax(1) - low.float()) / (2**grid.statistics_bits - 1)).clamp(min=0).bfloat16()
    safe = torch.where(step == 0, 1.0, step.float())
    codes = ((padded - low.float()[:, None]) / safe[:, None]).round().clamp(0, 2**grid.statistics_bits - 1)
    return codes.reshape(-1)[: len(values)].to(torch.uint8), torch.stack([low, step])


def spqr_linear(quantized: Quantized, grid: Grid, bias: Tensor | None, dtype: torch.dtype) -> SpQRLinear:
    """The layer that stores a quantized matrix and computes in a dtype."""
    out_features, in_features = quantized.codes.shape
    rows, columns = quantized.outliers.T
    layer = SpQRLinear(
        in_features, out_features, len(columns), bias is not None, asdict(grid), quantized.codes.device, dtype
    )
    layer.codes = pack(quantized.codes, grid.bits)
    layer.scale_codes = pack(quantized.scale_codes, grid.statistics_bits)
    layer.zero_codes = pack(quantized.zero_codes, grid.statistics_bits)
    layer.ranges = quantized.ranges.view(torch.int16).contiguous()
    layer.outlier_counts = torch.bincount(rows, minlength=out_features).to(layer.outlier_counts)
    layer.outlier_columns = columns.to(layer.outlier_columns)
    layer.outlier_values = quantized.values.view(torch.int16)
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias.detach().to(dtype))
    return layer


def _quantize(weight: Tensor, bias: Tensor | None, second: Tensor, grid: Grid) -> SpQRLinear:
    return spqr_linear(spqr(weight, second, grid), grid, bias, weight.dtype)


def _bytes(out_features: int, in_features: int, grid: Grid) -> int:
    """Bytes of a matrix: codes, statistics and their ranges, and outliers, whose number is a target."""
    groups, blocks = -(-in_features // grid.group), -(-out_features // grid.rows)
    place = 2 if in_features <= 2**15 else 4
    codes = grid.bits * -(-out_features * in_features // 8)
    statistics = 2 * grid.statistics_bits * -(-out_features * groups // 8) + 2 * 4 * blocks * groups
    return codes + statistics + place * out_features + (place + 2) * int(grid.outliers * out_features * in_features)


SPQR = Quantizer(settings=Grid, bytes=_bytes, few=lambda grid: grid.bits <= 4, quantize=_quantize, module=SpQRLinear)
