"""Weights and factors stored in few bits."""

from rankfold.quantization.blocks import is_linear, quantize_blocks
from rankfold.quantization.library import SCHEMES, Summary, pad_ranks, quantize_by_library
from rankfold.quantization.spqr import Grid, Quantized, bits_per_weight, spqr, spqr_linear

__all__ = [
    "SCHEMES",
    "Grid",
    "Quantized",
    "Summary",
    "bits_per_weight",
    "is_linear",
    "pad_ranks",
    "quantize_blocks",
    "quantize_by_library",
    "spqr",
    "spqr_linear",
]
