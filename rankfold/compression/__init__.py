"""A plan is carried out: sites become factorized modules, once or in rounds, and are corrected for drift."""

from rankfold.compression.drift import correct_drift
from rankfold.compression.joint import compress_stacks
from rankfold.compression.nested import adapt, nest, shrink
from rankfold.compression.replace import (
    compress,
    compress_blocks,
    factorize_site,
    factorized_module,
    matrix_of,
    predicted_losses,
)
from rankfold.compression.rounds import compress_in_rounds, restore, with_layers

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
