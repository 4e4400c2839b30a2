"""A name for resumable work: models, texts and settings as one hash."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def digest_of(model: Any) -> list[Any]:
    """What tells one model from another of its shape: a hash of every tensor, the same on any device."""
    digest: list[Any] = [getattr(model.config, "rankfold", None)]
    for name, part in model.state_dict().items():
        numbers: Any = _in_memory(model, name, part).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.append([name, list(part.shape), hashlib.sha256(numbers).hexdigest()])
    return digest


def _in_memory(model: Any, name: str, part: Tensor) -> Tensor:
    """A part of a model's state, read from disk where accelerate keeps it there."""
    if part.device.type != "meta":
        return part
    from accelerate.utils import align_module_device

    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    with align_module_device(module, "cpu"):
        found: Tensor = getattr(module, leaf).detach()
        # What accelerate brought is taken away again.
        return found.clone()


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def fingerprint(*parts: Any) -> str:
    """A name for resumable work: the same only if everything that it depends on is.

    >>> fingerprint(1, "a") == fingerprint(1, "a"), fingerprint(1) == fingerprint(2)
    (True, False)
    """

    def plain(value: Any) -> Any:
        if isinstance(value, nn.Module):
            return digest_of(value)
        return value.tolist() if isinstance(value, Tensor) else str(value)

    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=plain).encode()).hexdigest()[:16]
