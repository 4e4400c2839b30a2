"""A plan is carried out: sites become factorized modules, once or in rounds, and are corrected for drift."""

from rankfold.compression.drift import correct_drift
from rankfold.compression.joint import compress_stacks
from rankfold.compression.nested import adapt, nest, shrink
from rankfold.compression.replace import factorize, factorize_blocks, factorize_site
from rankfold.compression.rounds import compress_in_rounds, restore, with_layers

__all__ = [
    "adapt",
    "compress_in_rounds",
    "compress_stacks",
    "correct_drift",
    "factorize",
    "factorize_blocks",
    "factorize_site",
    "nest",
    "restore",
    "shrink",
    "with_layers",
]
