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
from rankfold.cost.option_seconds import (
    SPEED_OF,
    OptionSeconds,
    TimedLayer,
    layer_seconds,
    model_seconds,
    seconds_of_layers,
    share_for,
    timed_layers,
)
from rankfold.cost.rank_speed import fast_multiple, neighbouring_ranks, rank_seconds
from rankfold.cost.relative import relative_cost
from rankfold.cost.roofline import Layer, Peaks, Timed, measure_peaks, time_layers

__all__ = [
    "SPEED_OF",
    "Latency",
    "Layer",
    "Meter",
    "OptionSeconds",
    "Peaks",
    "Reading",
    "Timed",
    "TimedLayer",
    "cache_bytes",
    "cache_of",
    "disk_bytes",
    "fast_multiple",
    "interleaved_energy",
    "interleaved_latency",
    "layer_seconds",
    "measure_peaks",
    "memory_bytes",
    "model_seconds",
    "neighbouring_ranks",
    "open_meter",
    "parameter_count",
    "peak_bytes",
    "rank_seconds",
    "reading",
    "relative_cost",
    "seconds_of_layers",
    "share_for",
    "time_layers",
    "timed_layers",
]
