"""A stock model gets factorized modules where its plan says so: the same code when compressing and when loading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from rankfold.errors import InputError
from rankfold.modules.forms import module_of
from rankfold.modules.group_embedding import install_embeddings
from rankfold.modules.joint_linear import JOINT_FORMS, JointLinear
from rankfold.modules.linear import has_layer, linear_at, linear_shape
from rankfold.modules.linear_stack import LinearStack
from rankfold.modules.storages import quantized_module

READS_PLAN_VERSION = 3
"""Newest version of a stored plan that this code understands."""


class Factorized:
    """Put before a transformers model class: the model is built as usual, then the planned modules replaced."""

    _checkpoint_conversion_mapping: ClassVar[dict[str, str]] = {}

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: the stock class initializes what no checkpoint holds, such as Falcon-H1's multipliers.

        For custom code transformers passes over modules without parameters of their own, and such buffers would
        hold whatever lay in memory.
        """
        return False

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save under the names of the modules, which transformers would rename as if they were the stock model's."""
        kwargs.setdefault("save_original_format", False)
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        """Build the stock model, then install the empty factorized modules of `config.rankfold`."""
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        install(self, getattr(config, "rankfold", None) or {"options": []})  # type: ignore[arg-type]


def install(model: nn.Module, plan: Mapping[str, Any]) -> None:
    """Replace every planned site by an empty module of its form.

    Sites of a head that this model class does not have are passed over; any other missing site is an error.

    Raises:
        ValueError: If the model lacks a planned site, or the plan is of a newer version.
    """
    if plan.get("plan_version", READS_PLAN_VERSION) > READS_PLAN_VERSION:
        raise InputError(
            f"This code reads plans up to version {READS_PLAN_VERSION}, but the checkpoint's is of version "
            f"{plan['plan_version']}. Install a newer rankfold: pip install --upgrade rankfold"
        )
    for option in plan["options"]:
        if option.get("form", "dense") == "dense":
            continue
        if option["form"] in JOINT_FORMS:
            _install_stack(model, option)
            continue
        # Plans of version 1 knew pivots alone.
        structure = option.get("structure") or ({"pivots": option["pivots"]} if option.get("pivots") else {})
        for number, site in enumerate(option["sites"]):
            path = _place(model, site)
            if path is None:
                continue
            dense = linear_at(model, path)
            out_features, in_features = linear_shape(dense)
            like = dense.weight
            own = {name: texts[number] for name, texts in structure.items()}
            ranks, bias = tuple(option["ranks"]), option.get("bias", False)
            form = module_of(option["form"])
            lacking = [name for name in form.structure if not own.get(name)]
            if lacking:
                raise InputError(f"{site}: the plan must store the {lacking[0]} of this site, but does not.")
            model.set_submodule(path, form(in_features, out_features, ranks, bias, like.device, like.dtype, **own))
    for quantization in stored_quantizations(plan):
        install_quantized(model, quantization)
    if plan.get("embeddings"):
        install_embeddings(model, plan["embeddings"])
    use_eager_experts(model)


def stored_quantizations(plan: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a stored plan says of layers in few bits: for each scheme and its settings the layers that have them."""
    stored = plan.get("quantization") or []
    # Plans before version 3 had one scheme for all layers.
    return [stored] if isinstance(stored, Mapping) else list(stored)


def _install_stack(model: nn.Module, option: Mapping[str, Any]) -> None:
    """Empty layers that share their factors, in the place of a stack."""
    leader = None
    for site in option["sites"]:
        path = _place(model, site)
        if path is None:
            raise InputError(f"{site}: the layers of a stack share their factors, but this model lacks this one.")
        dense = linear_at(model, path)
        out_features, in_features = linear_shape(dense)
        ranks, bias = tuple(option["ranks"]), option.get("bias", False)
        like = dense.weight
        layer = JointLinear(in_features, out_features, option["form"], ranks, bias, like.device, like.dtype, leader)
        leader = leader or layer
        model.set_submodule(path, layer)


def install_quantized(model: nn.Module, quantization: Mapping[str, Any]) -> None:
    """Replace every quantized layer, dense or a factor, by an empty one of its size.

    Raises:
        ValueError: If the model lacks one of the layers.
    """
    for name, kept in quantization["modules"].items():
        path = _place(model, name)
        if path is None:
            continue
        dense = linear_at(model, path)
        out_features, in_features = linear_shape(dense)
        like, bias = dense.weight, dense.bias is not None
        kind, settings = quantized_module(quantization["scheme"]), quantization.get("settings") or quantization["grid"]
        empty = kind(in_features, out_features, kept, bias, settings, like.device, like.dtype)
        model.set_submodule(path, empty)


def _place(model: nn.Module, name: str) -> str | None:
    """The path of a planned layer; `None` for one of a head that this model class does not have."""
    path = resolve(model, name)
    if path is None and name.startswith(f"{getattr(model, 'base_model_prefix', '')}."):
        raise InputError(f"{name}: the plan names this module, but {type(model).__name__} has no such module.")
    return path


def resolve(model: nn.Module, site: str) -> str | None:
    """The site's path in this model, which may be the bare base model or the one with a head."""
    prefix = getattr(model, "base_model_prefix", "")
    for path in (site, site.removeprefix(f"{prefix}."), f"{prefix}.{site}"):
        if has_layer(model, path):
            return path
    return None


def put(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put layers in place of those that stand at their paths."""
    for path, module in modules.items():
        model.set_submodule(path, module)


def use_eager_experts(model: nn.Module) -> None:
    """Stacks of layers need the experts' own loop: grouped kernels want one tensor."""
    if any(isinstance(module, LinearStack) for module in model.modules()):
        model.config._experts_implementation = "eager"  # type: ignore[union-attr]
