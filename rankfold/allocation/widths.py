"""Options of one budget over bits and ranks: few bits, low rank, and few bits with a low rank beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankfold.allocation.options import Array, SiteOptions
from rankfold.allocation.ranks import dense_option, groups
from rankfold.errors import InputError
from rankfold.modules import WHOLE_MATRIX, WHOLE_ROW, quantizer_at, settings_for
from rankfold.plan import DENSE, Option
from rankfold.sites import Site

WAYS = ("rank", "bits")
"""What a budget may be spent on: the values of `rankfold compress --allow`, alone or both."""

SCHEME = "gptq"
"""The quantizer of matrices and factors."""

FACTOR_BITS = (4, 8)
"""Bits in which factors are offered."""

MULTIPLE = 8
"""Ranks that are offered are multiples of this."""

ROUNDING = {4: 0.015, 8: 0.0001}
"""Share of what factors stand for, in predicted loss, that rounding both of them costs (docs/log.md)."""


@dataclass(frozen=True)
class WidthLosses:
    """Predicted losses of one site in nats per token, each at the ranks from 0 to full, at steps of `MULTIPLE`."""

    low_rank: Array
    """Of the matrix at a rank and nothing else."""
    rounded: Mapping[tuple[int, int], Array]
    """By (bits, group): of the rounded matrix with a compensation of this rank."""

    def plus(self, other: WidthLosses) -> WidthLosses:
        """The losses of two sites that get one option."""
        rounded = {width: losses + other.rounded[width] for width, losses in self.rounded.items()}
        return WidthLosses(self.low_rank + other.low_rank, rounded)


def check_ways(allow: Sequence[str]) -> tuple[str, ...]:
    """What a budget may be spent on.

    Raises:
        ValueError: If it names something else, or nothing.
    """
    if not allow or not set(allow) <= set(WAYS):
        raise InputError(f"`allow` must name {' or '.join(WAYS)}, or both, but got {', '.join(allow) or 'nothing'!r}.")
    return tuple(way for way in WAYS if way in allow)


def width_options(
    sites: Sequence[Site],
    losses: Mapping[str, WidthLosses],
    *,
    ways: Sequence[str] = WAYS,
    multiple: int = 1,
) -> list[SiteOptions]:
    """Everything that a site can become in few bits, at a low rank, or both, and staying dense.

    With `bits` alone no rank is offered, with both also the compensation of what rounding costs.

    Args:
        sites: Sites to decide on; the slices of one stack of experts get one option.
        losses: Predicted losses by site; sites without them stay dense.
        ways: Of `WAYS`.
        multiple: Ranks are multiples of this too.
    """
    step = int(np.lcm(multiple, MULTIPLE))
    result = []
    for group in groups(sites):
        known = [site for site in group if site.name in losses]
        unknown = [site for site in group if site.name not in losses]
        if known:
            total = losses[known[0].name]
            for site in known[1:]:
                total = total.plus(losses[site.name])
            result.append(_of_group(known, total, tuple(ways), step))
        if unknown:
            result.append(_of_group(unknown, None, tuple(ways), step))
    return result


def uniform_widths(sites: Sequence[Site], losses: Mapping[str, WidthLosses]) -> list[dict[str, Any]]:
    """What the same bits everywhere would store and are predicted to cost, for comparison: bits, bytes and loss."""
    table = []
    for bits, size in next(iter(losses.values())).rounded:
        stored = predicted = 0.0
        for site in sites:
            known = losses.get(site.name)
            shape = (site.out_features, site.in_features)
            bias = site.bytes_per_parameter * site.out_features * site.bias
            stored += bias + (matrix_bytes(shape, bits, size) if known else site.bytes_per_parameter * math.prod(shape))
            predicted += float(known.rounded[bits, size][0]) if known else 0.0
        table.append({"bits": bits, "bytes": stored, "loss": float(f"{predicted:.5g}")})
    return table


def matrix_bytes(shape: tuple[int, int], bits: int, group: int) -> int:
    """Bytes of a quantized matrix (out, in), its bias left out."""
    return quantizer_at(SCHEME).bytes(*shape, settings_for(SCHEME, {"bits": bits, "group": group}))


def factor_bytes(shape: tuple[int, int], rank: int, bits: int) -> int:
    """Bytes of the two factors of a matrix (out, in)."""
    return matrix_bytes((shape[0], rank), bits, WHOLE_MATRIX) + matrix_bytes((rank, shape[1]), bits, WHOLE_ROW)


def _of_group(group: Sequence[Site], losses: WidthLosses | None, ways: tuple[str, ...], step: int) -> SiteOptions:
    site, count = group[0], len(group)
    shape = (site.out_features, site.in_features)
    full = min(shape)
    note = "" if losses is not None else "no calibration token reached it, or no gradient"
    dense = dense_option(group, note)
    made: list[Option] = []
    predicted: list[NDArray[np.float64]] = []
    ranks = range(step, full // 2 + 1, step)

    def offer(form: str, bits: int | None, size: int | None, curve: Array) -> None:
        stored = 0 if bits is None or size is None else matrix_bytes(shape, bits, size)
        if bits is not None:
            made.append(_option(group, DENSE, (), bits, size, None, stored))
            predicted.append(curve[:1])
        for factor_bits in FACTOR_BITS if "rank" in ways else ():
            offered = [rank for rank in ranks if stored + factor_bytes(shape, rank, factor_bits) < dense.bytes / count]
            made.extend(
                _option(
                    group, form, (rank,), bits, size, factor_bits, stored + factor_bytes(shape, rank, factor_bits)
                )
                for rank in offered
            )  # fmt: skip
            left = curve[[rank // MULTIPLE for rank in offered]]
            predicted.append(left + ROUNDING[factor_bits] * (curve[0] - left))

    if losses is not None and "rank" in ways:
        offer("low_rank", None, None, losses.low_rank)
    if losses is not None and "bits" in ways:
        for (bits, size), curve in losses.rounded.items():
            offer("compensated", bits, size, curve)
    options = [*made, dense]
    return SiteOptions(
        site.name,
        np.array([o.ranks[0] / full if o.form == "low_rank" else 1.0 for o in options]),
        np.array([o.parameters for o in options], dtype=float),
        np.array([o.bytes for o in options], dtype=float),
        np.concatenate([*predicted, np.zeros(1)]),
        options.__getitem__,
        full,
        shape,
        multiple=step,
        by_rank=False,
    )


def _option(
    group: Sequence[Site],
    form: str,
    ranks: tuple[int, ...],
    bits: int | None,
    size: int | None,
    factor_bits: int | None,
    stored: int,
) -> Option:
    site, count = group[0], len(group)
    numbers = (0 if form == "low_rank" else site.out_features * site.in_features) + site.out_features * site.bias
    numbers += sum(ranks) * (site.out_features + site.in_features)
    return Option(
        sites=tuple(site.name for site in group),
        form=form,
        ranks=ranks,
        bias=site.bias,
        bits=bits,
        group=size,
        factor_bits=factor_bits,
        parameters=count * numbers,
        bytes=count * (stored + site.bytes_per_parameter * site.out_features * site.bias),
    )
