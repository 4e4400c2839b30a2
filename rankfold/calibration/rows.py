"""Rows of text files as people have them: prose, messages, instructions, prompts; JSON, CSV and Parquet."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rankfold.errors import InputError

FIELDS = (
    "text, content or sentence; messages (role, content); conversations (from, value); instruction, input and output; "
    "prompt and completion (or response)"
)
"""What a row may have, for people."""

SUFFIXES = {
    ".txt", ".md", ".py", ".rst", ".raw", ".tokens", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".gz", ".xz",
}  # fmt: skip
"""Endings by which a name is taken for a file."""

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "tool": "tool"}


def file_texts(path: Path, tokenizer: Any = None) -> Iterator[str]:
    """The texts of a file: of each row of a table or of JSON, or the whole of any other file.

    Args:
        path: The file, plain, `.gz` or `.xz`.
        tokenizer: Where given, its chat template writes conversations as the model reads them.

    Raises:
        ValueError: If the file cannot be read as what its name says, or a row has no text.
    """
    kinds = {suffix.lower() for suffix in path.suffixes}
    try:
        if ".parquet" in kinds:
            yield from _parquet_texts(path, tokenizer)
            return
        with _opened(path, newline="" if kinds & {".csv", ".tsv"} else None) as file:
            if kinds & {".json", ".jsonl"}:
                rows = _json_rows(path, file)
            elif kinds & {".csv", ".tsv"}:
                rows = _table_rows(path, file, "\t" if ".tsv" in kinds else ",")
            else:
                yield _whole(file.read(), str(path))
                return
            for place, row in rows:
                yield row_text(row, place, tokenizer)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise InputError(f"{path}: the file cannot be read ({error}). Copy or compress it again.") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: a corpus must be UTF-8 text, but byte {error.start} is not. Convert it first."
        ) from error


def _opened(path: Path, newline: str | None) -> Any:
    openers: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
    # A byte order mark, as Windows writes it, is no text.
    return openers.get(path.suffix, open)(path, "rt", encoding="utf-8-sig", newline=newline)


def _json_rows(path: Path, file: Any) -> Iterator[tuple[str, Any]]:
    """Rows of a JSON array, or of lines."""
    first = next((line for line in file if line.strip()), "")
    file.seek(0)
    if first.lstrip().startswith("["):
        try:
            rows = json.loads(file.read())
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{path}: the JSON array cannot be read ({error}). Write it again.") from error
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))
        return
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}, line {number}", json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(
                f"{path}, line {number}: each line must be one JSON object, or the file one array ({error})."
            ) from error


def _table_rows(path: Path, file: Any, delimiter: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)
    try:
        for number, row in enumerate(csv.DictReader(file, delimiter=delimiter), start=2):
            yield f"{path}, line {number}", {str(name): value for name, value in row.items()}
    except csv.Error as error:
        raise InputError(f"{path}: the table cannot be read ({error}).") from error


def _parquet_texts(path: Path, tokenizer: Any) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{path}: reading Parquet needs an extra: pip install 'rankfold[datasets]'") from error
    try:
        rows = datasets.Dataset.from_parquet(str(path), keep_in_memory=True)
        for number, row in enumerate(rows, start=1):
            yield row_text(row, f"{path}, row {number}", tokenizer)
    except (ValueError, OSError, datasets.exceptions.DatasetGenerationError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a readable Parquet file ({error}).") from error


def row_text(row: Any, place: str, tokenizer: Any = None) -> str:
    """The text of a row.

    Raises:
        ValueError: If it has none of the fields of `FIELDS`.
    """
    if isinstance(row, str):
        return _whole(row, place)
    if not isinstance(row, dict):
        raise InputError(f"{place}: a row must be a text or an object with {FIELDS}, but is {str(row)[:80]!r}.")
    for key in ("text", "content", "sentence"):
        if isinstance(row.get(key), str):
            return _whole(row[key], place)
    messages = _messages(row)
    if not messages:
        raise InputError(f"{place}: a row must have {FIELDS}, but has {sorted(map(str, row))}.")
    return _whole(_conversation(messages, tokenizer), place)


def _messages(row: dict[str, Any]) -> list[dict[str, str]]:
    """A row as a conversation, whatever its fields are called; empty where it is none."""
    for key in ("messages", "conversations", "conversation"):
        turns = row.get(key)
        if isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns):
            return [_turn(turn) for turn in turns]
    question = row.get("instruction", row.get("prompt"))
    answer = next((row[key] for key in ("output", "completion", "response") if isinstance(row.get(key), str)), None)
    if isinstance(question, list) and isinstance(answer, str):
        return [*[_turn(turn) for turn in question if isinstance(turn, dict)], {"role": "assistant", "content": answer}]
    if not isinstance(question, str) or answer is None:
        return []
    extra = row.get("input")
    asked = f"{question}\n\n{extra}" if isinstance(extra, str) and extra.strip() else question
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def _turn(turn: dict[str, Any]) -> dict[str, str]:
    role = str(turn.get("role", turn.get("from", "user")))
    content = turn.get("content", turn.get("value", ""))
    if isinstance(content, list):
        # Parts of several kinds, of which only text is read.
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return {"role": _ROLES.get(role, role), "content": str(content or "")}


def _conversation(messages: list[dict[str, str]], tokenizer: Any) -> str:
    """Messages as the tokenizer's chat template writes them; one after the other where it has none or refuses."""
    if getattr(tokenizer, "chat_template", None):
        import jinja2

        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False))
        except (jinja2.TemplateError, TypeError, ValueError, KeyError):
            # Templates refuse roles and orders that their model was not trained on.
            pass
    return "\n\n".join(message["content"] for message in messages)


def _whole(text: str, place: str) -> str:
    """The text, in which every character must be one.

    Raises:
        ValueError: If it holds half of a surrogate pair, which no encoding can write.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{place}: text must be valid Unicode, but character {error.start + 1} is half of a surrogate pair "
            f"({text[error.start]!a}). Write the file again, with errors='replace'."
        ) from error
    return text


def dataset_texts(name: str, rows: Iterable[Any], tokenizer: Any = None) -> Iterator[str]:
    """The texts of a data set's rows."""
    for number, row in enumerate(rows):
        yield row_text(row, f"{name}, row {number}", tokenizer)
