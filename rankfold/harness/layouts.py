"""Which benchmarks there are, the local files that hold them, and the fields that the harness reads from each row."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rankfold.errors import InputError


class Benchmark(NamedTuple):
    """One task of the harness."""

    task: str
    """The harness's configuration of it, a file within its folder of tasks; `{}` is a subject."""
    splits: Mapping[str, str]
    """For every split of the data set whether it is `needed`, or gives `examples` where it is there."""
    fields: Mapping[str, type | tuple[type, ...]]
    """What every row must hold."""
    examples: str | None = None
    """The split of the examples, where the harness names one."""
    metrics: tuple[str, ...] = ("acc",)
    """What is reported: names of the harness, the one to compare models by first."""


TEXT: dict[str, type | tuple[type, ...]] = {"question": str}

BENCHMARKS: dict[str, Benchmark] = {
    "arc_easy": Benchmark(
        "arc/arc_easy.yaml",
        {"test": "needed", "validation": "examples", "train": "examples"},
        {**TEXT, "choices": dict, "answerKey": str},
        metrics=("acc", "acc_norm"),
    ),
    "arc_challenge": Benchmark(
        "arc/arc_challenge.yaml",
        {"test": "needed", "validation": "examples", "train": "examples"},
        {**TEXT, "choices": dict, "answerKey": str},
        metrics=("acc", "acc_norm"),
    ),
    "hellaswag": Benchmark(
        "hellaswag/hellaswag.yaml",
        {"validation": "needed", "train": "examples"},
        {"ctx_a": str, "ctx_b": str, "activity_label": str, "endings": list, "label": str},
        metrics=("acc", "acc_norm"),
    ),
    "mmlu": Benchmark(
        "mmlu/default/mmlu_{}.yaml",
        {"test": "needed", "dev": "examples"},
        {**TEXT, "choices": list, "answer": int},
        "dev",
    ),
    "truthfulqa_mc1": Benchmark(
        "truthfulqa/truthfulqa_mc1.yaml", {"validation": "needed"}, {**TEXT, "mc1_targets": dict, "mc2_targets": dict}
    ),
    "truthfulqa_mc2": Benchmark(
        "truthfulqa/truthfulqa_mc2.yaml", {"validation": "needed"}, {**TEXT, "mc1_targets": dict, "mc2_targets": dict}
    ),
    "winogrande": Benchmark(
        "winogrande/default.yaml",
        {"validation": "needed", "train": "examples"},
        {"sentence": str, "option1": str, "option2": str, "answer": str},
    ),
    "gsm8k": Benchmark(
        "gsm8k/gsm8k.yaml",
        {"test": "needed", "train": "examples"},
        {**TEXT, "answer": str},
        "train",
        ("exact_match,strict-match", "exact_match,flexible-extract"),
    ),
    "lambada_openai": Benchmark("lambada/lambada_openai.yaml", {"test": "needed"}, {"text": str}),
    "piqa": Benchmark(
        "piqa/piqa.yaml",
        {"validation": "needed", "train": "examples"},
        {"goal": str, "sol1": str, "sol2": str, "label": int},
        metrics=("acc", "acc_norm"),
    ),
    "openbookqa": Benchmark(
        "openbookqa/openbookqa.yaml",
        # The harness asks the questions of the test split where there is one.
        {"validation": "needed", "test": "examples", "train": "examples"},
        {"question_stem": str, "choices": dict, "answerKey": str},
        metrics=("acc", "acc_norm"),
    ),
    "boolq": Benchmark(
        "super_glue/boolq/default.yaml",
        {"validation": "needed", "train": "examples"},
        {**TEXT, "passage": str, "label": int},
    ),
}
"""The six of arXiv:2405.06626 and GSM8K; LAMBADA asks for words of a text; PIQA, OpenBookQA and BoolQ are what other
papers on compression ask."""

SHARED_FILES = {"truthfulqa_mc1": "truthfulqa", "truthfulqa_mc2": "truthfulqa"}
"""Benchmarks that are read from one file."""


def local_files(name: str, folder: Path) -> dict[str, dict[str, Path]]:
    """By task of the harness, the file of every split: `arc_easy.test.jsonl`, `mmlu_anatomy.dev.jsonl`.

    Raises:
        ValueError: If the benchmark is unknown, or a file that it needs is missing, empty, or lacks fields.
    """
    if name not in BENCHMARKS:
        raise InputError(f"A benchmark must be one of {', '.join(BENCHMARKS)}, but got {name!r}.")
    if not folder.is_dir():
        raise InputError(f"{folder}: benchmark files are read from a folder, but there is no such folder.")
    benchmark = BENCHMARKS[name]
    stem = SHARED_FILES.get(name, name)
    tasks = [stem]
    if name == "mmlu":
        tasks = sorted(file.name.removesuffix(".test.jsonl") for file in folder.glob("mmlu_*.test.jsonl"))
    found: dict[str, dict[str, Path]] = {}
    for task in tasks:
        files = {split: folder / f"{task}.{split}.jsonl" for split in benchmark.splits}
        for split, file in files.items():
            if file.exists():
                check_file(file, benchmark)
            elif benchmark.splits[split] == "needed":
                raise InputError(_missing(file))
        found[name if task == stem else task] = {split: file for split, file in files.items() if file.exists()}
    if not found:
        raise InputError(_missing(folder / "mmlu_SUBJECT.test.jsonl"))
    return found


def _missing(file: Path) -> str:
    return (
        f"{file}: this benchmark needs the file, but it is not there. Convert files of another layout with "
        "rankfold convert-data SOURCE FOLDER."
    )


def check_file(file: Path, benchmark: Benchmark) -> None:
    """Whether every row of a file holds what the harness reads.

    Raises:
        ValueError: If it has no rows, or one lacks a field; names the file, the line and the field.
    """
    count = 0
    for number, row in json_rows(file):
        count += 1
        for field, kind in benchmark.fields.items():
            if field not in row:
                raise InputError(
                    f"{file}, line {number}: a row must hold {', '.join(benchmark.fields)}, but this one lacks {field}."
                )
            if not isinstance(row[field], kind):
                raise InputError(f"{file}, line {number}: {field} must be a {kind}, but is {row[field]!r}.")
        _check_answer(row, f"{file}, line {number}")
    if not count:
        raise InputError(f"{file}: a benchmark needs at least one row, but this file has none.")


def _check_answer(row: Mapping[str, Any], place: str) -> None:
    """Whether the answer is one of those to choose from, wherever the row has it."""
    choices = row.get("choices")
    if isinstance(row.get("endings"), list):
        key, allowed = "label", [str(index) for index in range(len(row["endings"]))]
    elif "option1" in row:
        key, allowed = "answer", ["1", "2"]
    elif isinstance(choices, dict):
        key, allowed = "answerKey", [str(label) for label in choices.get("label", ())]
    elif isinstance(choices, list):
        key, allowed = "answer", [str(index) for index in range(len(choices))]
    else:
        return
    if key in row and str(row[key]) not in allowed:
        told = (
            "has no answer: test sets of this benchmark carry none, take its validation set" if row[key] == "" else ""
        )
        raise InputError(f"{place}: {key} must be one of {', '.join(allowed)}, but {told or f'is {row[key]!r}'}.")


def json_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and rows of a JSONL file, plain or `.gz`.

    Raises:
        ValueError: If a line is no JSON object.
    """
    opener: Any = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{file}, line {number}: each line must be one JSON object ({error}).") from error
            if not isinstance(row, dict):
                raise InputError(f"{file}, line {number}: each line must be one JSON object, but is {type(row)}.")
            yield number, row
