"""GPTQ: a matrix in few bits, column after column, each error compensated in the columns after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.nn import functional as F

from rankfold.errors import InputError
from rankfold.modules import WHOLE_MATRIX, GroupLinear, Quantizer

COLUMNS = 128
"""Columns whose errors are gathered before the columns after them are corrected."""

TILE = 64
"""Rows and columns of what is rounded at once where both moments are known."""

SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)
"""Shares of a group's range that are tried; a little is often cut off for finer steps."""

DAMPING = 0.01
"""Share of the mean power that is added to that of every direction, so that a moment can be inverted."""

DAMPING_OF_BOTH = 0.03
"""The same where both moments are inverted (docs/log.md)."""


@dataclass(frozen=True)
class Groups:
    """How finely a matrix is stored.

    Raises:
        ValueError: If a setting is out of range.
    """

    bits: int = 4
    """Bits of a weight and of a zero point."""
    group: int = 64
    """Consecutive weights of a row that share a scale and a zero point; 0 for one scale a row, without zero point."""

    def __post_init__(self) -> None:
        """Refuse what cannot be stored."""
        if not 2 <= self.bits <= 8:
            raise InputError(f"Weights are stored in 2 to 8 bits, but got {self.bits}.")
        if self.group < -1 or self.group == 1:
            raise InputError(f"A group holds at least 2 weights, or 0 for a whole row, but got {self.group}.")


class Levels(NamedTuple):
    """A matrix in few bits: `scale (code - zero)`."""

    codes: Integer[Tensor, "out in"]
    scales: Float[Tensor, "out groups"]
    """Rounded to float16."""
    zeros: Integer[Tensor, "out groups"]

    def matrix(self, group: int) -> Float[Tensor, "out in"]:
        """The matrix, in float32."""
        size = group if group > 0 else self.codes.shape[1]
        scales, zeros = (p.repeat_interleave(size, 1)[:, : self.codes.shape[1]] for p in (self.scales, self.zeros))
        return (self.codes.float() - zeros.float()) * scales


@torch.no_grad()
def gptq(
    weight: Float[Tensor, "out in"],
    second: Float[Tensor, "in in"],
    bits: int,
    group: int = 64,
    outputs: Float[Tensor, "out out"] | Float[Tensor, " out"] | None = None,
) -> Levels:
    """A matrix in few bits that changes the layer's outputs little (Frantar et al. 2022, arXiv:2210.17323).

    Columns are rounded in the order of falling input power, and the error of each is compensated in those after it by
    way of the inverse moment (docs/mathematics.md, eq. 11). With a moment of the loss's gradients at the outputs the
    errors of a column are compensated in its later rows too, so that what falls is the predicted loss, not the error
    of the outputs (Tseng et al. 2025, arXiv:2505.22988; eq. 13). Ranges of groups are searched on the weights as they
    are, and an error counts by how little can be compensated.

    Args:
        weight: The matrix.
        second: Second moment of the layer's inputs, `E[x x^T]`.
        bits: Bits of a weight.
        group: Weights of a row that share a scale; 0 for a whole row with zero in its middle, -1 for all rows.
        outputs: Second moment of the gradients, `E[g g^T]`; its diagonal does not change how a row is rounded.

    Raises:
        ValueError: If a weight or a moment is not finite.
    """
    return gptq_widths(weight, second, (bits,), group, outputs)[bits]


@torch.no_grad()
def gptq_widths(
    weight: Float[Tensor, "out in"],
    second: Float[Tensor, "in in"],
    widths: Sequence[int],
    group: int = 64,
    outputs: Float[Tensor, "out out"] | Float[Tensor, " out"] | None = None,
) -> dict[int, Levels]:
    """The same in several widths at once, which costs little more than in one.

    Raises:
        ValueError: If a weight or a moment is not finite.
    """
    for part in (weight, second, *(() if outputs is None else (outputs,))):
        if not bool(torch.isfinite(part).all()):
            raise InputError(
                "Weights and moments must be finite to be quantized, but some are NaN or infinite: the checkpoint is "
                "damaged, or its activations overflow. Take another, or load a float16 model with `dtype` bfloat16."
            )
    if outputs is not None and outputs.ndim == 1:
        # Rows whose gradients do not know each other have nothing to compensate in each other.
        outputs = None
    W = weight.float()
    rows, columns = W.shape
    across = second.diagonal().argsort(descending=True).to(W.device)
    damping = DAMPING if outputs is None else DAMPING_OF_BOTH
    S = _inverse_factor(second.to(W.device)[across][:, across], damping).float()
    power = torch.empty_like(S[0])
    power[across] = S.diagonal().square()
    top = 2.0 ** torch.tensor(list(widths), device=W.device) - 1
    each = top.repeat_interleave(rows)[:, None]
    scales, zeros = (
        part.reshape(len(widths), rows, -1) for part in _ranges(W.repeat(len(widths), 1), power, each, group)
    )
    size = group if group > 0 else columns
    where = across // size
    if outputs is None:
        down = torch.arange(rows, device=W.device)
        problem = _Problem(W[:, across], scales[:, :, where], zeros[:, :, where], top)
        codes = _round_columns(problem, S)
    else:
        down = outputs.diagonal().argsort(descending=True).to(W.device)
        G = _inverse_factor(outputs.to(W.device)[down][:, down], damping).float()
        problem = _Problem(W[down][:, across], scales[:, down][:, :, where], zeros[:, down][:, :, where], top)
        codes = _round_both_ways(problem, G, S)
    levels = torch.empty_like(codes)
    levels[:, down[:, None], across[None]] = codes
    return {
        width: Levels(found, scale, zero.to(torch.uint8))
        for width, found, scale, zero in zip(widths, levels, scales, zeros, strict=True)
    }


