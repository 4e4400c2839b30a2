"""Models measured side by side on the same text and the same machine, as records."""

from rankfold.measurement.cost import (
    measure_energy,
    measure_latency,
    measure_limits,
    measure_memory,
    measure_size,
)
from rankfold.measurement.paired import paired_record
from rankfold.measurement.quality import (
    Scored,
    evaluation_windows,
    measure_accuracy,
    measure_quality,
    measure_repetition,
    measure_score,
    scorer_for,
)
from rankfold.measurement.side_by_side import HELD_OUT_TEXTS, check_comparable, measure
from rankfold.measurement.table import table

__all__ = [
    "HELD_OUT_TEXTS",
    "Scored",
    "check_comparable",
    "evaluation_windows",
    "measure",
    "measure_accuracy",
    "measure_energy",
    "measure_latency",
    "measure_limits",
    "measure_memory",
    "measure_quality",
    "measure_repetition",
    "measure_score",
    "measure_size",
    "paired_record",
    "scorer_for",
    "table",
]
