"""A stock model gets factorized modules where its plan says so: the same code when compressing and when loading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from rankfold.errors import InputError
from rankfold.modules.adaptive_linear import AdaptiveLinear
from rankfold.modules.factorized_linear import FactorizedLinear
from rankfold.modules.joint_linear import JOINT_FORMS, JointLinear
from rankfold.modules.linear_stack import LinearStack
from rankfold.modules.low_rank_linear import LowRankLinear
from rankfold.modules.pivoted_linear import PivotedLinear
from rankfold.modules.spqr_linear import SpQRLinear
from rankfold.modules.tucker_linear import TuckerLinear

READS_PLAN_VERSION = 1
"""Newest version of a stored plan that this code understands."""

FORMS: dict[str, type[FactorizedLinear]] = {
    "low_rank": LowRankLinear,
    "tucker": TuckerLinear,
    "pivoted": PivotedLinear,
}
"""Forms of one matrix."""

DEPENDING: dict[str, type[FactorizedLinear]] = {"adaptive": AdaptiveLinear}
"""Forms whose matrix depends on the input."""


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
        masks = option.get("pivots") or [None] * len(option["sites"])
        if option["form"] == "pivoted" and None in masks:
            raise InputError(f"{option['sites'][0]}: a pivoted site needs its `pivots` in the plan, but has none.")
        for site, mask in zip(option["sites"], masks, strict=True):
            path = _place(model, site)
            if path is None:
                continue
            dense = linear_at(model, path)
            out_features, in_features = linear_shape(dense)
            like = dense.weight
            form = {**FORMS, **DEPENDING}[option["form"]]
            extra = {"pivots": mask} if mask else {}
            ranks, bias = tuple(option["ranks"]), option.get("bias", False)
            empty = form(in_features, out_features, ranks, bias, like.device, like.dtype, **extra)
            model.set_submodule(path, empty)
    install_quantized(model, plan.get("quantization") or {"modules": {}})
    use_eager_experts(model)


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
        empty = SpQRLinear(in_features, out_features, kept, bias, quantization["grid"], like.device, like.dtype)
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
        if _exists(model, path):
            return path
    return None


def _exists(model: nn.Module, path: str) -> bool:
    owner: Any = model
    for name in path.split("."):
        if isinstance(owner, nn.Parameter):
            return name.isdigit() and int(name) < len(owner)
        if isinstance(owner, LinearStack) and name.isdigit():
            owner = owner._modules.get(name)
        else:
            owner = getattr(owner, name, None)
        if owner is None:
            return False
    return True


def linear_at(model: nn.Module, path: str) -> Any:
    """The linear module at a path; a slice of a 3-D parameter becomes a module of its own first.

    Raises:
        ValueError: If the model has nothing at this path.
    """
    if not _exists(model, path):
        raise InputError(f"{path}: {type(model).__name__} has no such layer. Was the plan made for another model?")
    parent_path, _, name = path.rpartition(".")
    owner_path, _, stack_name = parent_path.rpartition(".")
    owner = model.get_submodule(owner_path)
    stacked = getattr(owner, stack_name, None)
    if name.isdigit() and isinstance(stacked, nn.Parameter):
        delattr(owner, stack_name)
        setattr(owner, stack_name, LinearStack.from_parameter(stacked))
    return model.get_submodule(path)


def put(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put layers in place of those that stand at their paths."""
    for path, module in modules.items():
        model.set_submodule(path, module)


def linear_shape(linear: Any) -> tuple[int, int]:
    """(out, in) of an `nn.Linear`, of GPT-2's transposed `Conv1D`, or of a factorized layer."""
    if type(linear).__name__ == "Conv1D":
        return linear.weight.shape[1], linear.weight.shape[0]
    return linear.out_features, linear.in_features


def use_eager_experts(model: nn.Module) -> None:
    """Stacks of layers need the experts' own loop: grouped kernels want one tensor."""
    if any(isinstance(module, LinearStack) for module in model.modules()):
        model.config._experts_implementation = "eager"  # type: ignore[union-attr]
