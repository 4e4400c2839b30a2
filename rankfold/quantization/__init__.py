"""Weights and factors stored in few bits."""

from rankfold.modules.storages import QUANTIZERS, Quantizer, quantizer_at, settings_for
from rankfold.quantization.blocks import quantize_blocks
from rankfold.quantization.embeddings import (
    EMBEDDING_BITS,
    Embeddings,
    Width,
    embedding_widths,
    find_embeddings,
    put_in_bits,
)
from rankfold.quantization.fitting import WIDTHS, fit, width_losses
from rankfold.quantization.gptq import Groups, Levels, gptq, gptq_linear
from rankfold.quantization.library import Summary, pad_ranks, quantize_by_library
from rankfold.quantization.shared_budget import compress_in_bits, store_quantizations
from rankfold.quantization.spqr import Grid, Quantized, spqr, spqr_linear

__all__ = [
    "EMBEDDING_BITS",
    "QUANTIZERS",
    "WIDTHS",
    "Embeddings",
    "Grid",
    "Groups",
    "Levels",
    "Quantized",
    "Quantizer",
    "Summary",
    "Width",
    "compress_in_bits",
    "embedding_widths",
    "find_embeddings",
    "fit",
    "gptq",
    "gptq_linear",
    "pad_ranks",
    "put_in_bits",
    "quantize_blocks",
    "quantize_by_library",
    "quantizer_at",
    "settings_for",
    "spqr",
    "spqr_linear",
    "store_quantizations",
    "width_losses",
]
