"""Benchmark files of other layouts become the ones that the harness reads."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rankfold.errors import InputError
from rankfold.harness.layouts import BENCHMARKS, json_rows

Row = dict[str, Any]
Named = tuple[str, Row]
"""Name of the file that a row goes into, without `.jsonl`, and the row."""

SPLITS = {"test": "test", "validation": "validation", "val": "validation", "train": "train", "dev": "dev"}
"""Words in the names of files, and the splits that they stand for."""

LETTERS = "ABCDEFGH"


def convert_data(source: Path, target: Path) -> dict[str, int]:
    """Convert all benchmark files that are recognized under a folder.

    Recognized by their names: ARC, HellaSwag, MMLU, WinoGrande, GSM8K, LAMBADA, PIQA, OpenBookQA and BoolQ as JSONL
    (plain or `.gz`) with the fields of the hub or with `query`, `choices` and `gold`, and the table `TruthfulQA.csv` of
    its authors.

    Returns:
        Rows by the name of the file written.

    Raises:
        ValueError: If the folder holds no such file.
    """
    if not source.is_dir():
        raise InputError(f"{source}: benchmark files are read from a folder, but there is no such folder.")
    rows: dict[str, list[Row]] = {}
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        for name, row in _read(file):
            # Of all splits the same fields: a data set has one table.
            rows.setdefault(name, []).append({field: row[field] for field in _fields(name) if field in row})
    if not rows:
        raise InputError(
            f"{source}: no benchmark is recognized here. Files of ARC, HellaSwag, MMLU, WinoGrande, GSM8K, LAMBADA, "
            "PIQA, OpenBookQA and BoolQ have the benchmark and the split in their names and end in .jsonl or "
            ".jsonl.gz; TruthfulQA is its .csv."
        )
    target.mkdir(parents=True, exist_ok=True)
    for name, found in rows.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
        (target / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return {name: len(found) for name, found in rows.items()}


def _fields(name: str) -> Iterable[str]:
    """What the rows of a file of this name hold."""
    stem = name.partition(".")[0]
    task = "mmlu" if stem.startswith("mmlu_") else "truthfulqa_mc1" if stem == "truthfulqa" else stem
    return BENCHMARKS[task].fields


def _read(file: Path) -> Iterator[Named]:
    """The rows of a file, if it is one of a benchmark."""
    plain = file.name.removesuffix(".gz").lower()
    if plain == "truthfulqa.csv":
        yield from _truthfulqa(file)
    if not plain.endswith(".jsonl"):
        return
    split = next((name for mark, name in SPLITS.items() if _stands_in(mark, plain)), "test")
    # The name of the file says more than that of its folder.
    for place in (plain, file.parent.name.lower()):
        for mark, convert in CONVERTERS.items():
            if _stands_in(mark, place):
                yield from convert((row for _, row in json_rows(file)), split, plain)
                return


def _stands_in(word: str, name: str) -> bool:
    return re.search(rf"(?<![a-z]){word}(?![a-z])", name) is not None


def _arc(rows: Iterable[Row], split: str, name: str) -> Iterator[Named]:
    task = "arc_challenge" if "challenge" in name else "arc_easy"
    for row in rows:
        if "gold" not in row:
            yield f"{task}.{split}", row
            continue
        question = row["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
        choices = {"text": row["choices"], "label": list(LETTERS[: len(row["choices"])])}
        yield f"{task}.{split}", {"question": question, "choices": choices, "answerKey": LETTERS[row["gold"]]}


def _hellaswag(rows: Iterable[Row], split: str, name: str) -> Iterator[Named]:
    for row in rows:
        if "gold" not in row and row.get("label") in (None, ""):
            continue  # the test rows are published without their answers
        if "gold" not in row:
            yield f"hellaswag.{split}", {**row, "label": str(row["label"])}
            continue
        # The harness joins the label of the activity and the text again.
        label, _, context = row["query"].partition(": ")
        yield (
            f"hellaswag.{split}",
            {
                "activity_label": label,
                "ctx_a": context,
                "ctx_b": "",
                "endings": row["choices"],
                "label": str(row["gold"]),
            },
        )


def _mmlu(rows: Iterable[Row], split: str, name: str) -> Iterator[Named]:
    for row in rows:
        yield f"mmlu_{row['subject']}.{split}", row


def _plain(task: str) -> Callable[[Iterable[Row], str, str], Iterator[Named]]:
    return lambda rows, split, name: ((f"{task}.{split}", row) for row in rows)


def _winogrande(rows: Iterable[Row], split: str, name: str) -> Iterator[Named]:
    for row in rows:
        if row.get("answer"):  # the test rows have none
            yield f"winogrande.{'validation' if split == 'dev' else split}", row


def _lambada(rows: Iterable[Row], split: str, name: str) -> Iterator[Named]:
    for row in rows:
        text = row["text"] if "text" in row else f"{row['context']} {row['continuation']}"
        yield f"lambada_openai.{split}", {"text": text}


def _boolq(rows: Iterable[Row], split: str, name: str) -> Iterator[Named]:
    for row in rows:
        # The authors write true and false, the hub's copy 1 and 0.
        yield f"boolq.{split}", {**row, "label": int(row["answer"] if "label" not in row else row["label"])}


def _truthfulqa(file: Path) -> Iterator[Named]:
    """True and false answers from the table of arXiv:2109.07958; the first true one is the best."""
    with file.open(encoding="utf-8-sig", newline="") as opened:
        for row in csv.DictReader(opened):
            best = row["Best Answer"].strip()
            true = list(dict.fromkeys([best, *_answers(row["Correct Answers"])]))
            false = [answer for answer in _answers(row["Incorrect Answers"]) if answer not in true]
            yield (
                "truthfulqa.validation",
                {
                    "question": row["Question"].strip(),
                    "mc1_targets": _targets([best], false),
                    "mc2_targets": _targets(true, false),
                },
            )


def _answers(cell: str) -> list[str]:
    return [answer for answer in dict.fromkeys(part.strip() for part in cell.split(";")) if answer]


def _targets(true: list[str], false: list[str]) -> Mapping[str, list[Any]]:
    return {"choices": [*true, *false], "labels": [1] * len(true) + [0] * len(false)}


CONVERTERS: dict[str, Callable[[Iterable[Row], str, str], Iterator[Named]]] = {
    "arc": _arc,
    "hellaswag": _hellaswag,
    "mmlu": _mmlu,
    "winogrande": _winogrande,
    "gsm8k": _plain("gsm8k"),
    "lambada": _lambada,
    "piqa": _plain("piqa"),
    "openbookqa": _plain("openbookqa"),
    "boolq": _boolq,
}
"""By what stands in the name of the file or of its folder."""
