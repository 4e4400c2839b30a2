"""What a person sees while and after a verb runs: progress and tables on stderr, errors without a traceback."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from rankfold.errors import InputError
from rankfold.progress import Stage, Step
from rankfold.record import Record

_kept: list[str] = []

console = Console(stderr=True, width=None if sys.stderr.isatty() or "COLUMNS" in os.environ else 120)


@contextmanager
def progress(title: str, total: int) -> Iterator[Step]:
    """A progress bar; the block calls what it is given once for each of `total` steps."""
    with stages() as stage:
        yield stage(title, total)


@contextmanager
def stages() -> Iterator[Stage]:
    """Progress of work whose stages show only as it goes: the block opens each with a title and a number of steps."""
    if not console.is_terminal:
        yield _Lines().stage
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        opened: list[TaskID] = []

        def complete() -> None:
            for task in opened:
                bar.update(task, completed=bar.tasks[task].total)

        def stage(title: str, total: int) -> Step:
            complete()
            opened.append(bar.add_task(title, total=total))
            return lambda: bar.advance(opened[-1])

        yield stage
        complete()


class _Lines:
    """Progress where nobody watches a bar, as in a log: a plain line now and then, with the time that is left."""

    def __init__(self) -> None:
        self._title, self._total, self._done = "", 0, 0
        self._start = self._last = time.monotonic()

    def stage(self, title: str, total: int) -> Step:
        self._title, self._total, self._done = title, total, 0
        self._start = self._last = time.monotonic()
        return self._advance

    def _advance(self) -> None:
        self._done += 1
        now = time.monotonic()
        if now - self._last < SECONDS_BETWEEN_LINES or self._done >= self._total:
            return
        self._last = now
        left = (now - self._start) / self._done * (self._total - self._done)
        say(f"{self._title}: {self._done} of {self._total}, about {duration(left)} left")


SECONDS_BETWEEN_LINES = 30.0
"""Seconds between two lines of progress in a log."""


def duration(seconds: float) -> str:
    """Seconds as people say them.

    >>> duration(42.0), duration(170.0), duration(7500.0)
    ('42 s', '3 min', '2.1 h')
    """
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on stderr, its numbers to the right."""
    drawn = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, name in enumerate(header):
        drawn.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    console.print(drawn)


def say(text: str) -> None:
    """One line for a person, on stderr."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def keeps(what: str) -> None:
    """Say what is there already, should the command be stopped from now on; the next call takes its place."""
    _kept[:] = [what]


def kept() -> str:
    """What a command that is stopped now leaves behind."""
    return _kept[0] if _kept else "nothing was written."


def check_records(output: Path | None) -> None:
    """Whether records can be written here, to be asked before they are measured.

    Raises:
        ValueError: If the path is a folder.
    """
    if output is not None and output.is_dir():
        raise InputError(f"{output}: records go to a file, but this is a folder. Name a file, such as records.jsonl.")


def write_records(records: Iterable[Record], output: Path | None) -> None:
    """Records as JSON lines, to a file, or to stdout where a program reads it: people have the table."""
    lines = "".join(record.to_json() + "\n" for record in records)
    if output is None:
        if not sys.stdout.isatty():
            sys.stdout.write(lines)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(lines)
