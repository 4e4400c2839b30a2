"""Where float64 is to be had: Apple's MPS has none, and what needs it is computed on the CPU there."""

from __future__ import annotations

import torch
from torch import Tensor

WITHOUT_FLOAT64 = {"mps"}
"""Types of devices that have no float64."""


def float64_device(device: torch.device | str) -> torch.device:
    """Where numbers of a device are computed with in float64: there, or on the CPU."""
    device = torch.device(device)
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def widest(device: torch.device | str) -> torch.dtype:
    """The widest numbers that a device sums in."""
    return torch.float32 if torch.device(device).type in WITHOUT_FLOAT64 else torch.float64


def widened(tensor: Tensor) -> Tensor:
    """A tensor in float64, on the CPU where its own device has none."""
    # Moved first: MPS refuses the dtype even in the copy.
    return tensor.to(float64_device(tensor.device)).double()
