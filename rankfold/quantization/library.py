"""Weights and factors in 8 or 4 bits by bitsandbytes, every layer tested after it: on CPUs some come out wrong."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankfold.architectures import auto_class_for
from rankfold.checkpoint import ADAPTER, chosen_device, load_model, quantized_by_library, save
from rankfold.errors import InputError
from rankfold.modules import LowRankLinear, QuantizedLinear, Quantizer, keep_storage, linear_at, stored_matrix
from rankfold.plan import Plan
from rankfold.sites import example_ids, text_arguments

TOLERANCE = {"int8": 0.05, "nf4": 0.2}
"""Relative error of a layer's outputs from which on the library is taken to have failed."""

MULTIPLE = 64
"""Ranks of 4-bit factors are filled up to a multiple of this: kernels on CPUs misread the scales of other rows."""


_BROKEN = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError)
"""What models raise that do not run."""


class Summary(NamedTuple):
    """What was done to which layers."""

    quantized: tuple[str, ...]
    left: tuple[str, ...]
    """Layers that failed the test, or whose weights are read as numbers, and stay as they were."""
    padded: int
    """Numbers, all of them zeros, by which factors were filled up."""


def quantize_by_library(
    source: str | Path, scheme: str, *, dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
) -> tuple[Any, Summary]:
    """Quantize the linear layers of a model, dense or factorized, to 8 or 4 bits (arXiv:2208.07339, 2305.14314).

    Every layer is then compared with the original on random inputs; those that fail stay in 16 bits.

    Args:
        source: A model folder or the name of a model on the hub.
        scheme: `int8` or `nf4`.
        dtype: Dtype of what is not quantized.
        device: Where to compute.

    Raises:
        ValueError: If bitsandbytes is not installed, the scheme is unknown, or no layer passes the test.
    """
    if scheme not in TOLERANCE:
        raise InputError(f"bitsandbytes quantizes to {' or '.join(TOLERANCE)}, but got {scheme!r}.")
    settings = _settings(scheme, dtype)
    device = str(chosen_device(device))
    if (Path(source) / ADAPTER).is_file() or quantized_by_library(source):
        raise InputError(f"{source}: already quantized, or adapters over such a model. Quantize what it was made from.")
    dense = load_model(source, dtype=dtype)
    if any(isinstance(module, QuantizedLinear) for module in dense.modules()):
        raise InputError(f"{source}: already quantized. Quantize the checkpoint that it was made from.")
    padded = pad_ranks(dense, MULTIPLE) if scheme == "nf4" else 0
    head = [name for name, module in dense.named_modules() if module is dense.get_output_embeddings()]
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        save(dense, None, Path(folder) / "dense")
        while True:
            made = auto_class_for(dense.config).from_pretrained(
                Path(folder) / "dense", quantization_config=settings(head + failed), device_map=device, dtype=dtype
            )
            keep_storage(made)
            layers = _quantized_layers(made)
            wrong = [name for name, layer in layers.items() if not _passes(layer, dense.get_submodule(name), scheme)]
            if not set(wrong) - set(failed):
                wrong += _read_directly(made, dense, layers)
            if set(wrong) <= set(failed):
                break
            failed += wrong
    if not layers or wrong:
        raise InputError(f"{source}: bitsandbytes quantizes no layer of this model correctly here ({scheme}).")
    # Where it was loaded from is a folder that is gone.
    made.name_or_path = made.config._name_or_path = str(source)
    return made.eval(), Summary(tuple(layers), tuple(failed), padded)


def _settings(scheme: str, dtype: torch.dtype) -> Callable[[list[str]], Any]:
    """The library's configuration for a list of layers that it is to leave alone."""
    from transformers import BitsAndBytesConfig

    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise InputError(f"{scheme} needs bitsandbytes: pip install 'rankfold[quantization]'") from error
    if scheme == "int8":
        return lambda skip: BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)  # type: ignore[no-untyped-call]
    return lambda skip: BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=skip
    )


