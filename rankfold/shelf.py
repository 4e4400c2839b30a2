"""Large tensors that wait to be used: in memory while they fit a limit, in a temporary folder beyond it."""

from __future__ import annotations

import errno
import math
import shutil
import tempfile
from collections.abc import Hashable, Iterator, MutableMapping
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor
from torch.utils import _pytree

from rankfold.errors import InputError

SHARE = 8
"""Without a limit of the user's, this part of the memory that is free when the work begins may be taken."""


def usual_limit() -> int:
    """Bytes of a shelf if nobody says: an eighth of the memory that is free."""
    return int(psutil.virtual_memory().available) // SHARE


class _Filed(NamedTuple):
    """A tensor in a file."""

    dtype: torch.dtype
    shape: torch.Size
    device: torch.device


class Shelf(MutableMapping[Hashable, Any]):
    """Values made of tensors (lists, dictionaries and named tuples of them), by key.

    While all of them together take no more than `limit` bytes they stay in memory, and what is put in after that is
    written to a temporary folder and read again when it is asked for. Tensors of other devices wait in main memory.
    The folder is removed with the shelf.

    Args:
        limit: Bytes in memory; `None` keeps everything there.
    """

    def __init__(self, limit: int | None = None) -> None:
        """An empty shelf, which makes its folder when it needs one."""
        self.limit = limit
        self._entries: dict[Hashable, tuple[Any, list[Any], Path | None]] = {}
        self._sizes: dict[Hashable, int] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._number = 0

    @property
    def bytes(self) -> int:
        """Bytes that lie in memory."""
        return sum(self._sizes.values())

    @property
    def folder(self) -> Path | None:
        """Where the rest lies, once there is any."""
        return None if self._folder is None else Path(self._folder.name)

    def __setitem__(self, key: Hashable, value: Any) -> None:
        """Put a value away, in place of what was there.

        Raises:
            ValueError: If the disk is full.
        """
        self.pop(key, None)
        leaves, structure = _pytree.tree_flatten(value)
        # One tensor in several places is held, and written, once.
        tensors = {id(leaf): leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)}
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        path = None
        if self.limit is not None and self.bytes + size > self.limit:
            path = self._new_path()
            self._write(path, list(tensors.values()), size)
            places = {name: (index, _filed(tensor)) for index, (name, tensor) in enumerate(tensors.items())}
            leaves = [places[id(leaf)] if isinstance(leaf, Tensor) else (None, leaf) for leaf in leaves]
        else:
            here = {name: (tensor.cpu(), tensor.device) for name, tensor in tensors.items()}
            leaves = [here[id(leaf)] if isinstance(leaf, Tensor) else (None, leaf) for leaf in leaves]
            self._sizes[key] = size
        self._entries[key] = (structure, leaves, path)

    def __getitem__(self, key: Hashable) -> Any:
        """A value, read anew each time where it lies on disk."""
        structure, leaves, path = self._entries[key]
        if path is None:
            values = [held if place is None else place.to(held) for place, held in leaves]
        else:
            filed = dict(leaf for leaf in leaves if leaf[0] is not None)
            tensors = _read(path, [filed[index] for index in range(len(filed))])
            values = [held if place is None else tensors[place] for place, held in leaves]
        return _pytree.tree_unflatten(values, structure)

    def __delitem__(self, key: Hashable) -> None:
        """Forget a value."""
        path = self._entries.pop(key)[2]
        self._sizes.pop(key, None)
        if path is not None:
            path.unlink(missing_ok=True)

    def __iter__(self) -> Iterator[Hashable]:
        """The keys."""
        return iter(self._entries)

    def __len__(self) -> int:
        """Number of values."""
        return len(self._entries)

    def _new_path(self) -> Path:
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="rankfold-")
        self._number += 1
        return Path(self._folder.name) / f"{self._number}.bin"

    def _write(self, path: Path, tensors: list[Tensor], size: int) -> None:
        try:
            with path.open("wb") as file:
                for tensor in tensors:
                    file.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        except OSError as error:
            path.unlink(missing_ok=True)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.ENOENT):
                raise
            free = shutil.disk_usage(path.parent).free if path.parent.exists() else 0
            raise InputError(
                f"Intermediate results beyond the limit of memory ({self.limit:,} bytes) are written to {path.parent}, "
                f"but {size:,} bytes more do not fit: {free:,} are free. Choose another disk by the environment "
                "variable TMPDIR, raise `memory`, or calibrate on fewer sequences."
            ) from error


def _filed(tensor: Tensor) -> _Filed:
    return _Filed(tensor.dtype, tensor.shape, tensor.device)


def _read(path: Path, filed: list[_Filed]) -> list[Tensor]:
    """The tensors of a file, in order."""
    counts = [math.prod(each.shape) * each.dtype.itemsize for each in filed]
    found = path.stat().st_size if path.exists() else None
    if found != sum(counts):
        came = "is gone" if found is None else f"has {found:,}"
        raise InputError(
            f"Intermediate results in {path.parent} must stay as they are until the work is done, but {path.name}, of "
            f"{sum(counts):,} bytes, {came}. Start again."
        )
    tensors = []
    with path.open("rb") as file:
        for each, count in zip(filed, counts, strict=True):
            buffer = torch.empty(count, dtype=torch.uint8)
            file.readinto(buffer.numpy().data)
            tensors.append(buffer.view(each.dtype).reshape(each.shape).to(each.device))
    return tensors
