"""What was worked out so far, on disk: an interrupted run that begins again does not work it out once more."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from rankfold.errors import InputError


class Journal(MutableMapping[str, Any]):
    """Values made of tensors and plain things, by name, each in a file that is whole or not there.

    Files are safetensors; how a value is built up stands in their metadata as JSON. A file that cannot be read, as
    after a power cut, counts as not there. Values are mapped from their files, so that they take no memory of their
    own, but for symmetric matrices, of which one half is stored.

    Args:
        folder: Where the files lie; made when the first is written. The caller removes it.
        kinds: Named tuples and dataclasses that values may be made of.
    """

    def __init__(self, folder: Path, *kinds: type) -> None:
        """A journal, which goes on with what lies in the folder."""
        self.folder = folder
        self._kinds = {kind.__name__: kind for kind in kinds}

    def of(self, part: str) -> Journal:
        """The journal of a part of the work."""
        return Journal(self.folder / part, *self._kinds.values())

    def __contains__(self, name: object) -> bool:
        """Whether a value lies here and can be read."""
        if not isinstance(name, str) or not self._path(name).exists():
            return False
        try:
            with safetensors.safe_open(self._path(name), "pt") as file:
                return bool(file.metadata())
        except (safetensors.SafetensorError, OSError):
            return False

    def __getitem__(self, name: str) -> Any:
        """A value, mapped from its file."""
        if name not in self:
            raise KeyError(name)
        with safetensors.safe_open(self._path(name), "pt") as file:
            return self._built(json.loads(file.metadata()["value"]), file)

    def __setitem__(self, name: str, value: Any) -> None:
        """Write a value down.

        Raises:
            ValueError: If the disk is full.
        """
        tensors: dict[str, Tensor] = {}
        structure = json.dumps(self._taken_apart(value, tensors))
        path = self._path(name)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial, metadata={"name": name, "value": structure})
            partial.replace(path)
        except (OSError, safetensors.SafetensorError) as error:
            with suppress(OSError):
                partial.unlink()
            place = next(folder for folder in (self.folder, *self.folder.parents) if folder.exists())
            raise InputError(
                f"{self.folder}: what was worked out so far is kept here, so that an interrupted run resumes; it could "
                f"not be written ({error}); {shutil.disk_usage(place).free:,} bytes are free. Free some, or choose an "
                "output on another disk."
            ) from error

    def __delitem__(self, name: str) -> None:
        """Forget a value."""
        if name not in self:
            raise KeyError(name)
        self._path(name).unlink()

    def __iter__(self) -> Iterator[str]:
        """Names of the values."""
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safetensors.safe_open(path, "pt") as file:
                    yield file.metadata()["name"]
            except (safetensors.SafetensorError, OSError):
                continue

    def __len__(self) -> int:
        """Number of values."""
        return sum(1 for _ in self)

    def _path(self, name: str) -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors"

    def _taken_apart(self, value: Any, tensors: dict[str, Tensor]) -> Any:
        """How a value is built up, its tensors put aside."""
        if isinstance(value, (Tensor, np.ndarray)):
            name = str(len(tensors))
            tensor = value if isinstance(value, Tensor) else torch.from_numpy(value)
            # safetensors takes no two views of the same numbers.
            tensor = tensor.detach().cpu()
            device = str(value.device) if isinstance(value, Tensor) else ""
            if tensor.ndim == 2 and len(tensor) > 1 and torch.equal(tensor, tensor.T):
                rows, columns = torch.triu_indices(*tensor.shape)
                tensors[name] = tensor[rows, columns]
                return {"tensor": name, "device": device, "symmetric": len(tensor)}
            tensors[name] = tensor.contiguous().clone()
            return {"tensor": name, "device": device}
        if type(value).__name__ in self._kinds:
            names = getattr(value, "_fields", None) or [field.name for field in dataclasses.fields(value)]
            parts = {name: self._taken_apart(getattr(value, name), tensors) for name in names}
            return {"kind": type(value).__name__, "parts": parts}
        if isinstance(value, dict):
            return {"items": [[self._taken_apart(part, tensors) for part in item] for item in value.items()]}
        if isinstance(value, tuple):
            return {"tuple": [self._taken_apart(part, tensors) for part in value]}
        if value is None or isinstance(value, (bool, int, float, str)):
            return {"value": value}
        raise TypeError(f"a journal takes tensors, {', '.join(self._kinds)} and plain things, but got {type(value)}")

    def _built(self, structure: Any, file: Any) -> Any:
        """A value from how it is built up."""
        if "tensor" in structure:
            tensor = file.get_tensor(structure["tensor"])
            if size := structure.get("symmetric"):
                upper, tensor = tensor, tensor.new_empty(size, size)
                rows, columns = torch.triu_indices(size, size)
                tensor[rows, columns] = tensor[columns, rows] = upper
            return tensor.to(structure["device"]) if structure["device"] else tensor.numpy()
        if "kind" in structure:
            parts = {name: self._built(part, file) for name, part in structure["parts"].items()}
            return self._kinds[structure["kind"]](**parts)
        if "items" in structure:
            return {self._built(name, file): self._built(part, file) for name, part in structure["items"]}
        if "tuple" in structure:
            return tuple(self._built(part, file) for part in structure["tuple"])
        return structure["value"]
