"""Tables of a real model under every method, for the README and docs/quality.md, from results of real_quality.py."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from results import read

from rankfold.record import Record
from rankfold.reports.figures import draw_points

NAMES = {
    "arc_easy": "ARC-e",
    "arc_challenge": "ARC-c",
    "hellaswag": "HellaSwag",
    "winogrande": "WinoGrande",
    "lambada_openai": "LAMBADA",
    "piqa": "PIQA",
    "openbookqa": "OBQA",
    "boolq": "BoolQ",
}

CHANCE = {
    "arc_easy": 1 / 4, "arc_challenge": 1 / 4, "hellaswag": 1 / 4, "winogrande": 1 / 2, "lambada_openai": 0.0, "piqa": 1 / 2,
    "openbookqa": 1 / 4, "boolq": 1 / 2,
}  # fmt: skip
"""Accuracy of guessing."""

SHOWN_FIRST = (
    "dense", "INT8", "NF4", "rankfold, NF4's bytes", "rankfold, keep 0.8", "SVD-LLM (whitened), keep 0.8",
    "LoRD, keep 0.8",
)  # fmt: skip
"""The README's rows."""


SERIES = {
    "rankfold": "rankfold, bits and ranks, embeddings too",
    "GPTQ": "GPTQ of ours",
    "nearest": "rounded to nearest",
    "rankfold, bits": "rankfold, bits alone",
}
"""Names of series in the picture."""


class Difference(NamedTuple):
    """A mean over questions or windows, and its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:+.1%} ± {self.error:.1%}"


class Row:
    """What is known of one row of a model."""

    def __init__(self, name: str, records: Sequence[Record]) -> None:
        self.name = name
        self.found = {(r.name, r.context.get("group")): r for r in records if r.subject == name}

    def record(self, name: str, group: str | None = None) -> Record | None:
        """One number of the row, if it was measured."""
        return self.found.get((name, group))

    def value(self, name: str, group: str | None = None) -> float:
        """One number of the row."""
        record = self.found[name, group]
        assert record.value is not None
        return record.value

    @property
    def tasks(self) -> list[str]:
        """Benchmarks that were asked."""
        return [task for task in NAMES if (f"{task} acc", None) in self.found]

    def answers(self, task: str) -> list[int]:
        """Whether each question was answered rightly, or each programming task solved."""
        name = f"{task} acc" if task in NAMES else f"{task} pass@1"
        return [int(mark) for mark in self.found[name, None].context["answers"]]

    @property
    def above_chance(self) -> list[str]:
        """Benchmarks that are answered better than by guessing, by more than two standard errors."""
        found = {task: self.answers(task) for task in self.tasks}
        means = {task: statistics.fmean(right) for task, right in found.items()}
        return [
            task
            for task, right in found.items()
            if means[task] - CHANCE[task] > 2 * math.sqrt(means[task] * (1 - means[task]) / len(right))
        ]

    def beside(self, dense: Row, tasks: Sequence[str]) -> Difference:
        """The mean accuracy over tasks less the dense model's, in pairs of the same questions."""
        means, variances = [], []
        for task in tasks:
            apart = [a - b for a, b in zip(self.answers(task), dense.answers(task), strict=True)]
            means.append(statistics.fmean(apart))
            variances.append(statistics.variance(apart) / len(apart))
        return Difference(statistics.fmean(means), math.sqrt(sum(variances)) / len(tasks))

    def rise(self, dense: Row) -> Difference:
        """The rise of the loss over the dense model's, in pairs of the same windows."""
        own, other = (row.found["loss", None].context["losses"] for row in (self, dense))
        apart = [a - b for a, b in zip(own, other, strict=True)]
        return Difference(statistics.fmean(apart), statistics.stdev(apart) / math.sqrt(len(apart)))


def rows_of(base: str, results: str = "real_quality") -> list[Row]:
    """The rows of a model whose loss was measured."""
    records = [record for record in read(results) if record.context["base"] == base]
    rows = [Row(name, records) for name in dict.fromkeys(record.subject for record in records)]
    return [row for row in rows if row.record("loss") is not None]


def bases(results: str = "real_quality") -> list[str]:
    """Models that were measured."""
    return list(dict.fromkeys(record.context["base"] for record in read(results)))


def megabytes(row: Row) -> str:
    """Bytes of the checkpoint's weights."""
    stored = row.found["loss", None].context["bytes"]
    return "" if stored is None else f"{stored / 1e6:,.0f} MB"


def speeds(row: Row, what: str) -> str:
    """How many times as fast as the dense model, as both are loaded and as both are fastest."""
    cells = [row.record(f"{what} over dense", group) for group in ("balance", "speed")]
    return " / ".join(f"{cell.value:.2f}" for cell in cells if cell is not None)


