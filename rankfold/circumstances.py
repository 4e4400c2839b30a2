"""What a number depends on: model, code, data, seed, machine and versions; the one place where records are made."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankfold.fingerprint import file_digest, fingerprint
from rankfold.record import Record

LIBRARIES = ("rankfold", "torch", "transformers", "bitsandbytes", "peft")
"""Packages whose versions a record names, where they are installed."""


@dataclass(frozen=True)
class Circumstances:
    """The facts that records of one measurement share; `record` adds what one number says."""

    facts: Mapping[str, Any]
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By subject, the name and the digest of the model."""

    def also(self, **details: Any) -> Circumstances:
        """The same with more facts; what is `None` is left as it was."""
        known = {name: value for name, value in details.items() if value is not None}
        return Circumstances({**self.facts, **known}, self.models)

    def record(
        self,
        subject: str,
        name: str,
        value: float | int | None,
        unit: str = "1",
        error: float | None = None,
        /,
        **details: Any,
    ) -> Record:
        """One observation under these circumstances.

        Args:
            subject: The model that was observed, for example `dense`, or what else was.
            name: What was observed.
            value: The observation in `unit`; `None` where it could not be made, `unavailable` then being the reason.
            unit: Base unit.
            error: Standard error, where it is known.
            details: What this number alone depends on.
        """
        model = self.models.get(subject, self.facts.get("model"))
        return Record(
            subject=subject,
            name=name,
            value=value,
            unit=unit,
            error=error,
            context={**self.facts, "model": model, **details},
        )

    def difference(
        self,
        subject: str,
        name: str,
        value: float | int | None,
        unit: str = "1",
        error: float | None = None,
        /,
        *,
        minus: str,
        **details: Any,
    ) -> Record:
        """A paired difference: `subject` minus the model that `minus` names, on the same items.

        The record has the name of what was compared, and the other model in its context as `minus`: this is the one
        spelling of a difference, which tables, pages and warning signs read.
        """
        return self.record(subject, name, value, unit, error, minus=minus, **details)


def circumstances(models: Any = None, *, data: Any = None, seed: int | None = None, **details: Any) -> Circumstances:
    """Everything that numbers measured now depend on.

    Args:
        models: The model, or several by subject; a string where only a name is known.
        data: What is read: a file, whose hash is taken, an object with `name` and `sha256` such as a
            `rankfold.calibration.Corpus`, or a name.
        seed: Random seed.
        details: Whatever else the numbers depend on.
    """
    several = models if isinstance(models, Mapping) else {}
    facts: dict[str, Any] = {
        "model": None if models is None or several else described(models),
        **_described_data(data),
        "seed": seed,
        "code": code(),
        "hardware": hardware(),
        "versions": versions(),
        **details,
    }
    return Circumstances(facts, {subject: described(model) for subject, model in several.items()})


def described(model: Any) -> dict[str, Any]:
    """Name and digest of a model; a name alone has no digest."""
    if not isinstance(model, nn.Module):
        return {"name": Path(str(model)).name or str(model), "digest": None}
    named = str(getattr(model, "name_or_path", "") or type(model).__name__)
    # Of a folder only its name: where it lies says nothing to others.
    return {"name": Path(named).name if Path(named).exists() else named, "digest": fingerprint(model)}


def _described_data(data: Any) -> dict[str, Any]:
    if isinstance(data, Path):
        return {"data": data.name, "data_sha256": file_digest(data)}
    if data is None or isinstance(data, str):
        return {"data": data, "data_sha256": None}
    return {"data": str(data.name), "data_sha256": str(data.sha256)}


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a result depends on."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def code() -> dict[str, str | None]:
    """Version of rankfold, and the commit where it runs from a checkout; `+` marks a commit with changes."""
    return {"version": versions().get("rankfold"), "commit": _commit(Path(__file__).parent.parent)}


def _commit(folder: Path) -> str | None:
    if not (folder / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None


def hardware() -> dict[str, str | int]:
    """Processor or accelerator, cores that this process may use, and threads that torch uses."""
    found: dict[str, str | int] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    elif torch.backends.mps.is_available():
        found["gpu"] = "Apple MPS"
    return found


@cache
def _cpu_name() -> str:
    """The model name that Linux reports, elsewhere the architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
