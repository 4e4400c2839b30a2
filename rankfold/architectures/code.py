"""The code in a checkpoint that loads it where rankfold is not installed."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from rankfold.architectures.stock import made_name, stock_models
from rankfold.modules import FORMS, QUANTIZERS, stored_quantizations
from rankfold.registration import PREFIX

CODE_FILE = "modeling_rankfold.py"
"""The file in a checkpoint that loads it where rankfold is not installed."""


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


def auto_map(stock: type[PretrainedConfig]) -> dict[str, str]:
    """What a configuration says of where its classes are."""
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
