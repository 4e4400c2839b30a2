"""What a factorization takes and gives: moments of a layer's inputs or outputs, and factors with their error."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rankfold.errors import InputError


class Moments(NamedTuple):
    """First and second moments of the vectors at one place of a network, in float64."""

    vectors: int
    """Number of vectors seen."""
    mean: Float[Tensor, " size"]
    second: Float[Tensor, "size size"] | Float[Tensor, " size"]
    """`E[x x^T]`, not centred; of gradients at very many outputs, and of what is measured beyond the layer instead
    (`SiteMoments`), its diagonal alone."""
    fourth: float | int = 0
    """`E[|x|^4]`: how far single vectors lie from the moment, from which its sampling error is estimated."""
    third: Float[Tensor, " size"] | None = None
    """`E[|x|^2 x]`, from which that of the centred moment follows."""
    spread: float | int | None = None
    """Sampling variance of the entries of `second` off its diagonal, summed, as whole sequences vary; `None` with one.
    Vectors of one sequence are alike: to count them as independent would promise too much."""

    @property
    def noise(self) -> float:
        """Share of the entries off the diagonal that is sampling error, 0 to 1 (Ledoit and Wolf 2004)."""
        if self.spread is None:
            return 0.0
        off = float(self.second.square().sum() - self.second.diagonal().square().sum())
        return min(1.0, self.spread / off) if off > 0 else 0.0

    @property
    def trusted(self) -> Tensor:
        """The second moment, drawn towards its diagonal by the share of it that is sampling error."""
        share = self.noise
        if share == 0:
            return self.second
        return (1 - share) * self.second + share * torch.diag(self.second.diagonal())

    @property
    def covariance(self) -> Float[Tensor, "size size"]:
        """`E[x x^T] - E[x] E[x]^T`."""
        assert self.second.ndim == 2, "of these vectors only the diagonal of the moment is known"
        return self.second - torch.outer(self.mean, self.mean)

    def centred(self) -> Moments:
        """The moments of `x - E[x]`."""
        mu, square = self.mean, float(self.mean.square().sum())
        third = self.third if self.third is not None else torch.zeros_like(mu)
        fourth = self.fourth - 4 * float(third @ mu) + 4 * float(mu @ self.second @ mu)
        fourth += 2 * square * float(self.second.diagonal().sum()) - 3 * square**2
        fourth = fourth if self.third is not None else 0
        return Moments(self.vectors, torch.zeros_like(mu), self.covariance, fourth, spread=self.spread)


def weighed(
    second: Float[Tensor, "size size"] | Float[Tensor, " size"], matrix: Float[Tensor, "size columns"]
) -> Float[Tensor, "size columns"]:
    """`second @ matrix`, where of `second` the diagonal may be all that is known."""
    return second[:, None] * matrix if second.ndim == 1 else second @ matrix


class SiteMoments(NamedTuple):
    """What calibration knows about one site: the moments of its inputs, or of its outputs, whichever is smaller.

    If a loss was backpropagated, always moments of the inputs, and those of the loss's gradient at the outputs. Of the
    wider one of the two only the diagonal may be known, beside its product with the weight (`Method.reads_products`):
    `W S W^T` is the moment of the outputs, `W^T G W` that of the gradients at the inputs.
    """

    inputs: Moments | None = None
    outputs: Moments | None = None
    gradients: Moments | None = None
    share: float | int = 1
    """Vectors that the site saw for each token: below 1 for an expert, above 1 for a layer called repeatedly."""
    input_gradients: Moments | None = None
    """Of `W^T g`, what the layer passes back of the gradient `g` at its outputs."""

    def output_moments(
        self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None, centred: bool
    ) -> tuple[Float[Tensor, "out out"], Float[Tensor, " out"]]:
        """Second moment of `W x`, or its covariance, and the mean of `W x + b` (docs/mathematics.md, eq. 5)."""
        W = weight.double()
        b = torch.zeros(len(W), dtype=W.dtype, device=W.device) if bias is None else bias.double()
        if self.outputs is not None:
            mean, second = self.outputs.mean.to(W.device), self.outputs.second.to(W.device)
            if centred:
                return second - torch.outer(mean, mean), mean
            return second - torch.outer(mean, b) - torch.outer(b, mean) + torch.outer(b, b), mean
        assert self.inputs is not None, "a site must have moments of its inputs or of its outputs"
        S = (self.inputs.covariance if centred else self.inputs.second).to(W.device)
        return W @ S @ W.T, W @ self.inputs.mean.to(W.device) + b


class Factors(NamedTuple):
    """A matrix as a product `up @ core @ down` (`up @ down` without a core), and what it loses."""

    up: Float[Tensor, "out rank_out"]
    down: Float[Tensor, "rank_in in"]
    core: Float[Tensor, "rank_out rank_in"] | None
    bias: Float[Tensor, " out"] | None
    """The bias of the factorized layer; `None` where the layer had none and none was added."""
    error: float
    """What the factorization minimizes: squared Frobenius error, or with moments `E|y - y'|^2`."""

    def product(self) -> Float[Tensor, "out in"]:
        """The matrix that the factors stand for."""
        return self.up @ self.down if self.core is None else self.up @ self.core @ self.down


def check_rank(rank: int, limit: int) -> None:
    """Hold a rank against its limits.

    Raises:
        ValueError: If `rank` is not between 1 and `limit`.
    """
    if not 1 <= rank <= limit:
        raise InputError(
            f"A rank must lie between 1 and min(out, in) = {limit}, but got {rank}. "
            "Lower the rank, or pass `keep` and let the allocation choose it."
        )


def check_finite(weight: Float[Tensor, "*shape"]) -> None:
    """Refuse weights with NaN or infinite entries.

    Raises:
        ValueError: If any entry is not finite.
    """
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise InputError(
            f"Weights must be finite, but {bad} of {weight.numel()} entries are NaN or infinite. "
            "The checkpoint is damaged or was saved after a diverged training run: take another."
        )
