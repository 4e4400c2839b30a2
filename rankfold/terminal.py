"""What a person sees while and after a verb runs: progress and tables on stderr, errors without a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
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

from rankfold.record import Record

console = Console(stderr=True, width=None if sys.stderr.isatty() or "COLUMNS" in os.environ else 120)


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar; the block calls what it is given once for each of `total` steps."""
    with stages() as stage:
        yield stage(title, total)


@contextmanager
def stages() -> Iterator[Callable[[str, int], Callable[[], None]]]:
    """Progress of work whose stages show only as it goes: the block opens each with a title and a number of steps."""
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

        def stage(title: str, total: int) -> Callable[[], None]:
            complete()
            opened.append(bar.add_task(title, total=total))
            return lambda: bar.advance(opened[-1])

        yield stage
        complete()


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


def check_records(output: Path | None) -> None:
    """Whether records can be written here, to be asked before they are measured.

    Raises:
        ValueError: If the path is a folder.
    """
    if output is not None and output.is_dir():
        raise ValueError(f"{output}: records go to a file, but this is a folder. Name a file, such as records.jsonl.")


def write_records(records: Iterable[Record], output: Path | None) -> None:
    """Records as JSON lines, to a file or to stdout."""
    lines = "".join(record.to_json() + "\n" for record in records)
    if output is None:
        sys.stdout.write(lines)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(lines)
