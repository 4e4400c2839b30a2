"""Loads this checkpoint without rankfold: AutoModel.from_pretrained(folder, trust_remote_code=True).

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
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForQuestionAnswering, AutoModelForSequenceClassification, AutoModelForTokenClassification
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForQuestionAnswering, LlamaForSequenceClassification, LlamaForTokenClassification, LlamaModel


class InputError(ValueError):
    """What was given cannot be used: the message says what must hold, what came, where, and what to do."""


class ModuleWeight(torch.Tensor):
    """A tensor without storage that stands for the matrix of a factorized module.

    Models read weights directly: T5 asks for the dtype, Mamba multiplies by the matrix, experts index a stack
    and call `F.linear`. Asking for dtype, device or shape costs nothing here, `F.linear` runs the factors, and
    any other operation computes the product first, differentiably.
    """

    _apply: Callable[[Tensor], Tensor]
    _matrix: Callable[[], Tensor]

    @staticmethod
    def __new__(
        cls, like: Tensor, shape: tuple[int, int], apply: Callable[[Tensor], Tensor], matrix: Callable[[], Tensor]
    ) -> ModuleWeight:
        """A weight of `shape` with the dtype and device of `like`."""
        weight: ModuleWeight = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        weight._apply = apply
        weight._matrix = matrix
        return weight

    def __init__(self, *args: Any) -> None:
        """Everything is set by `__new__`."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Metadata as it is, `F.linear` through the module, anything else on the product."""
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is F.linear:
            return _linear(*args, **kwargs)
        args, kwargs = tree_map_only(cls, lambda weight: weight._matrix(), (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The product for whatever reaches the dispatcher directly."""
        args, kwargs = tree_map_only(cls, lambda weight: weight._matrix(), (args, kwargs or {}))
        return func(*args, **kwargs)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` whose weight, or whose input, is a module's weight."""
    if isinstance(input, ModuleWeight):
        return F.linear(input._matrix(), weight, bias)
    assert isinstance(weight, ModuleWeight)
    output = weight._apply(input)
    return output if bias is None else output + bias


_METADATA = {
    *(getattr(torch.Tensor, name).__get__ for name in ("dtype", "device", "shape", "ndim", "layout", "is_cuda")),
    *(torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel),
}


class FactorizedLinear(nn.Module):
    """A linear layer `y = up(hidden(x))` whose matrix is a product; each form says what `hidden` is."""

    in_features: int
    out_features: int
    up: nn.Linear

    def hidden(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch rank"]:
        """What the last factor reads."""
        raise AssertionError("each form defines it")

    def product(self) -> Float[Tensor, "out in"]:
        """The matrix that the factors stand for, as an ordinary tensor."""
        raise AssertionError("each form defines it")

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The layer's outputs."""
        output: Tensor = self.up(self.hidden(x))
        return output

    def without_bias(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The matrix applied to `x`."""
        return F.linear(self.hidden(x), self.up.weight)

    @property
    def weight(self) -> Tensor:
        """The product of the factors (out, in); `F.linear` with it runs the factors instead."""
        shape = (self.out_features, self.in_features)
        return ModuleWeight(self.up.weight, shape, self.without_bias, self.product)

    @property
    def bias(self) -> Tensor | None:
        """The bias, or `None`."""
        return self.up.bias

    def to_dense(self) -> nn.Linear:
        """An `nn.Linear` with the same outputs, in the same dtype and on the same device."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        dense.weight = nn.Parameter(self.product().detach())
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone())
        return dense


class LowRankLinear(FactorizedLinear):
    """`y = up(down(x))`, in the place of an `nn.Linear` (or of GPT-2's `Conv1D`).

    Both factors are plain `nn.Linear`, so that PEFT, bitsandbytes and torchao find them.

    >>> layer = LowRankLinear(8, 6, (2,), bias=False)
    >>> layer(torch.ones(3, 8)).shape, layer.weight.shape, sum(p.numel() for p in layer.parameters())
    (torch.Size([3, 6]), torch.Size([6, 8]), 28)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ranks: tuple[int, ...],
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """An empty layer; `from_factors` makes a filled one."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        (self.rank,) = ranks
        self.down = nn.Linear(in_features, self.rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(self.rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def from_factors(
        cls,
        up: Float[Tensor, "out rank"],
        down: Float[Tensor, "rank in"],
        bias: Float[Tensor, " out"] | None = None,
    ) -> LowRankLinear:
        """A layer that holds these factors, in their dtype and on their device."""
        layer = cls(down.shape[1], up.shape[0], (up.shape[1],), bias is not None, device="meta", dtype=up.dtype)
        layer.down.weight = nn.Parameter(down.contiguous())
        layer.up.weight = nn.Parameter(up.contiguous())
        if bias is not None:
            layer.up.bias = nn.Parameter(bias)
        return layer

    def hidden(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch rank"]:
        """What the last factor reads."""
        hidden: Tensor = self.down(x)
        return hidden

    def product(self) -> Float[Tensor, "out in"]:
        """The matrix that the factors stand for, as an ordinary tensor."""
        return self.up.weight @ self.down.weight

    def extra_repr(self) -> str:
        """Sizes and rank."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class TuckerLinear(FactorizedLinear):
    """`y = up(core(down(x)))`, in the place of an `nn.Linear`.

    With the core folded into a factor this is a `LowRankLinear`, smaller and faster; the core is kept for
    fidelity to the literature, for cores that are trained, and for unequal ranks.

    >>> layer = TuckerLinear(8, 6, (2, 3), bias=False)
    >>> layer.weight.shape, sum(p.numel() for p in layer.parameters())
    (torch.Size([6, 8]), 42)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ranks: tuple[int, ...],
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """An empty layer of ranks (output mode, input mode); `from_factors` makes a filled one."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.rank_out, self.rank_in = ranks
        self.down = nn.Linear(in_features, self.rank_in, bias=False, device=device, dtype=dtype)
        self.core = nn.Linear(self.rank_in, self.rank_out, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(self.rank_out, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def from_factors(
        cls,
        up: Float[Tensor, "out rank_out"],
        core: Float[Tensor, "rank_out rank_in"],
        down: Float[Tensor, "rank_in in"],
        bias: Float[Tensor, " out"] | None = None,
    ) -> TuckerLinear:
        """A layer that holds these factors, in their dtype and on their device."""
        ranks = (core.shape[0], core.shape[1])
        layer = cls(down.shape[1], up.shape[0], ranks, bias is not None, device="meta", dtype=up.dtype)
        layer.down.weight = nn.Parameter(down.contiguous())
        layer.core.weight = nn.Parameter(core.contiguous())
        layer.up.weight = nn.Parameter(up.contiguous())
        if bias is not None:
            layer.up.bias = nn.Parameter(bias)
        return layer

    def hidden(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch rank"]:
        """What the last factor reads."""
        hidden: Tensor = self.core(self.down(x))
        return hidden

    def product(self) -> Float[Tensor, "out in"]:
        """The matrix that core and factors stand for, as an ordinary tensor."""
        return self.up.weight @ self.core.weight @ self.down.weight

    def fold(self) -> LowRankLinear:
        """The same layer in two factors: the core multiplied into the larger one, which costs nothing at run time."""
        up, core, down = (linear.weight.detach() for linear in (self.up, self.core, self.down))
        bias = None if self.bias is None else self.bias.detach()
        if self.out_features >= self.in_features:
            return LowRankLinear.from_factors(up @ core, down, bias)
        return LowRankLinear.from_factors(up, core @ down, bias)

    def extra_repr(self) -> str:
        """Sizes and ranks."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, rank_out={self.rank_out}, rank_in={self.rank_in}"


class PivotedLinear(FactorizedLinear):
    """`h = down(x)` gives the pivot rows of `y`, `up(h)` the others: `r (m + n) - r^2` numbers at rank `r`.

    Both parts are plain `nn.Linear`, so that PEFT, bitsandbytes and torchao find them. Which rows are pivots belongs
    to the structure, not to the weights: it is stored in the plan, one bit a row, since loaders elsewhere fill
    parameters but not every buffer.

    >>> layer = PivotedLinear(8, 6, (2,), bias=False)
    >>> layer(torch.ones(3, 8)).shape, layer.weight.shape, sum(p.numel() for p in layer.parameters())
    (torch.Size([3, 6]), torch.Size([6, 8]), 24)
    """

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
    return rows.index_select(dim, _places(pivots, rows.shape[dim], rows.device))


torch.fx.wrap("arranged")


@torch.compiler.assume_constant_result
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


class SpQRLinear(nn.Module):
    """`y = W x + b` with `W` in few bits; each call multiplies it out (arXiv:2306.03078).

    16-bit numbers are kept as integers of the same bits, so that no loader casts them.

    >>> layer = SpQRLinear(8, 6, kept=0, bias=False, grid={"bits": 3, "group": 4, "rows": 4, "statistics_bits": 3})
    >>> layer(torch.ones(3, 8)).shape, layer.codes.shape
    (torch.Size([3, 6]), torch.Size([3, 6]))
    """

    codes: Tensor
    scale_codes: Tensor
    zero_codes: Tensor
    ranges: Tensor
    outlier_counts: Tensor
    outlier_columns: Tensor
    outlier_values: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kept: int,
        bias: bool,
        grid: Mapping[str, Any],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """An empty layer; `from_parts` makes a filled one."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group, self.rows = grid["bits"], grid["group"], grid["rows"]
        self.statistics_bits = grid["statistics_bits"]
        self.groups, self.blocks = -(-in_features // self.group), -(-out_features // self.rows)
        statistics_bytes = -(-out_features * self.groups // 8)
        place = torch.int16 if in_features <= 2**15 else torch.int32
        shapes = {
            "codes": ((self.bits, -(-out_features * in_features // 8)), torch.uint8),
            "scale_codes": ((self.statistics_bits, statistics_bytes), torch.uint8),
            "zero_codes": ((self.statistics_bits, statistics_bytes), torch.uint8),
            "ranges": ((4, self.blocks, self.groups), torch.int16),
            "outlier_counts": ((out_features,), place),
            "outlier_columns": ((kept,), place),
            "outlier_values": ((kept,), torch.int16),
        }
        for name, (shape, kind) in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=kind, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.dtype = dtype or torch.get_default_dtype()

    def dequantized(self) -> Float[Tensor, "out in"]:
        """The matrix, in float32."""
        count = self.out_features * self.groups
        parts = (self.scale_codes, self.zero_codes)
        scale_codes, zero_codes = (unpack(part, count).reshape(self.out_features, -1) for part in parts)
        scale, zero = statistics(scale_codes, zero_codes, self.ranges.view(torch.bfloat16), self.rows)
        scale, zero = (part.repeat_interleave(self.group, 1)[:, : self.in_features] for part in (scale, zero))
        codes = unpack(self.codes, self.out_features * self.in_features).reshape(self.out_features, -1)
        W = (codes.float() - zero) * scale
        order = torch.arange(self.out_features, device=W.device)
        kept = order.repeat_interleave(self.outlier_counts.long())
        W[kept, self.outlier_columns.long()] = self.outlier_values.view(torch.bfloat16).float()
        return W

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The matrix, in the dtype of the model; made anew at every look."""
        return self.dequantized().to(self.dtype)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The layer's outputs."""
        return F.linear(x, self.dequantized().to(x.dtype), self.bias)

    def to_dense(self) -> nn.Linear:
        """An `nn.Linear` with the same outputs."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        dense.weight = nn.Parameter(self.weight)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone())
        return dense

    def extra_repr(self) -> str:
        """Sizes and bits."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


def statistics(
    scale_codes: Integer[Tensor, "out groups"],
    zero_codes: Integer[Tensor, "out groups"],
    ranges: Float[Tensor, "4 blocks groups"],
    rows: int,
) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    """Scales and zero points of every group, in float32, from their codes and the ranges of each block of rows."""
    low, step, zero_low, zero_step = ranges.float().repeat_interleave(rows, 1)[:, : len(scale_codes)]
    return low + step * scale_codes.float(), zero_low + zero_step * zero_codes.float()


def pack(codes: Integer[Tensor, "*shape"], bits: int) -> Integer[Tensor, "bits bytes"]:
    """Small numbers in as many bits as they have: the first bits of all, then the second ones, eight to a byte.

    >>> pack(torch.tensor([1, 2, 3]), 2).tolist()
    [[5], [6]]
    """
    flat = codes.reshape(-1).to(torch.uint8)
    flat = F.pad(flat, (0, -len(flat) % 8)).reshape(-1, 8)
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=flat.device)
    return torch.stack([(((flat >> bit) & 1) * weights).sum(1, dtype=torch.uint8) for bit in range(bits)])


def unpack(packed: Integer[Tensor, "bits bytes"], count: int) -> Integer[Tensor, " count"]:
    """The inverse of `pack`.

    >>> unpack(torch.tensor([[5], [6]], dtype=torch.uint8), 3).tolist()
    [1, 2, 3]
    """
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    codes = torch.zeros(packed.shape[1] * 8, dtype=torch.uint8, device=packed.device)
    for bit, plane in enumerate(packed):
        codes |= ((plane[:, None] >> places) & 1).reshape(-1) << bit
    return codes[:count]


class LinearStack(nn.ModuleList):
    """Linear layers that stand where a parameter of shape (experts, out, in) stood.

    Model code writes `F.linear(x, stack[i])`; indexing gives a weight that runs the i-th layer, dense or
    factorized, of any rank. The stock grouped kernels need one tensor, so the model must use its eager experts.
    """

    @classmethod
    def from_parameter(cls, stacked: nn.Parameter) -> LinearStack:
        """One `nn.Linear` per slice; the slices stay views of the stacked parameter."""
        return cls([_layer_around(nn.Parameter(matrix, stacked.requires_grad)) for matrix in stacked.detach()])

    def __getitem__(self, index: int | Tensor) -> Tensor:  # type: ignore[override]
        """The weight of one layer."""
        layer = self._modules[str(operator.index(index) % len(self))]
        assert layer is not None
        # A layer in few bits may have no parameter at all, and says its dtype itself.
        like = next((part for part in layer.parameters() if part.is_floating_point()), None)
        return ModuleWeight(
            _empty_like(layer) if like is None else like,
            (layer.out_features, layer.in_features),  # type: ignore[arg-type]
            layer,
            lambda: layer.weight,  # type: ignore[arg-type, return-value]
        )


def _empty_like(layer: nn.Module) -> Tensor:
    """A tensor of the dtype and on the device of a layer that has no parameter, its weights being in few bits."""
    few: Any = next(part for part in layer.modules() if hasattr(part, "dtype"))
    return torch.empty(0, dtype=few.dtype, device=next(layer.buffers()).device)


def _layer_around(weight: nn.Parameter) -> nn.Linear:
    """An `nn.Linear` without bias around an existing parameter."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    linear.weight = weight
    return linear


def restack(model: nn.Module) -> None:
    """Give stacks whose layers are all dense back their one parameter."""
    for path, stack in list(model.named_modules()):
        if isinstance(stack, LinearStack) and all(type(layer) is nn.Linear for layer in stack.children()):
            owner_path, _, name = path.rpartition(".")
            owner = model.get_submodule(owner_path)
            stacked = torch.stack([parameter.detach() for parameter in stack.parameters()])
            delattr(owner, name)
            setattr(owner, name, nn.Parameter(stacked))


class AdaptiveLinear(LowRankLinear):
    """`y = up(down(x))` of rank `small` for every token, of rank `large` where the small one reads too little of it.

    The factors are ordered, most important first. A token needs the rest of them if the share of its squared length
    that the first `small` rows of `down` read is below `threshold`; nothing else is computed beyond the products. What
    stands for a matrix, `product` and `to_dense`, is that of the large rank.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ranks: tuple[int, ...],
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """An empty layer of two ranks, the small one first."""
        self.small, large = ranks
        super().__init__(in_features, out_features, (large,), bias, device, dtype)
        self.register_buffer("threshold", torch.zeros((), device=device, dtype=torch.float32))
        self.threshold: Tensor

    @classmethod
    def from_low_rank(cls, layer: LowRankLinear, small: int) -> AdaptiveLinear:
        """A layer with the ordered factors of another; its threshold is 0, so no token needs the rest."""
        up = layer.up
        made = cls(layer.in_features, layer.out_features, (small, layer.rank), up.bias is not None, device="meta")
        made.down, made.up = layer.down, up
        made.threshold = torch.zeros((), device=up.weight.device)
        return made

    def read_share(
        self, x: Float[Tensor, "*batch in"], first: Float[Tensor, "*batch small"]
    ) -> Float[Tensor, "*batch"]:
        """How much of a token's squared length the first rows of `down` read, up to a constant of the layer."""
        return first.float().square().sum(-1) / x.float().square().sum(-1).clamp(min=1e-12)

    def needs_more(self, x: Float[Tensor, "*batch in"], first: Float[Tensor, "*batch small"]) -> Bool[Tensor, "*batch"]:
        """The tokens that take the large rank."""
        return self.read_share(x, first) < self.threshold

    def hidden(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch rank"]:
        """What `up` reads, zero where a token does without."""
        first = nn.functional.linear(x, self.down.weight[: self.small])
        more = self.needs_more(x, first)
        rest = first.new_zeros(*first.shape[:-1], self.rank - self.small)
        rest[more] = nn.functional.linear(x[more], self.down.weight[self.small :])
        return torch.cat([first, rest], -1)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The layer's outputs; the rest of the factors is multiplied for the tokens that need it only."""
        first = nn.functional.linear(x, self.down.weight[: self.small])
        output = nn.functional.linear(first, self.up.weight[:, : self.small], self.up.bias)
        more = self.needs_more(x, first)
        if bool(more.any()):
            rest = nn.functional.linear(x[more], self.down.weight[self.small :])
            output[more] += nn.functional.linear(rest, self.up.weight[:, self.small :])
        return output

    def extra_repr(self) -> str:
        """Sizes and ranks."""
        return f"in_features={self.in_features}, out_features={self.out_features}, ranks=({self.small}, {self.rank})"


JOINT_FORMS = ("cp", "tucker_stack", "tensor_train")


class SharedFactors(nn.Module):
    """What the layers of a stack have in common."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        form: str,
        ranks: tuple[int, ...],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Empty factors of one form."""
        super().__init__()

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        last = ranks[-1]
        self.down = empty(last, in_features)
        self.core = empty(*ranks) if form == "tucker_stack" else None
        carriages = (ranks[0], out_features, last) if form == "tensor_train" else (out_features, ranks[-2:][0])
        self.up = empty(*carriages)


class JointLinear(FactorizedLinear):
    """One layer of a stack: the first one holds the shared factors, the others refer to it.

    `cp`: `up (mix * (down x))`. `tucker_stack`: `up (sum of mix * core) (down x)`. `tensor_train`: the sum of
    `mix * up`, applied to `down x`. The matrix is never formed.
    """

    def __init__(  # noqa: PLR0913, PLR0917
        self,
        in_features: int,
        out_features: int,
        form: str,
        ranks: tuple[int, ...],
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        leader: JointLinear | None = None,
    ) -> None:
        """An empty layer; without `leader` it is the first of its stack."""
        super().__init__()
        self.in_features, self.out_features, self.form, self.ranks = in_features, out_features, form, ranks
        self.mix = nn.Parameter(torch.empty(ranks[0], device=device, dtype=dtype))
        self.own_bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        if leader is None:
            self.shared = SharedFactors(in_features, out_features, form, ranks, device, dtype)
        # In a tuple, so that it is not a part of this module, and is saved once.
        self._leader = (leader,)

    @property
    def factors(self) -> SharedFactors:
        """The factors of the stack."""
        (leader,) = self._leader
        return self.shared if leader is None else leader.shared

    def without_bias(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The matrix applied to `x`."""
        shared = self.factors
        hidden = F.linear(x, shared.down)
        if self.form == "tensor_train":
            return F.linear(hidden, torch.einsum("a,aor->or", self.mix, shared.up))
        if shared.core is not None:
            return F.linear(F.linear(hidden, torch.einsum("a,aoi->oi", self.mix, shared.core)), shared.up)
        return F.linear(hidden * self.mix, shared.up)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The layer's outputs."""
        output = self.without_bias(x)
        return output if self.own_bias is None else output + self.own_bias

    def product(self) -> Float[Tensor, "out in"]:
        """The matrix that the factors stand for, as an ordinary tensor."""
        identity = torch.eye(self.in_features, device=self.mix.device, dtype=self.mix.dtype)
        return self.without_bias(identity).T

    @property
    def weight(self) -> Tensor:
        """The product of the factors (out, in); `F.linear` with it runs the factors instead."""
        return ModuleWeight(self.mix, (self.out_features, self.in_features), self.without_bias, self.product)

    @property
    def bias(self) -> Tensor | None:
        """The bias, or `None`."""
        return self.own_bias

    def extra_repr(self) -> str:
        """Sizes, form and ranks."""
        return f"in_features={self.in_features}, out_features={self.out_features}, form={self.form}, ranks={self.ranks}"


READS_PLAN_VERSION = 1


FORMS: dict[str, type[FactorizedLinear]] = {
    "low_rank": LowRankLinear,
    "tucker": TuckerLinear,
    "pivoted": PivotedLinear,
}


DEPENDING: dict[str, type[FactorizedLinear]] = {"adaptive": AdaptiveLinear}


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
        install(self, getattr(config, "rankfold", None) or {"options": []})


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
        model.config._experts_implementation = "eager"


class RankfoldLlamaConfig(LlamaConfig):
    model_type = "rankfold-llama"


class RankfoldLlamaModel(Factorized, LlamaModel):
    config_class = RankfoldLlamaConfig


class RankfoldLlamaForCausalLM(Factorized, LlamaForCausalLM):
    config_class = RankfoldLlamaConfig


class RankfoldLlamaForSequenceClassification(Factorized, LlamaForSequenceClassification):
    config_class = RankfoldLlamaConfig


class RankfoldLlamaForTokenClassification(Factorized, LlamaForTokenClassification):
    config_class = RankfoldLlamaConfig


class RankfoldLlamaForQuestionAnswering(Factorized, LlamaForQuestionAnswering):
    config_class = RankfoldLlamaConfig


AutoModel.register(RankfoldLlamaConfig, RankfoldLlamaModel, exist_ok=True)
AutoModelForCausalLM.register(RankfoldLlamaConfig, RankfoldLlamaForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(RankfoldLlamaConfig, RankfoldLlamaForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(RankfoldLlamaConfig, RankfoldLlamaForTokenClassification, exist_ok=True)
AutoModelForQuestionAnswering.register(RankfoldLlamaConfig, RankfoldLlamaForQuestionAnswering, exist_ok=True)
