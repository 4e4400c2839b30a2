"""A plan is carried out: sites become factorized modules, once or in rounds, and are corrected for drift."""

from rankfold.compression.drift import Streams, correct_drift, fit_along
from rankfold.compression.joint import compress_stacks
from rankfold.compression.nested import adapt, nest, shrink
from rankfold.compression.replace import factorize, factorize_blocks, factorize_site, finish
from rankfold.compression.rounds import compress_in_rounds, decomposed, restore, with_layers

__all__ = [
    "Streams",
    "adapt",
    "compress_in_rounds",
    "compress_stacks",
    "correct_drift",
    "decomposed",
    "factorize",
    "factorize_blocks",
    "factorize_site",
    "finish",
    "fit_along",
    "nest",
    "restore",
    "shrink",
    "with_layers",
]
