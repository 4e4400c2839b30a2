"""One observation with its unit, its error and the circumstances under which it was made."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Record:
    """A number that can stand alone: what, of which model, in which unit, how sure, and under which circumstances.

    >>> Record(subject="dense", name="perplexity", value=6.07, unit="1").to_json()
    '{"subject": "dense", "name": "perplexity", "value": 6.07, "unit": "1", "error": null, "context": {}}'
    """

    subject: str
    """The model that was observed, for example `dense` or the path of a checkpoint."""
    name: str
    """What was observed, for example `perplexity`."""
    value: float | int | None
    """The observation in `unit`; `None` where it could not be made, the reason then being in `context`."""
    unit: str
    """Base unit: `1`, `nat/token`, `second`, `byte`."""
    error: float | None = None
    """Standard error in `unit`, where it is known."""
    context: Mapping[str, Any] = field(default_factory=dict)
    """Hardware, versions, data, seed and whatever else the number depends on."""

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Record:
        """The inverse of `to_json`."""
        return cls(**json.loads(line))


def whole_lines(file: Path) -> list[str]:
    """The lines of a file that work appends to; one that a kill left unfinished is removed from it."""
    if not file.exists():
        return []
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with file.open("r+b") as opened:
            opened.truncate(len(whole))
    return whole.decode(errors="replace").splitlines()


def value_of(records: Iterable[Record], subject: str, name: str) -> float | int | None:
    """The value of the first record with this subject and name, or `None`."""
    return next((record.value for record in records if (record.subject, record.name) == (subject, name)), None)


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a result depends on."""
    packages = {name: version(name) for name in ("rankfold", "torch", "transformers")}
    return {"python": platform.python_version(), **packages}
