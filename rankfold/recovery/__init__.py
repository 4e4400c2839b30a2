"""What training gives back: blocks refined one after the other, then the whole model against its dense teacher."""

from rankfold.recovery.difference import (
    Difference,
    check_relatives,
    difference_adapter,
    difference_plan,
    differences,
    remaining_divergence,
)
from rankfold.recovery.distill import Recovered, is_quantized, recover
from rankfold.recovery.refine import predicts, refine_blocks, refine_predictions
from rankfold.recovery.samples import sample_windows
from rankfold.recovery.texts import GENERATED, recovery_windows

__all__ = [
    "GENERATED",
    "Difference",
    "Recovered",
    "check_relatives",
    "difference_adapter",
    "difference_plan",
    "differences",
    "is_quantized",
    "predicts",
    "recover",
    "recovery_windows",
    "refine_blocks",
    "refine_predictions",
    "remaining_divergence",
    "sample_windows",
]
