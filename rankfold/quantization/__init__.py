"""Weights and factors stored in few bits."""

from rankfold.modules.storages import QUANTIZERS, Quantizer, quantizer_at, settings_for
from rankfold.quantization.blocks import quantize_blocks
from rankfold.quantization.library import Summary, pad_ranks, quantize_by_library
from rankfold.quantization.spqr import Grid, Quantized, spqr, spqr_linear

__all__ = [
    "QUANTIZERS",
    "Grid",
    "Quantized",
    "Quantizer",
    "Summary",
    "pad_ranks",
    "quantize_blocks",
    "quantize_by_library",
    "quantizer_at",
    "settings_for",
    "spqr",
    "spqr_linear",
]
