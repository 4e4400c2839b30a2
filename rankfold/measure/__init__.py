"""Models measured side by side on the same text and the same machine, as records."""

from rankfold.measure.cost import (
    circumstances,
    measure_energy,
    measure_latency,
    measure_limits,
    measure_memory,
    measure_size,
)
from rankfold.measure.quality import (
    Scored,
    default_length,
    evaluation_windows,
    measure_accuracy,
    measure_quality,
    measure_repetition,
    measure_score,
    scorer_for,
)
from rankfold.measure.table import table

__all__ = [
    "Scored",
    "circumstances",
    "default_length",
    "evaluation_windows",
    "measure_accuracy",
    "measure_energy",
    "measure_latency",
    "measure_limits",
    "measure_memory",
    "measure_quality",
    "measure_repetition",
    "measure_score",
    "measure_size",
    "scorer_for",
    "table",
]
