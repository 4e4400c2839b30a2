"""What a model costs: the other axis of every plot."""

from rankfold.cost.hardware import hardware
from rankfold.cost.latency import Latency, interleaved_latency
from rankfold.cost.memory import Reading, disk_bytes, memory_bytes, parameter_count, reading

__all__ = [
    "Latency",
    "Reading",
    "disk_bytes",
    "hardware",
    "interleaved_latency",
    "memory_bytes",
    "parameter_count",
    "reading",
]
