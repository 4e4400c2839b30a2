"""What a model costs: the other axis of every plot."""

from rankfold.cost.energy import Meter, interleaved_energy, open_meter
from rankfold.cost.latency import Latency, cache_of, interleaved_latency
from rankfold.cost.memory import (
    Reading,
    cache_bytes,
    disk_bytes,
    memory_bytes,
    parameter_count,
    peak_bytes,
    reading,
)
from rankfold.cost.rank_speed import fast_multiple, neighbouring_ranks, rank_seconds
from rankfold.cost.relative import relative_cost
from rankfold.cost.roofline import Layer, Peaks, Timed, measure_peaks, time_layers

__all__ = [
    "Latency",
    "Layer",
    "Meter",
    "Peaks",
    "Reading",
    "Timed",
    "cache_bytes",
    "cache_of",
    "disk_bytes",
    "fast_multiple",
    "interleaved_energy",
    "interleaved_latency",
    "measure_peaks",
    "memory_bytes",
    "neighbouring_ranks",
    "open_meter",
    "parameter_count",
    "peak_bytes",
    "rank_seconds",
    "reading",
    "relative_cost",
    "time_layers",
]
