"""Model classes with factorized modules: made from stock ones, known to the Auto classes, written out as code."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rankfold.errors import InputError
from rankfold.modules import (
    FORMS,
    QUANTIZERS,
    Factorized,
    FactorizedLinear,
    LinearStack,
    QuantizedLinear,
    is_transposed,
    release_embeddings,
    restack,
    stored_embeddings,
    stored_quantizations,
)
from rankfold.plan import Plan
from rankfold.registration import PREFIX

CODE_FILE = "modeling_rankfold.py"
"""The file in a checkpoint that loads it where rankfold is not installed."""

AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForSeq2SeqLM",
    "AutoModelForImageTextToText",
    "AutoModelForSpeechSeq2Seq",
)

_MODULE_FILES = (
    "module_weight",
    "factorized_linear",
    "low_rank_linear",
    "compensated_linear",
    "tucker_linear",
    "pivoted_linear",
    "quantized_linear",
    "spqr_linear",
    "group_linear",
    "group_embedding",
    "linear_stack",
    "adaptive_linear",
    "joint_linear",
    "linear",
    "install",
)


class _FactorizedModel(Factorized):
    """The classes made here also write the code that loads them elsewhere whenever they are saved."""

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Save as transformers does, and put the loading code beside the weights."""
        config: Any = self.config  # type: ignore[attr-defined]
        config.auto_map = _auto_map(stock_class(type(config)))
        result = super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        (Path(save_directory) / CODE_FILE).write_text(
            modeling_code(stock_class(type(config)), getattr(config, "rankfold", None))
        )
        return result


def config_class_for(stock: type[PretrainedConfig]) -> type[PretrainedConfig]:
    """Our configuration class for a stock one; made and registered with the Auto classes on first use."""
    name = f"Rankfold{stock.__name__}"
    made: Any = globals().get(name)
    if made is None:
        made = globals()[name] = type(name, (stock,), {"model_type": PREFIX + stock.model_type, "__module__": __name__})
        AutoConfig.register(made.model_type, made, exist_ok=True)
        for auto_class, model_class in stock_models(stock).items():
            getattr(transformers, auto_class).register(made, model_class_for(model_class, made), exist_ok=True)
    return made  # type: ignore[no-any-return]


def made_name(stock: type[Any], config: type[PretrainedConfig]) -> str:
    """Name of our model class: several model types, such as Exaone, share the model class of another, such as Llama."""
    shared = stock.config_class is not config
    return f"Rankfold{config.__name__.removesuffix('Config') if shared else ''}{stock.__name__}"


def model_class_for(stock: type[PreTrainedModel], config_class: type[PretrainedConfig]) -> type[PreTrainedModel]:
    """Our model class for a stock one."""
    name = made_name(stock, stock_class(config_class))
    if name not in globals():
        # Kept in the module so that the class can be found again by name, as pickling and multiprocessing do.
        globals()[name] = type(
            name,
            (_FactorizedModel, stock),
            {"config_class": config_class, "__module__": __name__, "__doc__": stock.__doc__},
        )
    return globals()[name]  # type: ignore[no-any-return]


def stock_class(made: type[Any]) -> type[Any]:
    """The transformers class under one of ours; a stock class is its own."""
    return next(
        base for base in made.__mro__ if not base.__name__.startswith(("Rankfold", "_Factorized", "Factorized"))
    )


def stock_models(config: type[PretrainedConfig]) -> dict[str, type[PreTrainedModel]]:
    """The stock model class behind each Auto class that knows this configuration."""
    found = {}
    for auto_class in AUTO_CLASSES:
        mapping = getattr(transformers, auto_class)._model_mapping
        if config in mapping:
            model_class = mapping[config]
            found[auto_class] = model_class[0] if isinstance(model_class, tuple) else model_class
    return found


def adopt(model: Any, plan: Plan) -> None:
    """Turn a model with replaced modules into one of our classes, in place, so that it saves and loads as itself."""
    config_class = config_class_for(stock_class(type(model.config)))
    _retype(model.config, config_class)
    model.__class__ = model_class_for(stock_class(type(model)), config_class)
    embeddings = stored_embeddings(model)
    model.config.rankfold = {**plan.to_dict(), **({"embeddings": embeddings} if embeddings else {})}
    model.config.architectures = [type(model).__name__]


def _retype(config: Any, config_class: type[PretrainedConfig]) -> None:
    """Make a configuration one of another class, whose model type it then says."""
    config.__class__ = config_class
    # One that came from disk also holds the type that it had there.
    vars(config).pop("model_type", None)


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
    _retype(model.config, type(config))
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


def auto_class_for(config: Any) -> Any:
    """The Auto class whose model for this configuration is the one that the configuration names.

    Raises:
        ValueError: If the configuration names a model that none of them loads.
    """
    wanted = (config.architectures or [None])[0]
    found = {}
    for name in AUTO_CLASSES:
        mapping = getattr(transformers, name)._model_mapping
        if type(config) in mapping:
            classes = mapping[type(config)]
            found[name] = {cls.__name__ for cls in (classes if isinstance(classes, tuple) else (classes,))}
    for name, classes in found.items():
        if wanted in classes:
            return getattr(transformers, name)
    if wanted is not None and found:
        known = sorted(set().union(*found.values()))
        raise InputError(
            f"The checkpoint holds a {wanted}, but of this architecture only {known} are supported. "
            "Load it with transformers and save the part that you want to compress."
        )
    return getattr(
        transformers, "AutoModelForCausalLM" if "AutoModelForCausalLM" in found or not found else "AutoModel"
    )


def _auto_map(stock: type[PretrainedConfig]) -> dict[str, str]:
    module = CODE_FILE.removesuffix(".py")
    models = {auto: f"{module}.{made_name(cls, stock)}" for auto, cls in stock_models(stock).items()}
    return {"AutoConfig": f"{module}.Rankfold{stock.__name__}", **models}