class _Problem(NamedTuple):
    """What is to be rounded, in the order in which that is done."""

    weight: Float[Tensor, "rows columns"]
    scales: Float[Tensor, "widths rows columns"]
    zeros: Float[Tensor, "widths rows columns"]
    top: Float[Tensor, " widths"]
    """Highest level."""


def _round_columns(problem: _Problem, S: Float[Tensor, "columns columns"]) -> Integer[Tensor, "widths rows columns"]:
    """Levels column after column, the rows not knowing each other."""
    W = problem.weight.expand_as(problem.scales).clone()
    codes = torch.zeros_like(W, dtype=torch.uint8)
    columns, top = W.shape[2], problem.top[:, None]
    for start in range(0, columns, COLUMNS):
        end = min(start + COLUMNS, columns)
        errors = torch.zeros_like(W[:, :, start:end])
        for column in range(start, end):
            w, scale, zero = W[:, :, column], problem.scales[:, :, column], problem.zeros[:, :, column]
            level = torch.minimum((w / scale + zero).round().clamp_(min=0), top)
            codes[:, :, column] = level.to(torch.uint8)
            error = (w - (level - zero) * scale) / S[column, column]
            W[:, :, column + 1 : end] -= error[..., None] * S[column, column + 1 : end]
            errors[:, :, column - start] = error
        W[:, :, end:] -= errors @ S[start:end, end:]
    return codes


def _round_both_ways(
    problem: _Problem, G: Float[Tensor, "rows rows"], S: Float[Tensor, "columns columns"]
) -> Integer[Tensor, "widths rows columns"]:
    """Levels in an order in which the errors of all earlier rows and columns are known.

    With the factors `G` and `S` of both inverse moments, the error at `(i, j)` moves the target at every later
    `(i', j')` by `G[i, i'] S[j, j']`. Square tiles on one diagonal of the matrix do not depend on each other and are
    rounded together; what they mean for later tiles goes there in products of whole tiles.
    """
    count, rows, columns = problem.scales.shape
    # What is filled up is 0, is rounded to 0, and moves nothing.
    more = (0, -columns % TILE, 0, -rows % TILE)
    W = F.pad(problem.weight, more).repeat(count, 1, 1)
    scales, zeros = F.pad(problem.scales, more, value=1.0), F.pad(problem.zeros, more)
    G, S = _filled_up(G), _filled_up(S)
    high, wide = W.shape[1] // TILE, W.shape[2] // TILE
    spans = [slice(start, start + TILE) for start in range(0, max(W.shape[1:]), TILE)]
    # The errors above a tile, each times what it means for the tile's rows.
    above = torch.zeros_like(W)
    codes = torch.zeros_like(W, dtype=torch.uint8)
    for diagonal in range(high + wide - 1):
        places = [(spans[i], spans[diagonal - i]) for i in range(max(0, diagonal - wide + 1), min(high, diagonal + 1))]
        fallen, targets, scale, zero = (
            torch.stack([part[:, r, c] for r, c in places], 1) for part in (above, W, scales, zeros)
        )
        own, other = torch.stack([S[c, c] for _, c in places]), torch.stack([G[r, r] for r, _ in places])
        levels, errors, passed = _round_tiles(targets - fallen @ own, scale, zero, problem.top, other, own)
        for k, (r, c) in enumerate(places):
            codes[:, r, c] = levels[:, k].to(torch.uint8)
            above[:, r.stop :, c] += G[r, r.stop :].T @ errors[:, k]
            W[:, r, c.stop :] -= (fallen[:, k] + passed[:, k]) @ S[c, c.stop :]
    return codes[:, :rows, :columns]


def _filled_up(factor: Float[Tensor, "size size"]) -> Float[Tensor, "more more"]:
    """A factor with ones on the diagonal beyond its end, up to a whole number of tiles."""
    size = len(factor)
    missing = -size % TILE
    filled = F.pad(factor, (0, missing, 0, missing))
    filled.diagonal()[size:] = 1
    return filled


