"""Devices: where a model takes its inputs, and where float64 is to be had, which Apple's MPS has not."""

from __future__ import annotations

from typing import Any

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


def device_of(model: Any) -> torch.device:
    """Where a model takes its inputs; the first weight tells it, unless accelerate keeps that on disk."""
    device: torch.device = next(model.parameters()).device
    places = getattr(model, "hf_device_map", {}).values()
    if device.type != "meta" or not places:
        return device
    place = next((place for place in places if place not in {"cpu", "disk", "meta"}), "cpu")
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
