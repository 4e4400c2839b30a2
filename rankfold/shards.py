"""Folders of safetensors shards: checked before they are read, and renamed into place when they are whole."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rankfold.errors import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder: those its index names, or the single one.

    Raises:
        ValueError: If the folder holds no safetensors weights, or lacks a shard that its index names.
    """
    if (folder / INDEX).exists():
        names = _indexed_files(folder / INDEX)
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise InputError(
                f"{folder}: the index names shards that are not there: {missing}. Copy or download them again."
            )
        return [folder / name for name in names]
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    raise InputError(
        f"{folder}: a model folder must hold {SINGLE} or {INDEX}, but holds {_names(folder)}. "
        "Rankfold reads safetensors only; convert a pickled checkpoint with transformers' save_pretrained."
    )


def _indexed_files(index: Path) -> list[str]:
    """The shards that an index names."""
    try:
        content = json.loads(index.read_text())
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{index}: the index cannot be read ({error}). Copy or download it again.") from error
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise InputError(f"{index}: an index must have a `weight_map` from weights to shards, but this one has none.")
    names = sorted(set(places.values()))
    outside = [name for name in names if Path(name).name != name or name in ("", ".", "..")]
    if outside:
        raise InputError(f"{index}: shards must lie beside their index, but it names {outside[:3]}.")
    return names


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())[:8]


def check_shard(path: Path) -> int:
    """Compare a shard's length with what its header promises, which reads only the header.

    Returns:
        Number of its tensors.

    Raises:
        ValueError: If the file is truncated, too long or no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if size < 8 or header_bytes > size - 8:
            raise InputError(f"{path}: no complete safetensors header in {size} bytes. Copy or download it again.")
        try:
            header = json.loads(file.read(header_bytes))
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path}: the safetensors header cannot be read. Copy or download the file again."
            ) from error
    expected = 8 + header_bytes + _end_of_data(path, header)
    if size != expected:
        raise InputError(f"{path}: must hold {expected} bytes but holds {size}: truncated or damaged. Copy it again.")
    return len(header.keys() - {"__metadata__"})


def _end_of_data(path: Path, header: Any) -> int:
    """Bytes of data that a header promises."""
    try:
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return int(max(ends, default=0))
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: the safetensors header does not say where its tensors are. Copy or download the file again."
        ) from error


def check_folder(folder: Path) -> int:
    """Check every shard of a model folder.

    Returns:
        Number of tensors in all.

    Raises:
        ValueError: If weights are missing, truncated or not safetensors.
    """
    return sum(check_shard(shard) for shard in shard_files(folder))


@contextmanager
def whole_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name only when the block ends without an error.

    Whatever goes wrong, nothing half-written stands at `target`; leftovers of interrupted runs are removed.

    Raises:
        ValueError: If `target` is a file, or holds something and may not be overwritten.
    """
    target = target.resolve()
    check_target(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-{os.getpid()}-", dir=target.parent))
    try:
        yield partial
        _sync(partial)
        _open_to_the_umask(partial)
        _take_the_name(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _open_to_the_umask(folder: Path) -> None:
    """Temporary folders and safetensors' files are readable to their owner only; a server runs as someone else."""
    umask = _umask()
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
    folder.chmod(0o777 & ~umask)


def check_target(target: Path, overwrite: bool) -> None:
    """Whether a model folder may be written here, to be asked before the work that it takes.

    Raises:
        ValueError: If `target` is a file, or a folder that holds something and may not be overwritten; a folder
            that is no model folder may never be.
    """
    if target.is_file():
        raise InputError(f"{target}: the output must be a folder, but a file of this name exists. Choose another name.")
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        raise InputError(f"{target}: the output folder exists and is not empty. Choose another, or pass `overwrite`.")
    if not any((target / name).exists() for name in ("config.json", "adapter_config.json")):
        raise InputError(
            f"{target}: only a model folder is overwritten, and this one has no config.json. Choose another."
        )


def _take_the_name(partial: Path, target: Path) -> None:
    """Rename, keeping what stood at the target until the new folder is there."""
    if not target.exists():
        partial.rename(target)
        return
    retired = partial.with_name(f"{partial.name}.old")
    target.rename(retired)
    try:
        partial.rename(target)
    except OSError:
        retired.rename(target)
        raise
    shutil.rmtree(retired, ignore_errors=True)


def _remove_leftovers(target: Path) -> None:
    """Remove partial folders of processes that no longer run; one killed between two renames left the old folder."""
    for leftover in target.parent.glob(f".{target.name}.partial-*"):
        pid = leftover.name.removeprefix(f".{target.name}.partial-").split("-")[0]
        if not pid.isdigit() or _is_running(int(pid)):
            continue
        if leftover.suffix == ".old" and not target.exists():
            leftover.rename(target)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(folder: Path) -> None:
    """Flush every file, so that a full disk is noticed before the rename and not after it."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
