"""One observation with its unit, its error and the circumstances under which it was made."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Record:
    """A self-contained number: what, of which model, in which unit, how certain, and under which circumstances.

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

    @property
    def is_difference(self) -> bool:
        """Whether the value is that of one model minus that of another, which the context names as `minus`."""
        return "minus" in self.context

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Record:
        """The inverse of `to_json`."""
        return cls(**json.loads(line))


class Records(list[Record]):
    """Observations of one measurement, shown as a short table."""

    def write(self, path: str | Path) -> Path:
        """Write one record a line, as `rankfold report` and `Records.read` take them."""
        file = Path(path)
        file.write_text("".join(record.to_json() + "\n" for record in self))
        return file

    @classmethod
    def read(cls, path: str | Path) -> Records:
        """The records of a file."""
        return cls(map(Record.from_json, Path(path).read_text().splitlines()))

    def __repr__(self) -> str:
        """A line for each record: subject, what, value and error."""
        lines = [f"{len(self)} records"]
        for record in self:
            value = "unavailable" if record.value is None else f"{record.value:,.6g}"
            error = "" if record.error is None else f" ± {record.error:.2g}"
            minus = f" minus {record.context['minus']}" if record.is_difference else ""
            unit = "" if record.unit == "1" else f" {record.unit}"
            lines.append(f"  {record.subject + minus:<24} {record.name:<24} {value}{error}{unit}")
        return "\n".join(lines)


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
    found = (r for r in records if (r.subject, r.name) == (subject, name) and not r.is_difference)
    return next((record.value for record in found), None)
