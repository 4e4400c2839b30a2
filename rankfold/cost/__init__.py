"""What a model costs: the other axis of every plot."""

from rankfold.cost.hardware import hardware
from rankfold.cost.latency import Latency, interleaved_latency
from rankfold.cost.memory import Reading, disk_bytes, memory_bytes, parameter_count, reading
from rankfold.cost.rank_speed import fast_multiple, neighbouring_ranks, rank_seconds

__all__ = [
    "Latency",
    "Reading",
    "disk_bytes",
    "fast_multiple",
    "hardware",
    "interleaved_latency",
    "memory_bytes",
    "neighbouring_ranks",
    "parameter_count",
    "rank_seconds",
    "reading",
]
