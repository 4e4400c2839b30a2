"""Checkpoints whose weights are in few bits already: made dense while they are loaded, or refused with the scheme."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from rankfold.errors import InputError


def scheme_of(config: Any) -> str | None:
    """Name of the scheme in which a configuration says that its weights are stored; `None` for ordinary weights."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    method = settings.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in settings else "an unnamed scheme")
    method = str(getattr(method, "value", method))
    if method == "bitsandbytes":
        return "bitsandbytes, 4 bits" if settings.get("load_in_4bit") else "bitsandbytes, 8 bits"
    return method


def _fp8() -> Any:
    from transformers import FineGrainedFP8Config

    return FineGrainedFP8Config(dequantize=True)


def _mxfp4() -> Any:
    from transformers.utils.quantization_config import Mxfp4Config

    return Mxfp4Config(dequantize=True)


def _compressed_tensors() -> Any:
    from transformers import CompressedTensorsConfig

    # Newer versions call it by the name that the other schemes have.
    known = inspect.signature(CompressedTensorsConfig).parameters
    setting: dict[str, Any] = {"dequantize": True} if "dequantize" in known else {"run_compressed": False}
    return CompressedTensorsConfig(**setting)  # type: ignore[no-untyped-call]


DEQUANTIZED: dict[str, Callable[[], Any] | None] = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed_tensors,
    "bitsandbytes, 4 bits": None,
    "bitsandbytes, 8 bits": None,
}
"""Schemes that transformers makes dense: by a setting while it loads, or, where there is none, afterwards."""


def loading_settings(scheme: str, source: object) -> dict[str, Any]:
    """What `from_pretrained` must be told so that it gives dense weights, as far as that is its business.

    Raises:
        ValueError: If transformers cannot make weights of this scheme dense.
    """
    if scheme not in DEQUANTIZED:
        raise InputError(
            f"{source}: its weights are already quantized with {scheme}, which transformers cannot dequantize, so "
            f"there is nothing to factorize. Use the checkpoint that it was made from. Readable quantized formats: "
            f"{', '.join(DEQUANTIZED)}."
        )
    setting = DEQUANTIZED[scheme]
    return {} if setting is None else {"quantization_config": setting()}


def made_dense(model: Any, source: object, scheme: str) -> Any:
    """The model with ordinary weights, from one that a library holds in few bits.

    Raises:
        ValueError: If the library cannot do that here.
    """
    if scheme in DEQUANTIZED and DEQUANTIZED[scheme] is None:
        try:
            model = model.dequantize()
        except (RuntimeError, ValueError, NotImplementedError, AttributeError) as error:
            raise InputError(f"{source}: {scheme} weights could not be dequantized here ({error}).") from error
    model.hf_quantizer = None
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized"):
        if getattr(model, name, False):
            setattr(model, name, False)
    model.quantization_method = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model
