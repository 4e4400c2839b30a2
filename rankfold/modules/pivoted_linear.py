"""A low-rank linear layer that stores some rows of its matrix and the others as combinations of them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
import torch.fx
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from rankfold.modules.factorized_linear import FactorizedLinear


class PivotedLinear(FactorizedLinear):
    """`h = down(x)` gives the pivot rows of `y`, `up(h)` the others: `r (m + n) - r^2` numbers at rank `r`.

    Both parts are plain `nn.Linear`, so that PEFT, bitsandbytes and torchao find them. Which rows are pivots belongs
    to the structure, not to the weights: it is stored in the plan, one bit a row, since loaders elsewhere fill
    parameters but not every buffer.

    >>> layer = PivotedLinear(8, 6, (2,), bias=False)
    >>> layer(torch.ones(3, 8)).shape, layer.weight.shape, sum(p.numel() for p in layer.parameters())
    (torch.Size([3, 6]), torch.Size([6, 8]), 24)
    """

    is_pair = True
    tolerates_few_bits = False
    structure = ("pivots",)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ranks: tuple[int, ...],
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        pivots: str = "",
    ) -> None:
        """An empty layer; `from_pivoted` makes a filled one. Without `pivots` they are the first rows."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        (self.rank,) = ranks
        self.down = nn.Linear(in_features, self.rank, bias=bias, device=device, dtype=dtype)
        self.up = nn.Linear(self.rank, out_features - self.rank, bias=bias, device=device, dtype=dtype)
        self.pivots = pivots or to_hex(range(self.rank), out_features)

    @classmethod
    def from_pivoted(
        cls,
        pivots: Tensor,
        rows: Float[Tensor, "rank in"],
        coefficients: Float[Tensor, "rest rank"],
        bias: Float[Tensor, " out"] | None = None,
    ) -> PivotedLinear:
        """A layer that holds these pivot rows and coefficients, in their dtype and on their device."""
        rank, out_features = len(rows), len(rows) + len(coefficients)
        names = to_hex(pivots.tolist(), out_features)
        layer = cls(rows.shape[1], out_features, (rank,), bias is not None, "meta", rows.dtype, names)
        layer.down.weight = nn.Parameter(rows.contiguous())
        layer.up.weight = nn.Parameter(coefficients.contiguous())
        if bias is not None:
            # `up` reads the pivots with their bias, so the other rows' bias must not count it twice.
            chosen = torch.zeros(out_features, dtype=torch.bool, device=rows.device)
            chosen[pivots] = True
            kept = bias[chosen]
            rest = bias[~chosen].double() - coefficients.double() @ kept.double()
            layer.down.bias = nn.Parameter(kept.clone())
            layer.up.bias = nn.Parameter(rest.to(bias.dtype))
        return layer

    def hidden(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch rank"]:
        """The pivot rows of the output."""
        hidden: Tensor = self.down(x)
        return hidden

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The layer's outputs."""
        hidden = self.hidden(x)
        return arranged(torch.cat([hidden, self.up(hidden)], -1), self.pivots, -1)

    def without_bias(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The matrix applied to `x`."""
        hidden = F.linear(x, self.down.weight)
        return arranged(torch.cat([hidden, F.linear(hidden, self.up.weight)], -1), self.pivots, -1)

    def product(self) -> Float[Tensor, "out in"]:
        """The matrix that the parts stand for, as an ordinary tensor."""
        rows = self.down.weight
        return arranged(torch.cat([rows, self.up.weight @ rows]), self.pivots, 0)

    @property
    def bias(self) -> Tensor | None:
        """The bias of all outputs, or `None`."""
        if self.down.bias is None:
            return None
        rest = self.up.bias + self.up.weight @ self.down.bias
        return arranged(torch.cat([self.down.bias, rest]), self.pivots, 0)

    def extra_repr(self) -> str:
        """Sizes and rank."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def arranged(rows: Tensor, pivots: str, dim: int) -> Tensor:
    """Pivots followed by the others, put into the order of the outputs."""
    places = _places(pivots, rows.shape[dim], rows.device)
    short = rows.dtype in (torch.bfloat16, torch.float16)
    if dim == -1 and short and rows.device.type == "cpu" and rows.numel() > rows.shape[-1]:
        # PyTorch (2.13) is four times as fast at numbers of 32 bits in two dimensions, there and back counted.
        flat = rows.reshape(-1, rows.shape[-1]).float().index_select(1, places)
        return flat.to(rows.dtype).reshape(rows.shape)
    return rows.index_select(dim, places)


# A leaf for symbolic tracers, such as vLLM's, which know no device and no size.
torch.fx.wrap("arranged")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _places(pivots: str, size: int, device: torch.device) -> Tensor:
    """For every output its place among the pivots followed by the others; a constant for the compiler."""
    return _computed_places(pivots, size, device)


@cache
def _computed_places(pivots: str, size: int, device: torch.device) -> Tensor:
    chosen = set(from_hex(pivots))
    places = [0] * size
    for place, row in enumerate(sorted(range(size), key=lambda row: (row not in chosen, row))):
        places[row] = place
    return torch.tensor(places, device=device)


def to_hex(rows: Iterable[int], size: int) -> str:
    """Row indices as a mask of one bit a row, in hexadecimal.

    >>> to_hex([0, 2, 9], 12)
    '0502'
    """
    mask = sum(1 << row for row in rows)
    return mask.to_bytes(-(-size // 8), "little").hex()


def from_hex(mask: str) -> list[int]:
    """The inverse of `to_hex`."""
    number = int.from_bytes(bytes.fromhex(mask), "little")
    return [row for row in range(number.bit_length()) if number >> row & 1]
