"""Streaming sums of the vectors at one place of a network, from which their moments follow."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rankfold.errors import InputError
from rankfold.factorization import Moments
from rankfold.precision import float64_device, widest

_CHUNK = 1024
"""Rows multiplied in float32 before their sum joins the float64 total: rounding stays that of one chunk."""


class MomentAccumulator:
    """Streaming mean and second moment: products of chunks in float32, sums in float64."""

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        """An accumulator of vectors of `size` numbers of a device; sums lie where float64 is to be had."""
        self.count = 0
        device = float64_device(device)
        self._third = torch.zeros(size, dtype=torch.float64, device=device)
        self._fourth = torch.zeros((), dtype=torch.float64, device=device)
        self._sum = torch.zeros(size, dtype=torch.float64, device=device)
        self._second = torch.zeros(size, size, dtype=torch.float64, device=device)
        # Of every sequence: the squares off the diagonal of the sum of its products.
        self._squares = torch.zeros((), dtype=torch.float64, device=device)
        self._sequences = 0

    def update(self, x: Float[Tensor, "*batch size"]) -> None:
        """Take in every vector along the last axis; what stands before the last two axes tells sequences apart."""
        x = x.detach()
        for sequence in x.reshape(-1, *x.shape[-2:]) if x.ndim > 2 else [x.reshape(-1, x.shape[-1])]:
            product = self._product(sequence)
            self._second += product
            self._squares += _squared(product) - _squared(product.diagonal())
            self._sequences += 1

    def _product(self, rows: Float[Tensor, "rows size"]) -> Float[Tensor, "size size"]:
        """The sum of the products of some vectors, which are counted; of one chunk as it comes, which saves work."""
        self.count += len(rows)
        place, wide = self._second.device, widest(rows.device)
        product = None
        for chunk in torch.split(rows, _CHUNK):
            exact = chunk if chunk.dtype == torch.float64 else chunk.float()
            found = (exact.T @ exact).to(place)
            product = found if product is None else product.double() + found
            self._sum += exact.sum(0, dtype=wide).to(place)
            squares = exact.square().sum(1, dtype=wide)
            self._third += (squares.to(exact.dtype) @ exact).to(place)
            self._fourth += squares.square().sum().to(place)
        assert product is not None, "a split gives at least one part"
        return product

    def add(self, other: MomentAccumulator) -> None:
        """Take in everything that another one took in."""
        self.count += other.count
        self._sequences += other._sequences
        for name in ("_third", "_fourth", "_sum", "_second", "_squares"):
            getattr(self, name).add_(getattr(other, name))

    def moments(self) -> Moments:
        """Moments over everything taken in; the accumulator is used up.

        Raises:
            ValueError: If a value was NaN or infinite.
        """
        count = max(self.count, 1)
        # Products of matrices are symmetric but for rounding.
        second = check_moment(self._second.add_(self._second.T.clone()).div_(2 * count))
        third = self._third / count
        return Moments(self.count, self._sum / count, second, float(self._fourth) / count, third, self._spread(second))

    def _spread(self, second: Float[Tensor, "size size"]) -> float | None:
        """Variance of the mean of the sequences' moments off the diagonal, sequences being of about one length."""
        number = self._sequences
        if number < 2 or not self.count:
            return None
        own = float(self._squares) * (number / self.count) ** 2
        whole = float(second.square().sum() - second.diagonal().square().sum())
        return max(0.0, own - number * whole) / (number * (number - 1))


class DiagonalAccumulator:
    """Streaming mean and second moment of each entry of vectors by itself."""

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        """An accumulator of vectors of `size` numbers of a device; sums lie where float64 is to be had."""
        self.count = 0
        device = float64_device(device)
        self._sum = torch.zeros(size, dtype=torch.float64, device=device)
        self._squares = torch.zeros(size, dtype=torch.float64, device=device)

    def update(self, x: Float[Tensor, "*batch size"]) -> None:
        """Take in every vector along the last axis."""
        for chunk in torch.split(x.detach().reshape(-1, x.shape[-1]), _CHUNK):
            self.count += len(chunk)
            place, wide = self._squares.device, widest(chunk.device)
            self._sum += chunk.sum(0, dtype=wide).to(place)
            self._squares += chunk.float().square().sum(0, dtype=wide).to(place)

    def add(self, other: DiagonalAccumulator) -> None:
        """Take in everything that another one took in."""
        self.count += other.count
        self._sum += other._sum
        self._squares += other._squares

    def moments(self) -> Moments:
        """The mean and the diagonal of the second moment over everything taken in.

        Raises:
            ValueError: If a value was NaN or infinite.
        """
        count = max(self.count, 1)
        return Moments(self.count, self._sum / count, check_moment(self._squares / count))


def check_moment(second: Tensor) -> Tensor:
    """A moment of finite numbers.

    Raises:
        ValueError: If a value was NaN or infinite.
    """
    if not bool(torch.isfinite(second).all()):
        raise InputError(
            "The values and gradients that flow through this layer must be finite, but some are NaN or infinite. "
            "Check that the weights are finite, and load a float16 model with `dtype` bfloat16 or float32."
        )
    return second


def _squared(values: Tensor) -> Tensor:
    """The sum of squares, in float64 whatever the values are."""
    norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.float64)
    return norm.square()
