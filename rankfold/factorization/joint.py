"""Decompositions of a stack of matrices that share their factors: Tucker, canonical polyadic, tensor train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rankfold.errors import InputError
from rankfold.factorization.factors import check_finite, check_rank
from rankfold.factorization.tucker import tucker_stack

MAX_ITERATIONS = 200
"""Sweeps of alternating least squares."""


class JointFactors(NamedTuple):
    """A stack of matrices: what all share, and the numbers of each."""

    shared: dict[str, Tensor]
    """`cp`: `up` (out, rank), `down` (rank, in). `tucker_stack`: `up` (out, rank_out), `core` (rank_stack, rank_out,
    rank_in), `down` (rank_in, in). `tensor_train`: `up` (rank_stack, out, rank), `down` (rank, in)."""
    mix: Float[Tensor, "stack rank_stack"]
    """For each matrix, how much of each column (`cp`), core or carriage it takes."""
    error: float
    """Squared Frobenius error over the whole stack."""

    def parameters(self) -> int:
        """Numbers stored."""
        return self.mix.numel() + sum(part.numel() for part in self.shared.values())

    def product(self) -> Float[Tensor, "stack out in"]:
        """The stack that the factors stand for."""
        return torch.stack([joint_product(self.shared, row) for row in self.mix])


def joint_product(shared: dict[str, Tensor], mix: Float[Tensor, " rank_stack"]) -> Float[Tensor, "out in"]:
    """One matrix of a stack."""
    up, down = shared["up"], shared["down"]
    if "core" in shared:
        return up @ torch.einsum("a,aoi->oi", mix, shared["core"]) @ down
    if up.ndim == 3:
        return torch.einsum("a,aor->or", mix, up) @ down
    return (up * mix) @ down


def joint_tucker(stack: Float[Tensor, "stack out in"], ranks: tuple[int, ...], seed: int = 0) -> JointFactors:
    """Tucker by HOOI (`tucker_stack`) at ranks of the stacking, output and input mode."""
    a, o, i = ranks
    found = tucker_stack(stack, (a, o, i))
    return JointFactors(
        {"up": found.up, "core": found.core, "down": found.down.T.contiguous()}, found.stack, found.error
    )


def joint_cp(stack: Float[Tensor, "stack out in"], ranks: tuple[int, ...], seed: int = 0) -> JointFactors:
    """Canonical polyadic decomposition by alternating least squares from a random start (Harshman 1970; tensorly).

    The problem may have no optimum at all (de Silva and Lim 2008), and where it stops depends on the seed.
    """
    decomposition = _tensorly()
    check_finite(stack)
    (rank,) = ranks
    found = decomposition.parafac(
        stack.double().cpu().numpy(), rank, init="random", random_state=np.random.RandomState(seed),
        n_iter_max=MAX_ITERATIONS, normalize_factors=True, tol=1e-9,
    )  # fmt: skip
    mix, up, down = (torch.from_numpy(np.ascontiguousarray(part)) for part in found.factors)
    mix = mix * torch.from_numpy(np.asarray(found.weights))
    return _finished(stack, {"up": up, "down": down.T.contiguous()}, mix)


def joint_tensor_train(stack: Float[Tensor, "stack out in"], ranks: tuple[int, ...], seed: int = 0) -> JointFactors:
    """Tensor train by successive singular value decompositions (Oseledets 2011; tensorly), stacking mode first."""
    decomposition = _tensorly()
    check_finite(stack)
    first, second = ranks
    check_rank(first, min(len(stack), stack[0].numel()))
    check_rank(second, min(first * stack.shape[1], stack.shape[2]))
    train = decomposition.tensor_train(stack.double().cpu().numpy(), rank=[1, first, second, 1])
    mix, up, down = (torch.from_numpy(np.ascontiguousarray(part)) for part in train)
    return _finished(stack, {"up": up, "down": down[:, :, 0].contiguous()}, mix[0])


def _finished(stack: Tensor, shared: dict[str, Tensor], mix: Tensor) -> JointFactors:
    error = float((JointFactors(shared, mix, 0.0).product() - stack.double().cpu()).square().sum())
    if not np.isfinite(error):
        raise InputError(
            "The decomposition must converge, but its factors are not finite. Try another seed or a lower rank."
        )
    return JointFactors({name: part.to(stack.dtype) for name, part in shared.items()}, mix.to(stack.dtype), error)


def _tensorly() -> Any:
    try:
        from tensorly import decomposition
    except ImportError as error:
        raise InputError("This decomposition requires tensorly: pip install 'rankfold[tensors]'") from error
    return decomposition


STACK_METHODS: dict[str, Callable[[Tensor, tuple[int, ...], int], JointFactors]] = {
    "tucker_stack": joint_tucker,
    "cp": joint_cp,
    "tensor_train": joint_tensor_train,
}
"""Forms of a stack, by the name under which a plan stores them."""
