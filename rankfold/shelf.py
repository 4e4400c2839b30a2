"""Large tensors that wait to be used: in memory while they fit a limit, in a temporary folder beyond it."""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Hashable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.utils import _pytree

from rankfold.errors import InputError

SHARE = 32
"""Without a limit of the user's, this part of the memory that is free when the work begins may be taken. It is little,
since what waits is read once, and that takes no time beside the work on it."""

ALIGNMENT = 64
"""Bytes to which the beginning of a tensor is rounded up."""


def usual_limit() -> int:
    """Bytes of a shelf if nobody says: a part of the memory that is free, or that a container may have."""
    return min([int(psutil.virtual_memory().available), *_limits_of_groups()]) // SHARE


def give_back() -> None:
    """Give freed memory back to the system, where the C library can; between what is in use it would be kept."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _limits_of_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Limits that the control groups of this process set on its memory (Linux), in either version of them."""
    limits = []
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        place, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        # Inside of a container its own group is the root.
        for group in (place / path.strip("/"), place):
            text = (group / name).read_text().strip() if (group / name).exists() else ""
            limits += [int(text)] if text.isdigit() else []
    return limits


M = TypeVar("M", bound=nn.Module)


class _Place(NamedTuple):
    """Where a tensor lies among the bytes of an entry, and what it is."""

    start: int
    dtype: torch.dtype
    shape: torch.Size
    device: torch.device

    def of(self, data: Tensor) -> Tensor:
        """The tensor among the bytes."""
        size = math.prod(self.shape) * self.dtype.itemsize
        return data[self.start : self.start + size].view(self.dtype).reshape(self.shape)


class _Entry(NamedTuple):
    """One value: what it is made of, with the place of each tensor in the bytes, which lie in memory or in a file."""

    structure: Any
    leaves: list[Any]
    size: int
    data: Tensor | Path


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
        self._entries: dict[Hashable, _Entry] = {}
        self._held: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._number = 0

    @property
    def bytes(self) -> int:
        """Bytes that lie in memory."""
        waiting = sum(entry.size for entry in self._entries.values() if isinstance(entry.data, Tensor))
        return waiting + sum(self._held.values())

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
        # One tensor in several places is held once.
        tensors = {id(leaf): leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)}
        places, size = _places(tensors)
        data: Tensor | Path = _memory(size) if self._fits(size) else self._path()
        if isinstance(data, Tensor):
            for name, tensor in tensors.items():
                places[name].of(data).copy_(tensor)
        else:
            self._write(data, [(places[name].start, tensor) for name, tensor in tensors.items()], size)
        leaves = [places[id(leaf)] if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._entries[key] = _Entry(structure, leaves, size, data)

    def hold(self, module: M) -> M:
        """A module that is done, whose numbers lie beyond the limit in a file that is mapped into memory.

        The system reads them when they are asked for and drops them when memory is short, as it does with the weights
        of a checkpoint. What is changed in place later stays in memory. Modules on other devices are left alone.

        Raises:
            ValueError: If the disk is full.
        """
        numbers = {id(part): part for part in (*module.parameters(), *module.buffers()) if part.device.type == "cpu"}
        places, size = _places(numbers)
        if not size or self._fits(size):
            self._held[module] = size
            return module
        path = self._path()
        self._write(path, [(places[name].start, part.detach()) for name, part in numbers.items()], size)
        for name, part in numbers.items():
            if part.numel():
                # Each mapped alone: transformers takes tensors of one storage for tied ones, and copies them.
                taken = np.memmap(path, np.uint8, "c", places[name].start, part.numel() * part.element_size())
                part.data = torch.from_numpy(taken).view(part.dtype).reshape(part.shape)
        # Mapped files cannot be removed on Windows, and go with the folder.
        with suppress(PermissionError):
            path.unlink()
        give_back()
        return module

    def _fits(self, size: int) -> bool:
        return self.limit is None or self.bytes + size <= self.limit

    def __getitem__(self, key: Hashable) -> Any:
        """A value, read anew each time where it lies on disk."""
        entry = self._entries[key]
        data = entry.data if isinstance(entry.data, Tensor) else _read(entry.data, entry.size)
        tensors = {place: place.of(data).to(place.device) for place in entry.leaves if isinstance(place, _Place)}
        leaves = [tensors[leaf] if isinstance(leaf, _Place) else leaf for leaf in entry.leaves]
        return _pytree.tree_unflatten(leaves, entry.structure)

    def __delitem__(self, key: Hashable) -> None:
        """Forget a value."""
        entry = self._entries.pop(key)
        if isinstance(entry.data, Path):
            entry.data.unlink(missing_ok=True)

    def __iter__(self) -> Iterator[Hashable]:
        """The keys."""
        return iter(self._entries)

    def __len__(self) -> int:
        """Number of values."""
        return len(self._entries)

    def _path(self) -> Path:
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="rankfold-")
        self._number += 1
        return Path(self._folder.name) / f"{self._number}.bin"

    def _write(self, path: Path, tensors: Sequence[tuple[int, Tensor]], size: int) -> None:
        try:
            with path.open("wb") as file:
                for start, tensor in tensors:
                    file.write(bytes(start - file.tell()))
                    file.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
                file.write(bytes(size - file.tell()))
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


def _places(tensors: Mapping[int, Tensor]) -> tuple[dict[int, _Place], int]:
    """Where tensors lie one after the other, and the bytes of all."""
    places: dict[int, _Place] = {}
    size = 0
    for name, tensor in tensors.items():
        places[name] = _Place(size, tensor.dtype, tensor.shape, tensor.device)
        size += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
    return places, size


def _memory(size: int) -> Tensor:
    """Bytes that go back to the system when they are dropped; between other tensors they would leave holes."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    return torch.frombuffer(mmap.mmap(-1, max(size, 1), **private), dtype=torch.uint8)


def _read(path: Path, size: int) -> Tensor:
    """The bytes of a file."""
    found = path.stat().st_size if path.exists() else None
    if found != size:
        came = "is gone" if found is None else f"has {found:,}"
        raise InputError(
            f"Intermediate results in {path.parent} must stay as they are until the work is done, but {path.name}, of "
            f"{size:,} bytes, {came}. Start again."
        )
    data = _memory(size)
    with path.open("rb") as file:
        file.readinto(data.numpy().data)
    return data
