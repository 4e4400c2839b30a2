"""Write the numbers of the README from the results of the benchmarks: python experiments/readme_numbers.py."""

from __future__ import annotations

import re
from pathlib import Path

from quality_tables import KEEPS

from rankfold.factorization import METHODS
from rankfold.record import Record

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def read(name: str) -> list[Record]:
    """The records of one results file."""
    return [Record.from_json(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def quality_table(records: list[Record], subject: str) -> list[str]:
    """Methods down, keep across, one model."""
    rows = [record for record in records if record.subject == subject]
    dense = rows[0]
    percent = dense.name == "accuracy"

    def write(record: Record) -> str:
        assert record.value is not None
        assert record.error is not None
        if percent:
            return f"{record.value:.1%} ± {record.error:.1%}"
        return (
            f"{record.value:.3g} ± {record.error:.2g}"
            if record.value < 1000
            else f"{record.value:,.0f} ± {record.error:.0f}"
        )

    lines = [
        f"| {subject}: {dense.name}, dense {write(dense)} | " + " | ".join(f"keep {keep}" for keep in KEEPS) + " |"
    ]
    lines.append("|---" * (len(KEEPS) + 1) + "|")
    for method in METHODS:
        cells = [write(record) for record in rows if record.context["method"] == method]
        lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    return [*lines, ""]


def numbers() -> str:
    """The block between the README's markers."""
    records = read("quality_tables")
    context = records[0].context
    versions = context["versions"]
    lines = [
        "Uniform ranks, one shot, no fine-tuning, calibrated on other text than measured; seed 0; ± is the standard",
        f"error over evaluation windows. torch {versions['torch']}, transformers {versions['transformers']}, CPU."
        " `python experiments/quality_tables.py`",
        "",
    ]
    for subject in dict.fromkeys(record.subject for record in records):
        lines += quality_table(records, subject)
    cost = {record.name: record.value for record in read("compress_cost") if record.subject == "naive / rankfold"}
    more = f"{cost['time']:.1f} times the time and {cost['peak_memory']:.1f} times the memory"
    lines.append(f"Compressing a Llama of 303 M parameters: the same work done naively takes {more} of")
    lines.append("`rankfold compress` (`python benchmarks/compress_cost.py`, medians of alternating runs, one thread).")
    return "\n".join(lines)


def with_numbers(readme: str) -> str:
    """The README with its numbers replaced."""
    block = re.compile(r"(<!-- numbers:begin -->\n).*?(<!-- numbers:end -->)", re.S)
    return block.sub(lambda match: f"{match[1]}{numbers()}\n{match[2]}", readme)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_numbers(path.read_text()))
