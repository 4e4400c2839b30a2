"""Roofline: what bandwidth and arithmetic of a machine allow for a layer in any form, beside what it takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rankfold.cost.latency import now
from rankfold.progress import Step, no_step

CACHE_BYTES = 3 * 2**28
"""Weights are taken in turns from more bytes than a last-level cache holds."""

MOST_COPIES = 128
"""Of layers so small that calls are all of their time."""

ROUNDS = 9


class Peaks(NamedTuple):
    """What a machine reaches at most, measured."""

    bytes_per_second: float
    """Reading memory."""
    flops_per_second: float
    """Of one matrix product."""

    @property
    def ridge(self) -> float:
        """Intensity above which arithmetic is the limit, in FLOPs a byte."""
        return self.flops_per_second / self.bytes_per_second


class Layer(NamedTuple):
    """A site in one form: the shapes of the products that it consists of."""

    name: str
    shapes: tuple[tuple[int, int], ...]
    """(out, in) of each matrix, in the order of use."""

    def flops(self, tokens: int) -> int:
        """Of a call with so many tokens: two for every stored number and token."""
        return 2 * tokens * sum(rows * columns for rows, columns in self.shapes)

    def moved(self, tokens: int, size: int) -> int:
        """Bytes that a call moves at least: every matrix, and what enters and leaves each product."""
        return size * sum(rows * columns + tokens * (rows + columns) for rows, columns in self.shapes)

    def intensity(self, tokens: int, size: int) -> float:
        """FLOPs a byte."""
        return self.flops(tokens) / self.moved(tokens, size)

    def seconds(self, tokens: int, size: int, peaks: Peaks) -> float:
        """The least that the roofline allows (Williams et al. 2009), product after product."""
        parts = [Layer(self.name, (shape,)) for shape in self.shapes]
        return sum(
            max(part.flops(tokens) / peaks.flops_per_second, part.moved(tokens, size) / peaks.bytes_per_second)
            for part in parts
        )


class Timed(NamedTuple):
    """A layer's time beside what was predicted."""

    layer: Layer
    tokens: int
    predicted_seconds: float
    measured_seconds: float
    contended: bool


@torch.no_grad()
def measure_peaks(device: str = "cpu", dtype: torch.dtype = torch.float32, on_step: Step = no_step) -> Peaks:
    """Bandwidth by a matrix times a vector that no cache holds, arithmetic by a large product; the best of some rounds.

    Args:
        device: Where.
        dtype: Dtype of the numbers.
        on_step: Called after each of `ROUNDS` rounds.
    """
    size = torch.finfo(dtype).bits // 8
    rows = CACHE_BYTES // size // 8192
    # Written, not allocated only: pages that were never touched are all the same page.
    tall = torch.ones(rows, 8192, device=device, dtype=dtype)
    vector = torch.ones(8192, device=device, dtype=dtype)
    a = torch.randn(2048, 4096, device=device).to(dtype)
    b = torch.randn(4096, 4096, device=device).to(dtype)
    reading, computing = [], []
    for number in range(ROUNDS + 1):
        reading.append(_seconds(lambda: F.linear(vector, tall), device))
        computing.append(_seconds(lambda: F.linear(a, b), device))
        if number:
            on_step()
    return Peaks(rows * 8192 * size / min(reading[1:]), 2 * 2048 * 4096 * 4096 / min(computing[1:]))


@torch.no_grad()
def time_layers(
    layers: Sequence[Layer],
    peaks: Peaks,
    *,
    tokens: int = 1,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    on_step: Step = no_step,
) -> list[Timed]:
    """Seconds of each layer, all taking turns, on weights that are not in a cache.

    Args:
        layers: What to time.
        peaks: The machine, for the prediction.
        tokens: Tokens of a call.
        device: Where.
        dtype: Dtype of the weights.
        on_step: Called after each of `ROUNDS` rounds.
    """
    size = torch.finfo(dtype).bits // 8
    # The other layers' turns empty a cache too, so each needs its part of the bytes only.
    each = max(CACHE_BYTES // max(len(layers) - 1, 1), 2**26)
    copies = [[_weights(layer, device, dtype) for _ in range(_copies(layer, size, each))] for layer in layers]
    times: list[list[float]] = [[] for _ in layers]
    busy = wall = 0.0
    for number in range(ROUNDS + 1):
        cpu_start, wall_start = time.process_time(), time.perf_counter()
        for place, layer in enumerate(layers):
            x = torch.randn(tokens, layer.shapes[0][1], device=device).to(dtype)

            def run(place: int = place, x: Tensor = x) -> None:
                for matrices in copies[place]:
                    y = x
                    for matrix in matrices:
                        y = F.linear(y, matrix)

            times[place].append(_seconds(run, device) / len(copies[place]))
        if number:
            busy += time.process_time() - cpu_start
            wall += time.perf_counter() - wall_start
            on_step()
    held_up = device == "cpu" and busy < 0.9 * wall
    return [
        Timed(layer, tokens, layer.seconds(tokens, size, peaks), statistics.median(series[1:]), held_up)
        for layer, series in zip(layers, times, strict=True)
    ]


def _copies(layer: Layer, size: int, least: int) -> int:
    """How often a layer's weights are there, to fill so many bytes."""
    stored = size * sum(rows * columns for rows, columns in layer.shapes)
    return min(max(1, -(-least // stored)), MOST_COPIES)


def _weights(layer: Layer, device: str, dtype: torch.dtype) -> list[Tensor]:
    return [torch.ones(rows, columns, device=device, dtype=dtype) for rows, columns in layer.shapes]


def _seconds(work: Callable[[], object], device: str) -> float:
    place = torch.device(device)
    start = now(place)
    work()
    return now(place) - start