def _quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    names = {"Linear8bitLt", "Linear4bit"}
    return {name: module for name, module in model.named_modules() if type(module).__name__ in names}


@torch.no_grad()
def _passes(layer: Any, dense: Any, scheme: str) -> bool:
    """Whether a layer's outputs are near those of the dense one on random inputs."""
    weight = stored_matrix(dense)
    x = torch.randn(8, weight.shape[1], generator=torch.Generator().manual_seed(0))
    expected = F.linear(x, weight.float().cpu())
    try:
        found: Tensor = layer(x.to(weight.dtype).to(layer.weight.device))
    except (RuntimeError, ValueError, AssertionError):
        # Some shapes make the kernels raise instead.
        return False
    if layer.bias is not None:
        expected = expected + layer.bias.float().cpu()
    return float((found.float().cpu() - expected).norm()) <= TOLERANCE[scheme] * float(expected.norm())


@torch.no_grad()
def _read_directly(made: Any, dense: Any, layers: Mapping[str, nn.Module]) -> list[str]:
    """The layers whose weights model code reads without calling them, as Mamba's, where that breaks the model.

    Raises:
        ValueError: If the model is broken by other layers.
    """
    called: set[str] = set()
    with ExitStack() as stack:
        for name in layers:
            layer = dense.get_submodule(name)
            stack.callback(layer.register_forward_hook(lambda *_, name=name: called.add(name)).remove)
        try:
            dense.eval()(**text_arguments(dense, example_ids(dense, next(dense.parameters()).device)))
        except _BROKEN:
            # It reads something else than text, and cannot be tried.
            return []
    try:
        made.eval()(**text_arguments(made, example_ids(made, next(made.parameters()).device)))
    except _BROKEN as error:
        left = [name for name in layers if name not in called]
        if not left:
            raise InputError(f"{type(dense).__name__} does not run with its layers in few bits: {error}") from error
        return left
    return []


def pad_ranks(model: Any, multiple: int) -> int:
    """Fill the factors of two-factor layers up with zeros to a multiple of a rank, in place; the numbers added.

    The layers' outputs stay the same. Pivoted layers cannot be filled up: their inner dimension is part of the output.
    """
    plan = Plan.from_dict(getattr(model.config, "rankfold", None) or Plan(options=(), method="").to_dict())
    options = []
    for option in plan.options:
        missing = -option.ranks[0] % multiple if option.form == "low_rank" else 0
        added = sum(_pad(linear_at(model, name), missing) for name in option.sites) if missing else 0
        size = option.bytes // max(1, option.parameters)
        ranks = (option.ranks[0] + missing,) if missing else option.ranks
        parameters = option.parameters + added
        options.append(replace(option, ranks=ranks, parameters=parameters, bytes=option.bytes + size * added))
    total = sum(option.parameters for option in options) - plan.parameters
    if total:
        model.config.rankfold = {**model.config.rankfold, "options": [option.to_dict() for option in options]}
    return total


def _pad(layer: LowRankLinear, missing: int) -> int:
    down, up = layer.down.weight.detach(), layer.up.weight.detach()
    filled = LowRankLinear.from_factors(F.pad(up, (0, missing)), F.pad(down, (0, 0, 0, missing)), layer.up.bias)
    layer.down, layer.up, layer.rank = filled.down, filled.up, filled.rank
    return missing * (layer.in_features + layer.out_features)


@dataclass(frozen=True)
class NoSettings:
    """A scheme of bitsandbytes as it is."""


INT8 = Quantizer(
    settings=NoSettings,
    # A float32 scale a row.
    bytes=lambda out, into, settings: out * into + 4 * out,
    by_library=lambda source, settings, **places: quantize_by_library(source, "int8", **places),
)
NF4 = Quantizer(
    settings=NoSettings,
    # A float32 scale for 64 weights.
    bytes=lambda out, into, settings: -(-out * into // 2) + 4 * -(-out * into // 64),
    few=lambda settings: True,
    by_library=lambda source, settings, **places: quantize_by_library(source, "nf4", **places),
)
