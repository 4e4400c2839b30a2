"""Pure tensor mathematics: a matrix and what is known of its inputs become factors with a stated error."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from rankfold.factorization.factors import Factors, Moments, SiteMoments, weighed
from rankfold.factorization.feature_mimicking import feature_mimicking, whitened_svd
from rankfold.factorization.joint import STACK_METHODS, JointFactors
from rankfold.factorization.kfac import Ordered, kfac, ordered_kfac, predicted_loss, shrunk
from rankfold.factorization.pivoted import Pivoted, pivoted
from rankfold.factorization.svd import randomized_svd, truncated_svd
from rankfold.factorization.tucker import StackFactors, fold_core, tucker_matrix, tucker_stack
from rankfold.registry import Registry


class Method(NamedTuple):
    """A way to factorize one layer: it declares what it offers, and callers that need more reject it."""

    factorize: Callable[[Tensor, Tensor | None, SiteMoments, int], Factors]
    """Maps weight (out, in), bias, moments and rank to factors."""
    form: str
    """The form of the module that holds the factors; two factors may also be re-encoded as `pivoted`."""
    needs_data: bool = False
    """Whether the moments are used."""
    needs_gradients: bool = False
    """Whether moments of the loss's gradient are used too."""
    adds_bias: bool = False
    """Whether a layer without a bias gets one."""
    ordered: Callable[[Tensor, Tensor | None, SiteMoments], Ordered] | None = None
    """Maps weight, bias and moments to the factors of every rank at once, which rounds and nesting need."""
    reads_products: bool = False
    """Whether `ordered` asks of the moment of a matrix's wider side only its product with the matrix, which costs less
    to measure: `SiteMoments.outputs` in place of the inputs', `input_gradients` in place of the gradients'."""
    is_optimal: bool = True
    """Whether no factors of the same rank have a smaller `error`; false for heuristics such as scaled columns."""


METHODS: Registry[Method] = Registry(
    "rankfold.methods",
    {
        "svd": Method(lambda W, b, _, rank: truncated_svd(W, rank)._replace(bias=b), "low_rank"),
        "tucker": Method(lambda W, b, _, rank: tucker_matrix(W, rank)._replace(bias=b), "tucker"),
        "lord": Method(feature_mimicking, "low_rank", needs_data=True, adds_bias=True),
        "whitened": Method(whitened_svd, "low_rank", needs_data=True),
        "kfac": Method(
            kfac, "pivoted", needs_data=True, needs_gradients=True, ordered=ordered_kfac, reads_products=True
        ),
    },
)
"""The values of `rankfold compress --method`."""

__all__ = [
    "METHODS",
    "STACK_METHODS",
    "Factors",
    "JointFactors",
    "Method",
    "Moments",
    "Ordered",
    "Pivoted",
    "SiteMoments",
    "StackFactors",
    "feature_mimicking",
    "fold_core",
    "kfac",
    "ordered_kfac",
    "pivoted",
    "predicted_loss",
    "randomized_svd",
    "shrunk",
    "truncated_svd",
    "tucker_matrix",
    "tucker_stack",
    "weighed",
    "whitened_svd",
]
