"""Parameters of a model, and its bytes in memory and on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rankfold.shards import shard_files


def parameter_count(model: Any) -> int:
    """Numbers in all parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def memory_bytes(model: Any) -> int:
    """Bytes of all parameters and buffers, shared ones counted once."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def disk_bytes(folder: str | Path) -> int | None:
    """Bytes of a checkpoint's weights; `None` for a model that is not in a local folder."""
    path = Path(folder)
    return sum(shard.stat().st_size for shard in shard_files(path)) if path.is_dir() else None
