"""A real code model under LoRD and rankfold: loss on held-out Python, the programs that it still writes, and speed.

    python benchmarks/code_quality.py MODEL --programs HumanEval.jsonl.gz [mbpp.jsonl] --work FOLDER
    python benchmarks/code_quality.py ... --rows dense "LoRD, keep 0.85" # rows whose names begin so

MODEL is a folder, a GGUF file or a name on the hub. The question of arXiv:2309.14021: does a code model keep its pass@1
with 15 % fewer parameters in its linear layers, and with few bits on top? Completions are greedy, so pass@1 is a share
of the tasks, and any two rows compare in pairs. All methods see the same calibration windows and none trains. Every
model is written to `--work` and read from there; what was made, written by a model or measured is not made again, so an
interrupted run goes on where it stopped. Results: benchmarks/results/code_quality.jsonl.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from real_quality import GROUP, NF4, Bench, Make, Row, asked_for, library, ours, prepared, same_bytes, shared_arguments
from results import Results

from rankfold.checkpoint import load_model
from rankfold.quality import Sampling, share
from rankfold.quality.code import Sandbox, complete_tasks, describe, load_tasks, score_completions, strongest_protection
from rankfold.quantization import Grid, Groups, quantize_blocks, quantize_by_library

KEEPS = (0.85, 0.95, 0.9, 0.8)
STACKED = 0.85
"""The paper claims that 15 % fewer parameters of the whole model, taken from down-projections, cost nothing."""
NEW_TOKENS = 256
BATCH = 41


def stacked(row: str, quantize: Callable[[Bench, Path], Any]) -> Make:
    """Another row's model with few bits on top."""

    def make(bench: Bench) -> Any:
        if not (bench.place / row / "seconds").exists():
            raise SystemExit(f"{bench.place / row}: make the row {row!r} first.")
        return quantize(bench, bench.place / row)

    return make


def by_library(scheme: str) -> Callable[[Bench, Path], Any]:
    """Bitsandbytes."""
    return lambda bench, folder: quantize_by_library(folder, scheme)[0]


def by_blocks(scheme: str, grid: Any) -> Callable[[Bench, Path], Any]:
    """GPTQ or SpQR of ours."""

    def quantize(bench: Bench, folder: Path) -> Any:
        model = load_model(folder)
        quantize_blocks(model, bench.batches, scheme, grid)
        return model

    return quantize


SCHEMES = {
    "INT8": by_library("int8"),
    NF4: by_library("nf4"),
    "SpQR 4 bits": by_blocks("spqr", Grid(4)),
}
"""On top of other rows."""


def rows() -> Iterator[tuple[str, Make]]:
    """All rows, in the order in which they are worth waiting for."""
    yield "dense", lambda bench: load_model(bench.folder)
    yield NF4, library("nf4")
    for keep in KEEPS:
        yield f"LoRD, keep {keep:g}", ours(keep=keep, method="lord")
        yield f"rankfold, keep {keep:g}", ours(keep=keep)
    yield "rankfold, NF4's bytes", same_bytes
    yield "INT8", library("int8")
    yield "GPTQ, 4 bits", lambda bench: by_blocks("gptq", Groups(4, GROUP))(bench, bench.folder)
    for method in ("LoRD", "rankfold"):
        start = f"{method}, keep {STACKED:g}"
        for scheme, quantize in SCHEMES.items():
            yield f"{start} + {scheme}", stacked(start, quantize)


def programs(row: Row, file: Path, limit: int, new_tokens: int) -> None:
    """The share of tasks that a row's model solves at its first, greedy attempt."""
    part = file.name.partition(".")[0]
    tasks = load_tasks(file)[:limit]
    if row.results.has(row.name, base=row.base, part=part, tasks=len(tasks), new_tokens=new_tokens):
        return
    start = time.perf_counter()
    written = row.folder / f"{part}-{len(tasks)}-{new_tokens}.jsonl"
    made = complete_tasks(
        row.model, row.bench.tokenizer, tasks, written, sampling=Sampling(new_tokens=new_tokens), batch_size=BATCH
    )
    protection = strongest_protection()
    scores = score_completions(made, [1], Sandbox(protection=protection))
    facts = {
        "tasks": len(tasks),
        "new_tokens": new_tokens,
        "sandbox": describe(protection)["sandbox"],
        "seconds": round(time.perf_counter() - start),
    }
    passed = share(scores.rates[1])
    answers = "".join(f"{rate:.0f}" for rate in scores.rates[1])
    interval = [passed.low, passed.high]
    row.add(
        part,
        [
            (f"{part} pass@1", passed.value, "1", passed.error, facts | {"answers": answers, "interval": interval}),
            (f"{part} parses", scores.parses.value, "1", scores.parses.error, facts),
        ],
    )


def main() -> None:
    """Measure what is missing, row by row."""
    parser = shared_arguments(__doc__)
    parser.set_defaults(calibration="bundled:calibration", text="bundled:python-held-out")
    parser.add_argument("--programs", nargs="+", required=True, type=Path, help="files of programming tasks")
    parser.add_argument("--limit", type=int, default=200, help="tasks of each file, the first ones")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS, help="tokens that a completion may have")
    results = Results("code_quality")
    arguments = parser.parse_args()
    bench = prepared(arguments)
    for name, make in asked_for(rows(), arguments.rows):
        row = Row(bench, name, make, results)
        row.loss()
        row.speed()
        for file in arguments.programs:
            programs(row, file, arguments.limit, arguments.new_tokens)


if __name__ == "__main__":
    main()
