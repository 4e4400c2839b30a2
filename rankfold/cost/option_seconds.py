"""What options cost in seconds on the machine at hand: a price for allocations, from layers timed once a shape."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from rankfold.calibration import default_length
from rankfold.cost.latency import interleaved_latency, now
from rankfold.errors import InputError
from rankfold.modules import WHOLE_MATRIX, WHOLE_ROW, GroupLinear, form_at
from rankfold.plan import DENSE, Option
from rankfold.progress import Step, no_step
from rankfold.sites import Site

SPEED_OF = {"decode": 1, "prompt": 128}
"""What is made faster, and the tokens that layers are timed at."""

RUNGS = (0.02, 0.1, 0.25, 0.5, 0.75, 0.98)
"""Ranks that are timed, as shares of the full rank; between them seconds are interpolated."""

ROUNDS = 9
"""Timings of a layer, of which the median counts."""

SPILL = 2**26
"""Bytes written between two timings, so that layers come from memory as they do while a model runs."""

FEWEST_COPIES, MOST_COPIES = 2, 12
"""Layers of one shape that run one after the other, as in a model; fewer of large ones."""


class TimedLayer(NamedTuple):
    """What is timed: a whole matrix, or two factors, in the model's dtype or in few bits."""

    shape: tuple[int, int]
    form: str = DENSE
    rank: int = 0
    bits: int | None = None
    """Of the matrix, or of the factors."""
    group: int | None = None


class OptionSeconds:
    """Predicted seconds of an option's layers in one pass over so many tokens; calling it gives a `Price`."""

    def __init__(self, sites: Sequence[Site], seconds: Mapping[tuple[Any, ...], float]) -> None:
        """Prices from the seconds of what `timed_layers` lists."""
        self._sites = {site.name: site for site in sites}
        self.seconds = {tuple(key): value for key, value in seconds.items()}

    def fastest(self, names: Sequence[str]) -> float:
        """Seconds of some sites where each is what takes the least time, whatever that costs."""
        least: dict[tuple[int, int], float] = {}
        for key, seconds in self.seconds.items():
            least[key[0]] = min(seconds, least.get(key[0], seconds))
        sites = [self._sites[name] for name in names]
        return sum(least[site.out_features, site.in_features] * site.calls for site in sites)

    def __call__(self, option: Option) -> float:
        """Seconds of all sites of an option."""
        site = self._sites[option.sites[0]]
        shape = (site.out_features, site.in_features)
        each = 0.0
        if option.form in (DENSE, "compensated"):
            each += self.seconds[TimedLayer(shape, bits=option.bits, group=option.group)]
        if option.form != DENSE:
            form = "low_rank" if option.form == "compensated" else option.form
            ranks = _rungs(shape)
            curve = [self.seconds[TimedLayer(shape, form, rank, option.factor_bits)] for rank in ranks]
            each += float(np.interp(option.ranks[0], ranks, curve))
        return each * sum(self._sites[name].calls for name in option.sites)


def timed_layers(
    sites: Sequence[Site], form: str, widths: Sequence[tuple[int, int]] = (), factor_bits: Sequence[int] = ()
) -> Iterator[TimedLayer]:
    """What has to be timed to price every option of some sites.

    Args:
        sites: The sites.
        form: The form of ranks in the model's own dtype.
        widths: Bits and groups that matrices may have.
        factor_bits: Bits that factors may have; without any they have the model's dtype.
    """
    for shape in dict.fromkeys((site.out_features, site.in_features) for site in sites):
        yield TimedLayer(shape)
        for bits, group in widths:
            yield TimedLayer(shape, bits=bits, group=group)
        for rank in _rungs(shape):
            if not widths:
                yield TimedLayer(shape, form, rank)
            for bits in factor_bits:
                yield TimedLayer(shape, "low_rank", rank, bits)


