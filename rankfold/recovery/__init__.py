"""What training gives back: blocks refined one after the other, then the whole model against its dense teacher."""

from rankfold.recovery.distill import Recovered, recover
from rankfold.recovery.refine import refine_blocks
from rankfold.recovery.samples import sample_windows

__all__ = ["Recovered", "recover", "refine_blocks", "sample_windows"]