def table(base: str, names: Sequence[str] | None = None) -> list[str]:
    """Bytes, loss, accuracy and speed; rows of some names, or all."""
    rows = rows_of(base)
    dense = next(row for row in rows if row.name == "dense")
    shown = [row for name in names for row in rows if row.name == name] if names else rows
    told = dense.above_chance
    complete = [row for row in shown if told and set(told) <= set(row.tasks)]
    mean = statistics.fmean(statistics.fmean(dense.answers(task)) for task in told) if told else 0.0
    lines = [
        f"| {base} | bytes on disk | perplexity | rise of the loss | accuracy, mean of {len(told)} | decode, times dense | prompt, times dense |",
        "|---" * 7 + "|",
    ]
    for row in shown:
        first = row is dense
        rise = row.rise(dense)
        accuracy = (f"{mean:.1%}" if told else "") if first else str(row.beside(dense, told)) if row in complete else ""
        cells = [
            row.name,
            megabytes(row),
            f"{math.exp(row.value('loss')):.1f}",
            "" if first else f"{rise.value:.3f} ± {rise.error:.3f}",
            accuracy,
            "" if first else speeds(row, "decode"),
            "" if first else speeds(row, "prefill"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def front(base: str) -> dict[str, list[tuple[float, float]]]:
    """Megabytes of the whole model and the rise of its loss, by method: of the rows here and of one budget's."""
    points: dict[str, list[tuple[float, float]]] = {}
    rows = {row.name: row for row in rows_of(base)}
    for name, row in rows.items():
        stored = row.found["loss", None].context["bytes"]
        if name != "dense" and stored is not None:
            method = name.partition(",")[0] + (", ranks alone" if name.startswith("rankfold, keep") else "")
            points.setdefault(SERIES.get(method, method), []).append((stored / 1e6, row.rise(rows["dense"]).value))
    budgets = [record for record in read("one_budget") if record.context["base"] == base and "row" in record.context]
    # What another library rounded is held in 16 bits here, and has the size of ours with as many bits.
    memory = sorted((r.context["bits"], float(r.value or 0)) for r in budgets if r.name == "memory")
    sizes = {bits: size for bits, size in reversed(memory)}
    dense = rows["dense"].value("loss")
    for record in budgets:
        if record.name == "loss" and "average" in record.context and "compensation" not in record.context["row"]:
            method = SERIES.get(record.context["row"], record.context["row"])
            points.setdefault(method, []).append(
                (sizes[record.context["bits"]] / 1e6, float(record.value or 0) - dense)
            )
    return {method: found for method, found in points.items() if found}


def draw_front(folder: Path) -> None:
    """The picture of the model that the README shows."""
    for base in bases()[:1]:
        draw_points(
            front(base),
            folder / "real-front.svg",
            title=f"{base}: what a byte buys",
            axes=("megabytes of the whole model", "rise of the loss, nat/token"),
            lines=True,
        )


def circumstances_of(base: str) -> str:
    """How the rows of a model were measured."""
    dense = next(row for row in rows_of(base) if row.name == "dense")
    record = dense.found["loss", None]
    facts, used = record.context, record.context["calibration"]
    items = dense.found[f"{dense.tasks[0]} acc", None].context["limit"] if dense.tasks else 0
    versions = facts["versions"]
    spent = [r for row in rows_of(base) for (name, _), r in row.found.items() if name.endswith("over dense")]
    beside = ", some of it beside other work" if any(r.context.get("contended") for r in spent) else ""
    return (
        f"{facts['data']}, {facts['tokens']:,} tokens scored; accuracy on the first {items} questions, without examples, of each of "
        f"{', '.join(NAMES[task] for task in dense.above_chance)}, which dense answers better than by guessing (`acc`, by more than two standard errors); differences from dense in pairs, ± one standard error; calibrated on "
        f"{used['tokens']:,} tokens of {used['corpus']}. Speed on one thread of a shared {facts['hardware']['cpu'].split(' @')[0]}, one token at a time and "
        f'a prompt of 128{beside}, both models taking turns: as they are loaded / both with `prefer(model, "speed")`. torch {versions["torch"]}, transformers '
        f"{versions['transformers']}, seed 0."
    )


def readme_table() -> str:
    """The README's table."""
    known = bases()
    if not known:
        return ""
    lines = [
        *table(known[0], SHOWN_FIRST),
        "",
        f"{circumstances_of(known[0])} `python benchmarks/real_quality.py`. These weights, not rotated, once had 4 bits, which flatters 4-bit rows.",
    ]
    return "\n".join(lines)


def section() -> list[str]:
    """All rows of all models, and what each benchmark says."""
    if not bases():
        return []
    lines = [
        "# Real models",
        "",
        "`python benchmarks/real_quality.py MODEL --calibration TEXT --text TEXT --data FOLDER --work FOLDER`.",
        "",
    ]
    for base in bases():
        if base == bases()[0]:
            lines += ["![What a byte buys](figures/real-front.svg)", ""]
        rows = rows_of(base)
        dense = next(row for row in rows if row.name == "dense")
        lines += [*table(base), "", circumstances_of(base), ""]
        lines += [
            f"| {base}: accuracy | {' | '.join(NAMES[task] for task in dense.tasks)} | seconds to make |",
            "|---" * (len(dense.tasks) + 2) + "|",
        ]
        for row in rows:
            cells = [f"{statistics.fmean(row.answers(task)):.1%}" if task in row.tasks else "" for task in dense.tasks]
            seconds = row.found["loss", None].context["seconds_to_make"]
            lines.append(f"| {row.name} | {' | '.join(cells)} | {'' if row is dense else f'{seconds:,}'} |")
        lines.append("")
    return lines
