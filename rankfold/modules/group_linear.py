"""A linear layer in 2 to 8 bits: groups of a row share a scale and a zero point."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn
from torch.nn import functional as F

from rankfold.modules.quantized_linear import QuantizedLinear
from rankfold.modules.spqr_linear import bit_table, pack, unpack

WHOLE_ROW, WHOLE_MATRIX = 0, -1
"""In place of the size of a group: one scale for each row, or for all, and no zero points."""

BLOCK = 16
"""PyTorch's kernels take rows and columns in multiples of this; others come out wrong or end the process (2.13)."""

ROWS_BY_TWO = 48
"""Vectors up to which two products of a kernel are faster than multiplying the matrix out."""

IN_CACHE = 2**18
"""Weights that are unpacked together: what is between their codes and the matrix stays in a core's cache."""


class GroupLinear(QuantizedLinear):
    """`y = W x + b` with `W[i, j] = scale (code - zero)`, in as many bits as asked for.

    Scales are float16, kept as integers of the same bits so that no loader casts them. Zero points are levels, in the
    bits of the codes. On CPUs groups of 32, 64, 128 and 256, and whole rows in 8 bits, are multiplied as codes, by
    PyTorch's kernels, where there are few vectors.

    >>> layer = GroupLinear(64, 16, None, bias=False, settings={"bits": 3, "group": 32})
    >>> layer(torch.ones(2, 64)).shape, layer.bits_per_weight
    (torch.Size([2, 16]), 3.59375)
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    change: nn.Parameter | None
    """Relative change of every scale, while it is trained."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        structure: None,
        bias: bool,
        settings: Mapping[str, Any],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """An empty layer; `from_codes` makes a filled one."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group = int(settings["bits"]), int(settings["group"])
        self.groups = -(-in_features // self.group) if self.group > 0 else 1
        rows = 1 if self.group == WHOLE_MATRIX else out_features
        planes = (self.bits, -(-out_features * in_features // 8))
        self.register_buffer("codes", torch.zeros(planes, dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.zeros(rows, self.groups, dtype=torch.int16, device=device))
        if self.group > 0:
            planes = (self.bits, -(-out_features * self.groups // 8))
            self.register_buffer("zeros", torch.zeros(planes, dtype=torch.uint8, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.change = None
        self.dtype = dtype or torch.get_default_dtype()

    @classmethod
    def from_codes(
        cls,
        codes: Integer[Tensor, "out in"],
        scales: Float[Tensor, "rows groups"],
        zeros: Integer[Tensor, "out groups"] | None,
        settings: Mapping[str, Any],
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> GroupLinear:
        """The layer of codes from 0, float16 scales, and zero points where groups have some."""
        layer = cls(codes.shape[1], codes.shape[0], None, bias is not None, settings, codes.device, dtype)
        layer.codes = pack(codes, layer.bits)
        layer.scales = scales.half().contiguous().view(torch.int16)
        if zeros is not None:
            layer.zeros = pack(zeros, layer.bits)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(dtype))
        return layer

    def levels(self, rows: slice = slice(None), table: Tensor | None = None) -> Integer[Tensor, "rows in"]:
        """The code of every weight of some rows, from 0; the first of them a multiple of 8; `table` as of `unpack`."""
        levels = self.__dict__.get("_levels")
        if levels is not None:
            return levels[rows]  # type: ignore[no-any-return]
        first, last, _ = rows.indices(self.out_features)
        start, stop = first * self.in_features // 8, -(-last * self.in_features // 8)
        return unpack(self.codes[:, start:stop], (last - first) * self.in_features, table).reshape(last - first, -1)

    def statistics(self) -> tuple[Float[Tensor, "rows groups"], Float[Tensor, "out groups"] | float]:
        """Scales and zero points, in float32."""
        scales = self.scales.view(torch.float16).float()
        if self.change is not None:
            scales = scales * (1 + self.change)
        if self.group <= 0:
            return scales, float(2 ** (self.bits - 1))
        return scales, unpack(self.zeros, self.out_features * self.groups).reshape(self.out_features, -1).float()

    def dequantized(self) -> Float[Tensor, "out in"]:
        """The matrix, in float32."""
        return self.matrix(torch.float32)

    def matrix(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """The matrix, rounded to a dtype; in float32 no more than a few rows lie in memory."""
        scales, zeros = self.statistics()
        scales = scales.expand(self.out_features, self.groups)
        if self.change is not None:
            return self._scaled(slice(None), scales, zeros).to(dtype)
        W = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.codes.device)
        step = max(8, IN_CACHE // self.in_features // 8 * 8)
        table = bit_table(W.device)
        for first in range(0, self.out_features, step):
            rows = slice(first, min(first + step, self.out_features))
            W[rows] = self._scaled(rows, scales, zeros, table)
        return W

    def _scaled(
        self, rows: slice, scales: Tensor, zeros: Tensor | float, table: Tensor | None = None
    ) -> Float[Tensor, "rows in"]:
        """Some rows of the matrix, in float32."""
        levels = self.levels(rows, table)
        short = self.groups * self.group - self.in_features if self.group > 0 else 0
        if short:
            levels = F.pad(levels, (0, short))
        # A tensor, so that the difference is in float32 whatever the default dtype is.
        shifts = zeros[rows, :, None] if isinstance(zeros, Tensor) else scales.new_tensor(zeros)
        W = levels.reshape(len(levels), self.groups, -1) - shifts
        W = W * scales[rows, :, None] if self.change is not None else W.mul_(scales[rows, :, None])
        return W.reshape(len(levels), -1)[:, : self.in_features]

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The layer's outputs."""
        if self.change is None:
            return super().forward(x)
        return F.linear(x, self.matrix(x.dtype), self.bias)

    def train_scales(self) -> None:
        """Let gradients reach the scales, by `change`, until `round_scales`; codes stay, and are kept unpacked."""
        self._forget()
        self.__dict__["_levels"] = self.levels()
        self.change = nn.Parameter(torch.zeros(self.scales.shape, dtype=torch.float32, device=self.scales.device))

    @torch.no_grad()
    def round_scales(self) -> None:
        """Store the scales as they were trained."""
        scales, _ = self.statistics()
        # Smaller ones would be 0, or round to few digits.
        self.scales = scales.clamp(1e-7, 65504).half().contiguous().view(torch.int16)
        self.change = None
        self._forget()

    def _forget(self) -> None:
        super()._forget()
        self.__dict__.pop("_levels", None)

    @property
    def rows_by_kernel(self) -> int:
        """Fewer where the kernel runs twice."""
        return ROWS_BY_TWO if self.bits > 4 and self.group > 0 else super().rows_by_kernel

    def kernel(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
        """PyTorch's products on CPUs: of 4-bit groups, and of 8-bit rows; fewer bits fit into both.

        Groups in more bits are the sum of two products in 4, of the upper and of the lower four bits of each code. In
        float32 the kernels are twenty times slower than a product with the whole matrix.
        """
        if self.codes.device.type != "cpu" or dtype != torch.bfloat16:
            return None
        scales, zeros = self.statistics()
        if isinstance(zeros, float):
            return self._int8_product(scales, dtype)
        if self.group not in (32, 64, 128, 256) or self.in_features % self.group or self.out_features % BLOCK:
            return None
        levels = self.levels()
        low = _int4_product(levels & 15, scales, zeros % 16, self.group, dtype)
        if self.bits <= 4:
            return low
        high = _int4_product(levels >> 4, 16 * scales, zeros // 16, self.group, dtype)
        return lambda x: high(x).add_(low(x))

    def _int8_product(self, scales: Float[Tensor, "rows 1"], dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        rows, columns = -self.out_features % BLOCK, -self.in_features % BLOCK
        signed = F.pad((self.levels().short() - 2 ** (self.bits - 1)).to(torch.int8), (0, columns, 0, rows))
        each = F.pad(scales.reshape(-1).expand(self.out_features).to(dtype), (0, rows)).contiguous()

        def product(x: Tensor) -> Tensor:
            x = F.pad(x, (0, columns)) if columns else x.contiguous()
            y = torch._weight_int8pack_mm(x, signed, each)
            return y[:, : self.out_features] if rows else y

        return product

    def extra_repr(self) -> str:
        """Sizes, bits and groups."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bits={self.bits}, group={self.group}"


def _int4_product(
    levels: Integer[Tensor, "out in"],
    scales: Float[Tensor, "out groups"],
    zeros: Float[Tensor, "out groups"],
    group: int,
    dtype: torch.dtype,
) -> Callable[[Tensor], Tensor]:
    """The product with a matrix of 4-bit codes by PyTorch's kernel, which takes 8 for the zero point."""
    groups = levels.reshape(len(levels), -1, group).int()
    # What remains between a zero point and 8 is rounded with the scales; codes that leave room are moved there.
    shift = (8 - zeros.int()).clamp(min=-groups.amin(2)).clamp(max=15 - groups.amax(2))
    groups, zeros = groups + shift[:, :, None], zeros + shift
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(groups.reshape(levels.shape), 2)
    pairs = torch.stack([scales, (8 - zeros) * scales], -1).transpose(0, 1).to(dtype).contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), packed, group, pairs)  # type: ignore[no-any-return]
