"""A plan is carried out: sites become factorized modules, once or in rounds, and are corrected for drift."""

from rankfold.compress.drift import correct_drift
from rankfold.compress.joint import compress_stacks
from rankfold.compress.nested import adapt, nest, shrink
from rankfold.compress.replace import (
    compress,
    compress_blocks,
    factorize_site,
    factorized_module,
    matrix_of,
    predicted_losses,
)
from rankfold.compress.rounds import compress_in_rounds, restore, with_layers

__all__ = [
    "adapt",
    "compress",
    "compress_blocks",
    "compress_in_rounds",
    "compress_stacks",
    "correct_drift",
    "factorize_site",
    "factorized_module",
    "matrix_of",
    "nest",
    "predicted_losses",
    "restore",
    "shrink",
    "with_layers",
]
