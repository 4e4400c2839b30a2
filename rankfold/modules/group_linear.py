"""A linear layer in 2 to 8 bits: groups of a row share a scale and a zero point."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn
from torch.nn import functional as F

from rankfold.modules.quantized_linear import QuantizedLinear
from rankfold.modules.spqr_linear import pack, unpack

WHOLE_ROW, WHOLE_MATRIX = 0, -1
"""In place of the size of a group: one scale for each row, or for all, and no zero points."""


class GroupLinear(QuantizedLinear):
    """`y = W x + b` with `W[i, j] = scale (code - zero)`, in as many bits as asked for.

    Scales are float16, kept as integers of the same bits so that no loader casts them. Zero points are levels, in the
    bits of the codes. On CPUs groups of 32, 64, 128 and 256 in up to 4 bits, and whole rows in 8 bits, are multiplied
    as they are stored, by PyTorch's kernels.

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

    def levels(self) -> Integer[Tensor, "out in"]:
        """The code of every weight, from 0."""
        levels = self.__dict__.get("_levels")
        if levels is None:
            levels = unpack(self.codes, self.out_features * self.in_features).reshape(self.out_features, -1)
            if self.change is not None:
                self.__dict__["_levels"] = levels
        return levels

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
        scales, zeros = self.statistics()
        if isinstance(zeros, float):
            return (self.levels().float() - zeros) * scales
        scales, zeros = (p.repeat_interleave(self.group, 1)[:, : self.in_features] for p in (scales, zeros))
        return (self.levels().float() - zeros) * scales

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The layer's outputs."""
        if self.change is None:
            return super().forward(x)
        return F.linear(x, self.dequantized().to(x.dtype), self.bias)

    def train_scales(self) -> None:
        """Let gradients reach the scales, by `change`, until `round_scales`; codes stay, and are kept unpacked."""
        self._forget()
        self.change = nn.Parameter(torch.zeros(self.scales.shape, device=self.scales.device))

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

    def kernel(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
        """PyTorch's products on CPUs: of 4-bit groups, which fewer bits fit into too, and of 8-bit rows.

        In float32 they are twenty times slower than a product with the whole matrix.
        """
        if self.codes.device.type != "cpu" or dtype != torch.bfloat16:
            return None
        # Other sizes are computed wrongly or end the process (torch 2.13, `_weight_int8pack_mm`).
        if self.out_features % 16 or self.in_features % 16:
            return None
        scales, zeros = self.statistics()
        if isinstance(zeros, float):
            if self.bits != 8:
                return None
            signed = (self.levels().short() - 128).to(torch.int8)
            each = scales.reshape(-1).expand(self.out_features).to(dtype).contiguous()
            return lambda x: torch._weight_int8pack_mm(x.contiguous(), signed, each)
        fits = self.bits <= 4 and self.group in (32, 64, 128, 256) and self.in_features % self.group == 0
        if not fits:
            return None
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(self.levels().int(), 2)
        pairs = torch.stack([scales, (8 - zeros) * scales], -1).transpose(0, 1).to(dtype).contiguous()
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), packed, self.group, pairs)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Sizes, bits and groups."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bits={self.bits}, group={self.group}"