def modeling_code(stock: type[PretrainedConfig], plan: Mapping[str, Any] | None = None) -> str:
    """A module that defines our classes for one architecture with nothing but torch and transformers.

    The code of the modules is this package's own, its imports of itself taken out. Layers that other packages offer
    are written out where the plan names them.
    """
    models = list(dict.fromkeys(stock_models(stock).values()))
    names = ", ".join(sorted([stock.__name__, *(model.__name__ for model in models)]))
    *sources, last = (
        _definitions(name) for name in ("rankfold.errors", *(f"rankfold.modules.{n}" for n in _MODULE_FILES))
    )
    layers = _layers(plan or {})
    sources += [*_foreign_sources(layers), _tables(layers), last]
    config = f'class Rankfold{stock.__name__}({stock.__name__}):\n    model_type = "{PREFIX}{stock.model_type}"\n'
    classes = [
        f"class {made_name(model, stock)}(Factorized, {model.__name__}):\n    config_class = Rankfold{stock.__name__}\n"
        for model in models
    ]
    # Some heads build their body through AutoModel, which must know it by then.
    made = f"Rankfold{stock.__name__}"
    known = [
        f"{auto}.register({made}, {made_name(model, stock)}, exist_ok=True)"
        for auto, model in stock_models(stock).items()
    ]
    autos = ", ".join(sorted(stock_models(stock)))
    imports = f"from transformers import {autos}\nfrom transformers import {names}\n"
    return "\n\n".join([_HEADER + imports, *sources, config, *classes, "\n".join(known) + "\n"])


_Layers = tuple[dict[str, type[Any]], dict[str, type[Any]]]
"""By name the layers of forms, and those of quantizers."""


def _layers(plan: Mapping[str, Any]) -> _Layers:
    """The layers of our own, and of what a plan names besides."""
    named = {option.get("form") for option in plan.get("options", ())} & set(FORMS)
    schemes = {str(stored["scheme"]) for stored in stored_quantizations(plan)} & set(QUANTIZERS)
    forms = {name: form.module for name, form in FORMS.loadable().items() if name in named or _is_ours(form.module)}
    quantizers = {name: entry.module for name, entry in QUANTIZERS.loadable().items() if entry.module is not None}
    return forms, {name: layer for name, layer in quantizers.items() if name in schemes or _is_ours(layer)}


def _is_ours(layer: type[Any]) -> bool:
    return layer.__module__.startswith("rankfold.modules.")


def _foreign_sources(layers: _Layers) -> list[str]:
    """The source of layers that other packages offer: a checkpoint with them must load without those packages too."""
    foreign = [layer for table in layers for layer in table.values() if not _is_ours(layer)]
    return [_with_what_it_uses(layer) for layer in dict.fromkeys(foreign)]


def _with_what_it_uses(layer: type[Any]) -> str:
    """The source of a class, with the imports of its module and whatever else of it the class refers to."""
    source = inspect.getsource(importlib.import_module(layer.__module__))
    body = ast.parse(source).body
    defined: dict[str, ast.stmt] = {}
    for node in body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
        for target in targets:
            name = getattr(target, "id", getattr(target, "name", None))
            if isinstance(name, str):
                defined[name] = node
    wanted: dict[int, ast.stmt] = {}
    waiting = [layer.__name__]
    while waiting:
        found = defined.get(waiting.pop())
        if found is not None and id(found) not in wanted:
            wanted[id(found)] = found
            waiting += [part.id for part in ast.walk(found) if isinstance(part, ast.Name)]
    imports = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom)) and not _is_of_ours(node)]
    return "\n\n".join(ast.unparse(node) for node in [*imports, *(n for n in body if id(n) in wanted)]) + "\n"


def _is_of_ours(node: ast.Import | ast.ImportFrom) -> bool:
    """Whether an import names this package, whose layers the file holds already, or what must stand first."""
    modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    return any(module.partition(".")[0] in ("rankfold", "__future__") for module in modules)


def _tables(layers: _Layers) -> str:
    """Which layer a plan's names stand for, as code."""

    def written(table: dict[str, type[Any]]) -> str:
        return "{" + ", ".join(f'"{name}": {layer.__name__}' for name, layer in table.items()) + "}"

    forms, quantized = (written(table) for table in layers)
    return (
        f"def module_of(form):\n    return {forms}[form]\n\n\n"
        f"def quantized_module(scheme):\n    return {quantized}[scheme]\n"
    )


_HEADER = '''"""Loads this checkpoint without rankfold: AutoModel.from_pretrained(folder, trust_remote_code=True).

Written by rankfold when the checkpoint was saved. With rankfold imported this file is not used.
"""

from __future__ import annotations

import operator
from functools import cache
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only
'''


def _is_left_out(node: ast.stmt) -> bool:
    """Imports and docstrings; calls such as torch.fx.wrap(...) stay."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)
    return isinstance(node, (ast.Import, ast.ImportFrom))


def _definitions(module_name: str) -> str:
    """The source of a module without its docstring and imports."""
    source = inspect.getsource(importlib.import_module(module_name))
    body = [node for node in ast.parse(source).body if not _is_left_out(node)]
    segments = [ast.get_source_segment(source, node) or "" for node in body]
    decorated = [
        "\n".join(f"@{ast.unparse(decorator)}" for decorator in getattr(node, "decorator_list", [])) for node in body
    ]
    pieces = [f"{above}\n{text}" if above else text for above, text in zip(decorated, segments, strict=True)]
    return re.sub(r"\n{4,}", "\n\n\n", "\n\n\n".join(pieces)) + "\n"
