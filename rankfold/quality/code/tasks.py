"""Programming tasks with their tests, HumanEval's and MBPP's, from local files."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankfold.calibration import dataset_rows
from rankfold.errors import InputError


@dataclass(frozen=True)
class Task:
    """What a model is asked, and how its answer is checked."""

    name: str
    prompt: str
    solution: str
    """The reference completion."""
    check: str
    """Code that raises where the answer is wrong, run after prompt and completion."""
    stops: tuple[str, ...]
    """Strings at which a completion ends, being no part of it."""

    def program(self, completion: str) -> str:
        """The program that passes if the completion is right."""
        return f"{self.prompt}{completion}\n{self.check}"


def humaneval_task(row: Mapping[str, Any]) -> Task:
    """HumanEval (Chen et al. 2021, arXiv:2107.03374): a signature and docstring to continue."""
    return Task(
        name=row["task_id"],
        prompt=row["prompt"],
        solution=row["canonical_solution"],
        check=f"{row['test']}\ncheck({row['entry_point']})\n",
        stops=("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@"),
    )


def _mbpp(row: Mapping[str, Any]) -> Task:
    """MBPP (Austin et al. 2021, arXiv:2108.07732): a sentence and the tests, as a docstring to continue."""
    tests = "\n".join(row["test_list"])
    return Task(
        name=f"MBPP/{row['task_id']}",
        prompt=f'"""\n{row["text"]}\n{tests}\n"""\n',
        solution=row["code"],
        # Some set-ups use classes that the answer defines.
        check=f"{row.get('test_setup_code', '')}\n{tests}\n",
        stops=("\nclass", "\nassert", '\n"""', "\nprint", "\nif"),
    )


_FIELDS: tuple[tuple[frozenset[str], Callable[[Mapping[str, Any]], Task]], ...] = (
    (frozenset({"task_id", "prompt", "canonical_solution", "test", "entry_point"}), humaneval_task),
    (frozenset({"task_id", "text", "code", "test_list"}), _mbpp),
)
"""Fields by which the rows of a benchmark are known."""


def load_tasks(source: str | Path) -> list[Task]:
    """The tasks of a JSONL file, plain or compressed, or of a data set of the hub such as openai/openai_humaneval.

    Raises:
        ValueError: If the file is missing, empty or no JSONL, a row lacks a field, or two rows share a name.
    """
    path = Path(source)
    if not path.is_file() and path.suffix in (".jsonl", ".json", ".gz", ".xz"):
        raise InputError(f"{source}: no such file. Programming tasks are read from a file such as HumanEval.jsonl.gz.")
    rows = _rows(path) if path.is_file() else _numbered(dataset_rows(str(source), split="test"), str(source))
    tasks: dict[str, Task] = {}
    for where, row in rows:
        task = _task(row, where)
        if task.name in tasks:
            raise InputError(f"{where}: the task {task.name} appears here for the second time.")
        tasks[task.name] = task
    if not tasks:
        raise InputError(f"{source}: a file of programming tasks must hold at least one, but this one is empty.")
    return list(tasks.values())


def _numbered(rows: Iterable[Any], name: str) -> Iterator[tuple[str, Any]]:
    return ((f"{name}, row {number}", row) for number, row in enumerate(rows))


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    openers: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
    try:
        with openers.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}, line {number}", _parsed(line, f"{path}, line {number}")
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise InputError(f"{path}: not a complete UTF-8 text file ({error}). Copy it again.") from error


def _parsed(line: str, where: str) -> Any:
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: text must be valid Unicode, but holds half of a surrogate pair.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: every line must be a JSON object, but this one is not ({error}).") from error
    return row


def _task(row: Any, where: str) -> Task:
    fields = set(row) if isinstance(row, dict) else set()
    for needed, make in _FIELDS:
        if needed <= fields:
            return make(row)
    missing = min((sorted(needed - fields) for needed, _ in _FIELDS), key=len)
    raise InputError(
        f"{where}: a task must have HumanEval's fields {sorted(_FIELDS[0][0])} or MBPP's {sorted(_FIELDS[1][0])}; "
        f"the closer of the two lacks {missing}."
    )
