"""Results files: one record a line, keyed by what was measured, by the code and by the versions of the libraries.

What stands there for this code and these versions is not measured again; `--fresh` after any program measures anew.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rankfold.circumstances import Circumstances, versions
from rankfold.record import Record, whole_lines

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"

KEYED_BY = ("rankfold", "torch", "transformers")
"""Versions of which other ones make another number."""

TOLD_APART_BY = (
    "part", "row", "keep", "seed", "benchmark", "metric", "minus", "group", "share", "site", "kind", "rank", "base",
    "data", "batch_size", "pair", "tasks", "new_tokens",
)  # fmt: skip
"""Facts that tell numbers of one name and subject apart."""

FRESH = "--fresh"


def asked_afresh() -> bool:
    """Whether the program was called with `--fresh`, which is taken out of its arguments."""
    found = FRESH in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != FRESH]
    return found


def quiet() -> None:
    """One thread, and no chatter of libraries."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def versions_of(record: Record) -> tuple[Any, ...]:
    """The versions that a record is keyed by."""
    found = record.context.get("versions", {})
    return tuple(found.get(name) for name in KEYED_BY)


def key_of(record: Record) -> tuple[Any, ...]:
    """What a record is of, versions left out."""
    facts = record.context
    own = tuple(str(facts.get(name)) for name in TOLD_APART_BY)
    return (record.subject, record.name, *own)


def latest(records: Iterable[Record]) -> list[Record]:
    """Of records of the same thing the last one, in the order in which the first ones stand."""
    found: dict[tuple[Any, ...], Record] = {}
    for record in records:
        found[key_of(record)] = record
    return list(found.values())


def read(name: str) -> list[Record]:
    """The records of one results file, the newest of each thing; none where it was not measured yet."""
    path = RESULTS / f"{name}.jsonl"
    return latest(map(Record.from_json, path.read_text().splitlines())) if path.exists() else []


class Results:
    """A results file that programs append to; an interrupted run resumes."""

    def __init__(self, name: str, fresh: bool | None = None) -> None:
        """The file of a name.

        Args:
            name: Name of the file.
            fresh: Whether what stands there is measured again; without it as `--fresh` says.
        """
        self.path = RESULTS / f"{name}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        self.records = [Record.from_json(line) for line in whole_lines(self.path)]
        self._old = len(self.records) if (asked_afresh() if fresh is None else fresh) else 0
        now = versions()
        self._versions = tuple(now.get(name) for name in KEYED_BY)

    def has(self, subject: str, **facts: Any) -> bool:
        """Whether this code with these versions measured this already."""
        return any(
            record.subject == subject
            and versions_of(record) == self._versions
            and all(record.context.get(name) == value for name, value in facts.items())
            for record in self.records[self._old :]
        )

    def append(self, records: Iterable[Record]) -> None:
        """Write records."""
        made = list(records)
        with self.path.open("a") as file:
            file.write("".join(record.to_json() + "\n" for record in made))
        self.records += made

    def measure(self, subject: str, row: str, here: Circumstances, run: Callable[[], Mapping[str, Any]]) -> None:
        """Measure the values of one row, unless they are there.

        `run` gives values by name, each a number or a pair of a number and its standard error; text joins the context.
        """
        if self.has(subject, row=row):
            return
        values = run()
        facts = {"row": row, **{name: value for name, value in values.items() if isinstance(value, (str, list))}}
        made = []
        for name, value in values.items():
            if isinstance(value, (str, list)):
                continue
            number, error = value if isinstance(value, tuple) else (value, None)
            made.append(here.record(subject, name, number, "1", error, **facts))
        self.append(made)
        shown = ", ".join(f"{r.name} {r.value:.4g}" for r in made if r.value is not None)
        print(f"{subject} | {row}: {shown}", flush=True)
