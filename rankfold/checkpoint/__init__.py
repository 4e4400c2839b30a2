"""Checkpoints: models read from wherever they lie, and written as ordinary Hugging Face folders."""

from rankfold.checkpoint.reading import (
    ADAPTER,
    SPREAD,
    check_source,
    chosen_device,
    is_factorized,
    is_gguf,
    load,
    load_model,
    load_tokenizer,
    quantized_by_library,
    stored_dtype,
    tokenizer_if_any,
)
from rankfold.checkpoint.writing import export_dense, save, save_adapters

__all__ = [
    "ADAPTER",
    "SPREAD",
    "check_source",
    "chosen_device",
    "export_dense",
    "is_factorized",
    "is_gguf",
    "load",
    "load_model",
    "load_tokenizer",
    "quantized_by_library",
    "save",
    "save_adapters",
    "stored_dtype",
    "tokenizer_if_any",
]
