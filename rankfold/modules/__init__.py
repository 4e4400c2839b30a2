"""Modules that stand where a Linear, a Conv1D or a stack of experts stood."""

from rankfold.modules.adaptive_linear import AdaptiveLinear
from rankfold.modules.factorized_linear import FactorizedLinear
from rankfold.modules.four_bit import keep_storage, restore_storage
from rankfold.modules.install import (
    FORMS,
    Factorized,
    install,
    linear_at,
    linear_shape,
    put,
    resolve,
    use_eager_experts,
)
from rankfold.modules.joint_linear import JOINT_FORMS, JointLinear, SharedFactors
from rankfold.modules.linear_stack import LinearStack, restack
from rankfold.modules.low_rank_linear import LowRankLinear
from rankfold.modules.module_weight import ModuleWeight
from rankfold.modules.pivoted_linear import PivotedLinear
from rankfold.modules.spqr_linear import SpQRLinear, pack, statistics, unpack
from rankfold.modules.tucker_linear import TuckerLinear

__all__ = [
    "FORMS",
    "JOINT_FORMS",
    "AdaptiveLinear",
    "Factorized",
    "FactorizedLinear",
    "JointLinear",
    "LinearStack",
    "LowRankLinear",
    "ModuleWeight",
    "PivotedLinear",
    "SharedFactors",
    "SpQRLinear",
    "TuckerLinear",
    "install",
    "keep_storage",
    "linear_at",
    "linear_shape",
    "pack",
    "put",
    "resolve",
    "restack",
    "restore_storage",
    "statistics",
    "unpack",
    "use_eager_experts",
]