def _round_tiles(
    targets: Float[Tensor, "widths tiles size size"],
    scales: Float[Tensor, "widths tiles size size"],
    zeros: Float[Tensor, "widths tiles size size"],
    top: Float[Tensor, " widths"],
    G: Float[Tensor, "tiles size size"],
    S: Float[Tensor, "tiles size size"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Levels of tiles, diagonal after diagonal; their errors, and these added up down the rows as `G` weighs them."""
    size = targets.shape[-1]
    # Columns are reversed, so that a diagonal runs down and to the right.
    targets, scales, zeros = (part.flip(3) for part in (targets, scales, zeros))
    factor = S.flip(1, 2)
    own, other = factor.diagonal(dim1=1, dim2=2), G.diagonal(dim1=1, dim2=2)
    before = factor.mT.triu(1)
    # What the errors of a column, from the top to the row that is next, mean for each of its rows.
    moved = torch.zeros_like(targets)
    levels, errors, passed = (torch.zeros_like(targets) for _ in range(3))
    for step in range(2 * size - 1):
        low, high = max(0, step - size + 1), min(size, step + 1)
        first = size - 1 - step + low
        r, c = slice(low, high), slice(first, first + high - low)
        target, scale, zero, level_at, error_at, passed_at = (
            part[:, :, r, c].diagonal(dim1=2, dim2=3) for part in (targets, scales, zeros, levels, errors, passed)
        )
        moved_at = moved[:, :, c, r].diagonal(dim1=2, dim2=3)
        target = target - moved_at * own[:, c] - (passed[:, :, r] * before[:, c]).sum(3)
        level = torch.minimum((target / scale + zero).round_().clamp_(min=0), top[:, None, None])
        error = (target - (level - zero) * scale) / (other[:, r] * own[:, c])
        moved[:, :, c, low:].addcmul_(error[..., None], G[:, r, low:])
        level_at.copy_(level)
        error_at.copy_(error)
        passed_at.copy_(moved_at)
    return levels.flip(3), errors.flip(3), passed.flip(3)


def _inverse_factor(second: Float[Tensor, "in in"], damping: float) -> Float[Tensor, "in in"]:
    """Upper Cholesky factor of the inverse of the damped moment, in float64."""
    S = second.double().clone()
    S.diagonal().add_(damping * (float(S.diagonal().mean()) or 1.0))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(S))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def _ranges(
    W: Float[Tensor, "out in"], power: Float[Tensor, " in"], top: Float[Tensor, "out 1"], group: int
) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    """Scale and zero point of every group: of several cuts of its range the one with the smallest weighted error."""
    size = group if group > 0 else W.shape[1]
    missing = -W.shape[1] % size
    grouped = F.pad(W, (0, missing)).reshape(len(W), -1, size)
    # What is filled up costs nothing, and a range holds 0 in any case.
    counts = F.pad(1 / power, (0, missing)).reshape(-1, size)
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    if group <= 0:
        high = torch.maximum(high, -low)
        if group == WHOLE_MATRIX:
            high = high.amax().expand_as(high)
        low = -high
    best = torch.full_like(low, torch.inf)
    scales, zeros = torch.ones_like(low), torch.zeros_like(low)
    for shrink in SHRINKS:
        # Whole rows have zero in the middle, at level 2^(bits - 1).
        steps = top if group > 0 else (top - 1)
        scale = (shrink * (high - low) / steps).clamp(min=1e-7).half().float()
        zero = (-shrink * low / scale).round().clamp(min=0) if group > 0 else ((top + 1) / 2).expand_as(low)
        zero = torch.minimum(zero, top)
        level = torch.minimum((grouped / scale[..., None] + zero[..., None]).round().clamp_(min=0), top[..., None])
        error = (((level - zero[..., None]) * scale[..., None] - grouped).square_() * counts).sum(2)
        if group == WHOLE_MATRIX:
            error = error.sum().expand_as(error)
        better = error < best
        best = torch.where(better, error, best)
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
    return scales, zeros


def gptq_linear(levels: Levels, settings: Groups, bias: Tensor | None, dtype: torch.dtype) -> GroupLinear:
    """The layer that stores a quantized matrix and computes in a dtype."""
    zeros = levels.zeros if settings.group > 0 else None
    scales = levels.scales[:1] if settings.group == WHOLE_MATRIX else levels.scales
    return GroupLinear.from_codes(levels.codes, scales, zeros, asdict(settings), bias, dtype)


def _quantize(weight: Tensor, bias: Tensor | None, second: Tensor, settings: Groups) -> GroupLinear:
    return gptq_linear(gptq(weight, second, settings.bits, settings.group), settings, bias, weight.dtype)


def _bytes(out_features: int, in_features: int, settings: Groups) -> int:
    """Bytes of a matrix: codes, scales and zero points."""
    codes = settings.bits * -(-out_features * in_features // 8)
    if settings.group <= 0:
        return codes + 2 * (out_features if settings.group == 0 else 1)
    groups = -(-in_features // settings.group)
    return codes + 2 * out_features * groups + settings.bits * -(-out_features * groups // 8)


GPTQ = Quantizer(
    settings=Groups, bytes=_bytes, few=lambda groups: groups.bits <= 4, quantize=_quantize, module=GroupLinear
)