@torch.no_grad()
def layer_seconds(
    timed: TimedLayer, tokens: int, dtype: torch.dtype, device: torch.device | str = "cpu", rounds: int = ROUNDS
) -> float:
    """Median seconds of a layer of random numbers over some tokens, its code in the caches and its weights not."""
    copies = max(FEWEST_COPIES, min(MOST_COPIES, SPILL // (2 * math.prod(timed.shape))))
    layers = [_layer(timed, dtype, device) for _ in range(copies)]
    x = torch.randn(1, tokens, timed.shape[1], device=device, dtype=dtype)
    spill = torch.empty(SPILL, dtype=torch.uint8, device=device)
    times = []
    for number in range(rounds + 1):
        spill.zero_()
        start = now(x.device)
        for layer in layers:
            layer(x)
        if number:  # kernels are prepared and compiled in the first pass
            times.append((now(x.device) - start) / copies)
    return statistics.median(times)


def model_seconds(models: Mapping[str, Any], speed_of: str) -> dict[str, float]:
    """Median seconds of one decoded token, or of a prompt, of models that take turns.

    Raises:
        ValueError: If one decodes no tokens one after the other.
    """
    first = next(iter(models.values()))
    prompt = min(SPEED_OF["prompt"], default_length(first.config) // 2)
    times = interleaved_latency(models, prompt_tokens=prompt, rounds=ROUNDS)
    if speed_of == "prompt":
        return {name: found.prefill_seconds for name, found in times.items()}
    seconds = {name: found.decode_seconds for name, found in times.items()}
    if None in seconds.values():
        raise InputError(
            f"Decoding is not timed of a {type(first).__name__}, which does not continue a text with a cache of what "
            "it has read. Ask for the speed of a prompt (`speed_of`)."
        )
    return {name: float(found or 0) for name, found in seconds.items()}


def share_for(speedup: float | int, whole: float, layers: float) -> float:
    """The share of their seconds that the layers of a model may keep.

    Args:
        speedup: How many times as fast the model shall be.
        whole: Seconds of the dense model.
        layers: Seconds of its layers among them.

    Raises:
        ValueError: If the model could not be as fast if they took no time.

    >>> round(share_for(1.25, whole=1.0, layers=0.8), 3)
    0.75
    """
    rest = max(0.0, whole - layers)
    share = (whole / speedup - rest) / min(layers, whole)
    if share <= 0:
        raise InputError(
            f"`speedup` must lie below {whole / rest:.2f} here, but got {speedup:g}: what is not compressed takes "
            f"{rest * 1e3:.1f} of {whole * 1e3:.1f} ms. Ask for less."
        )
    return min(1.0, share)


def seconds_of_layers(
    model: Any, layers: Sequence[TimedLayer], tokens: int, on_step: Step = no_step
) -> dict[tuple[Any, ...], float]:
    """Seconds of layers on the device and in the dtype of a model."""
    like = next(model.parameters())
    seconds: dict[tuple[Any, ...], float] = {}
    for timed in layers:
        seconds[tuple(timed)] = layer_seconds(timed, tokens, like.dtype, like.device)
        on_step()
    return seconds


def _rungs(shape: tuple[int, int]) -> list[int]:
    return sorted({max(1, int(share * min(shape))) for share in RUNGS})


def _layer(timed: TimedLayer, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """A layer of random numbers, without a bias."""
    out_features, in_features = timed.shape

    def matrix(rows: int, columns: int, group: int) -> nn.Module:
        if timed.bits is None:
            return nn.Linear(columns, rows, bias=False, device=device, dtype=dtype)
        layer = GroupLinear(columns, rows, None, False, {"bits": timed.bits, "group": group}, device, dtype)
        layer.codes.random_(0, 256)
        return layer

    if timed.form == DENSE:
        return matrix(out_features, in_features, timed.group or 0)
    entry = form_at(timed.form)
    made = entry.module(in_features, out_features, entry.at(timed.rank), bias=False, device=device, dtype=dtype)
    if timed.bits is not None:
        for name, part in (
            ("up", matrix(out_features, timed.rank, WHOLE_MATRIX)),
            ("down", matrix(timed.rank, in_features, WHOLE_ROW)),
        ):
            setattr(made, name, part)
    return made
