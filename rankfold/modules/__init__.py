"""Modules that stand where a Linear, a Conv1D or a stack of experts stood."""

from rankfold.modules.adaptive_linear import AdaptiveLinear
from rankfold.modules.compensated_linear import CompensatedLinear
from rankfold.modules.factorized_linear import FactorizedLinear
from rankfold.modules.forms import (
    FORMS,
    Form,
    factorized_module,
    form_at,
    forms_for,
    largest_rank,
    stored_bytes,
    stored_parameters,
    structure_of,
)
from rankfold.modules.four_bit import keep_storage, restore_storage
from rankfold.modules.group_embedding import (
    GroupEmbedding,
    TiedHead,
    put_embeddings,
    release_embeddings,
    stored_embeddings,
)
from rankfold.modules.group_linear import WHOLE_MATRIX, WHOLE_ROW, GroupLinear
from rankfold.modules.install import Factorized, install, put, resolve, stored_quantizations, use_eager_experts
from rankfold.modules.joint_linear import JOINT_FORMS, JointLinear, SharedFactors
from rankfold.modules.linear import (
    is_linear,
    is_transposed,
    linear_at,
    linear_shape,
    matrix_of,
    set_matrix,
    stored_matrix,
)
from rankfold.modules.linear_stack import LinearStack, restack
from rankfold.modules.low_rank_linear import LowRankLinear
from rankfold.modules.module_weight import ModuleWeight
from rankfold.modules.packed_linear import PackedLinear, pack_linears, unpack_linears
from rankfold.modules.pivoted_linear import PivotedLinear
from rankfold.modules.preferences import PREFERENCES, check_preference, prefer
from rankfold.modules.quantized_linear import QuantizedLinear
from rankfold.modules.spqr_linear import SpQRLinear, pack, statistics, unpack
from rankfold.modules.storages import QUANTIZERS, Quantizer, quantizer_at, settings_for
from rankfold.modules.tucker_linear import TuckerLinear

__all__ = [
    "FORMS",
    "JOINT_FORMS",
    "PREFERENCES",
    "QUANTIZERS",
    "WHOLE_MATRIX",
    "WHOLE_ROW",
    "AdaptiveLinear",
    "CompensatedLinear",
    "Factorized",
    "FactorizedLinear",
    "Form",
    "GroupEmbedding",
    "GroupLinear",
    "JointLinear",
    "LinearStack",
    "LowRankLinear",
    "ModuleWeight",
    "PackedLinear",
    "PivotedLinear",
    "QuantizedLinear",
    "Quantizer",
    "SharedFactors",
    "SpQRLinear",
    "TiedHead",
    "TuckerLinear",
    "check_preference",
    "factorized_module",
    "form_at",
    "forms_for",
    "install",
    "is_linear",
    "is_transposed",
    "keep_storage",
    "largest_rank",
    "linear_at",
    "linear_shape",
    "matrix_of",
    "pack",
    "pack_linears",
    "prefer",
    "put",
    "put_embeddings",
    "quantizer_at",
    "release_embeddings",
    "resolve",
    "restack",
    "restore_storage",
    "set_matrix",
    "settings_for",
    "statistics",
    "stored_bytes",
    "stored_embeddings",
    "stored_matrix",
    "stored_parameters",
    "stored_quantizations",
    "structure_of",
    "unpack",
    "unpack_linears",
    "use_eager_experts",
]
