"""A model of ours becomes a stock one again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from rankfold.architectures.classes import retype
from rankfold.architectures.stock import stock_class
from rankfold.errors import InputError
from rankfold.modules import FactorizedLinear, LinearStack, QuantizedLinear, is_transposed, release_embeddings, restack


def release(model: Any) -> None:
    """Turn a model of ours into the stock one, in place: quantized and factorized modules become dense layers.

    Raises:
        ValueError: If a factorized layer has a bias for which the stock architecture has no place.
    """
    stock = stock_class(type(model))
    release_embeddings(model)
    _dequantize_factors(model)
    made = (FactorizedLinear, QuantizedLinear)
    factorized = {path: module for path, module in model.named_modules() if isinstance(module, made)}
    biases = {f"{path}.bias" for path, module in factorized.items() if module.bias is not None}
    config, pattern = _pattern_with(stock, model.config, biases)
    for path, module in factorized.items():
        linear = module.to_dense()
        dense: nn.Module = linear
        owner = model.get_submodule(path.rpartition(".")[0])
        if not isinstance(owner, LinearStack) and is_transposed(pattern.get_submodule(path)):
            dense = to_conv1d(linear)
        model.set_submodule(path, dense)
    restack(model)
    _add_zero_biases(model, pattern)
    retype(model.config, type(config))
    model.__class__ = stock
    for flag in _BIAS_FLAGS:
        if hasattr(config, flag):
            setattr(model.config, flag, getattr(config, flag))
    for attribute in ("rankfold", "auto_map"):
        if hasattr(model.config, attribute):
            delattr(model.config, attribute)
    if not getattr(model, "_weight_conversions", True):
        # A checkpoint of ours is loaded without any; a stock one is written under the names of its own kind.
        del model._weight_conversions
    model.config.architectures = [stock.__name__]


def _dequantize_factors(model: nn.Module) -> None:
    """Turn quantized factors into linear layers, in place, so that factorized layers can be multiplied out."""
    for module in list(model.modules()):
        for name, part in list(module.named_children()) if isinstance(module, FactorizedLinear) else ():
            if isinstance(part, QuantizedLinear):
                setattr(module, name, part.to_dense())


_BIAS_FLAGS = ("attention_bias", "mlp_bias", "use_bias", "bias")
"""Settings by which stock architectures give biases to their linear layers."""


def _pattern_with(stock: type[Any], config: PretrainedConfig, biases: set[str]) -> tuple[PretrainedConfig, nn.Module]:
    """A stock configuration, and an empty model, in which every named bias has its place."""
    settings = config.to_dict()
    for name in ("rankfold", "auto_map", "model_type"):
        settings.pop(name, None)
    changes: dict[str, bool] = {}
    for flag in (None, *_BIAS_FLAGS):
        if flag in settings and settings[flag] is False:
            changes[str(flag)] = True
        elif flag is not None:
            continue
        plain = stock_class(type(config))(**{**settings, **changes})
        pattern = _empty(stock, plain)
        missing = {name for name in biases if "experts" in name} | (biases - dict(pattern.named_parameters()).keys())
        if not missing:
            return plain, pattern
    raise InputError(
        f"A dense {stock.__name__} has no place for the biases that were added, for example {sorted(missing)[0]}. "
        "Keep the factorized checkpoint, or compress with a method that adds none, such as whitened."
    )


def _empty(stock: type[Any], config: PretrainedConfig) -> nn.Module:
    """A model without weights, or with random ones where it reads numbers while it is made."""
    try:
        with torch.device("meta"):
            model: nn.Module = stock(config)
    except (NotImplementedError, RuntimeError):
        model = stock(config)
    return model


def _add_zero_biases(model: nn.Module, pattern: nn.Module) -> None:
    """Give a zero bias to layers that have one in the pattern only."""
    have = dict(model.named_parameters())
    for name, _ in pattern.named_parameters():
        if name.endswith(".bias") and name not in have:
            linear = model.get_submodule(name.removesuffix(".bias"))
            linear.bias = nn.Parameter(torch.zeros(linear.out_features).to(linear.weight))  # type: ignore[call-overload,arg-type]


def to_conv1d(linear: nn.Linear) -> nn.Module:
    """GPT-2's transposed linear layer."""
    conv: nn.Module = Conv1D(linear.out_features, linear.in_features)  # type: ignore[no-untyped-call]
    conv.weight = nn.Parameter(linear.weight.detach().T.contiguous())
    bias = torch.zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
    conv.bias = nn.Parameter(bias.to(linear.weight))
    return conv
