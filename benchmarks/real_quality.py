"""A real model under every method: perplexity, the field's benchmarks, bytes and speed, one row after the other.

    python benchmarks/real_quality.py MODEL --calibration TEXT --text TEXT --data FOLDER --work FOLDER
    python benchmarks/real_quality.py ... --rows "rankfold, keep 0.8" LoRD     # rows whose names begin so

MODEL is a folder, a GGUF file or a name on the hub. `--data` holds the benchmarks' files, in any layout that
`rankfold convert-data` reads; every task asks its first `--limit` questions. All methods see the same calibration
windows and none trains. Every model is written to `--work` and read from there; what was made or measured is neither
made nor measured again, so an interrupted run goes on where it stopped. The loss and the speed of all rows come first.
Each record holds the answers to all questions, so any two rows can be compared in pairs. Speed is timed beside the
dense model, the two taking turns. Results: benchmarks/results/real_quality.jsonl.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from quality import Subject, asvd, block_removal, perplexity_of
from torch import Tensor

sys.path.append(str(Path(__file__).parent.parent / "experiments"))
from results import Results, quiet

import rankfold
from rankfold import allocate, factorize, find_sites
from rankfold.calibration import load_corpus
from rankfold.checkpoint import load_model
from rankfold.circumstances import Circumstances, circumstances
from rankfold.cost import interleaved_latency
from rankfold.harness import ask, convert_data
from rankfold.measurement import evaluation_windows
from rankfold.modules import prefer
from rankfold.pipeline import read_text
from rankfold.quality import next_token_quality, paired_difference, share
from rankfold.quantization import Groups, quantize_blocks, quantize_by_library

LENGTH, SEQUENCES, WINDOWS, GROUP = 512, 32, 64, 64
KEEPS, BITS = (0.8, 0.9), (4, 3)
BUDGETS = (4.3, 3.3)
AT_RANK_ONE = (3, 4)
TASKS = (
    "arc_easy", "arc_challenge", "hellaswag", "winogrande", "lambada_openai", "piqa", "openbookqa", "boolq",
)  # fmt: skip
SPEED = "speed"
BY_WEIGHTS = "ASVD"
"""What `benchmarks/quality.py` writes as whole matrices: bytes and speed would be the dense model's."""
NF4, SAME_BYTES = "NF4", "rankfold, NF4's bytes"

Make = Callable[["Bench"], Any]
"""The model of a row."""


class Bench:
    """One dense model, its calibration windows and what is asked."""

    def __init__(self, place: Path, arguments: argparse.Namespace) -> None:
        self.place, self.folder, self.arguments = place, place / "original", arguments
        self.dense, self.tokenizer = rankfold.load(self.folder)
        reading = read_text(
            self.dense, self.tokenizer, arguments.calibration, sequences=SEQUENCES, length=LENGTH, batch_size=4, seed=0
        )
        self.batches, self.facts = reading.batches, reading.facts
        self.corpus = load_corpus(arguments.text)
        self.text = evaluation_windows(self.tokenizer, self.corpus, LENGTH, WINDOWS)

    def windows(self, count: int = SEQUENCES, seed: int = 0) -> Tensor:
        """The first calibration windows."""
        return torch.cat([batch["input_ids"] for batch in self.batches])[:count]

    def here(self) -> Circumstances:
        """What every record says."""
        return circumstances(self.dense, seed=0, calibration=dict(self.facts))

    @cached_property
    def subject(self) -> Subject:
        """The same for the peers that were written again from their papers."""
        windows = lambda count, seed: self.windows(count)  # noqa: E731
        load = lambda: load_model(self.folder)  # noqa: E731
        score = perplexity_of(self.text)
        return Subject("", "", load, self.tokenizer, windows, SEQUENCES, score, "text", self.here())


def ours(**choices: Any) -> Make:
    """The one call that users make."""

    def make(bench: Bench) -> Any:
        model, tokenizer = rankfold.load(bench.folder)
        rankfold.compress(model, tokenizer, text=bench.windows(), batch_size=4, seed=0, **choices)
        return model

    return make


def same_bytes(bench: Bench) -> Any:
    """The one call, with as many bytes as NF4 takes."""
    if not (bench.place / NF4 / "seconds").exists():
        raise SystemExit(f"{SAME_BYTES}: make the row {NF4} first.")
    # A file's header is not part of a budget of bytes.
    return ours(bytes=stored(bench.place / NF4) - 200_000)(bench)


def stored(folder: Path) -> int:
    """Bytes of a checkpoint's weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def peer(method: Callable[..., float], keep: float) -> Make:
    """A method of `benchmarks/quality.py`."""

    def make(bench: Bench) -> Any:
        model = load_model(bench.folder)
        method(bench.subject, model, keep, 0)
        return model

    return make


def at_rank_one(count: int) -> Make:
    """Whole blocks at rank 1 by Tucker without data, spread over the depth, as in arXiv:2405.06626."""

    def make(bench: Bench) -> Any:
        model = load_model(bench.folder)
        sites = find_sites(model).select()
        blocks = list(dict.fromkeys(site.block for site in sites))
        chosen = {blocks[(2 * number + 1) * len(blocks) // (2 * count)] for number in range(count)}
        factorize(model, allocate([site for site in sites if site.block in chosen], rank=1, method="tucker"))
        return model

    return make


def gptq(bits: int) -> Make:
    """GPTQ of ours, the same bits everywhere."""

    def make(bench: Bench) -> Any:
        model = load_model(bench.folder)
        quantize_blocks(model, bench.batches, "gptq", Groups(bits, GROUP))
        return model

    return make


def library(scheme: str) -> Make:
    """A scheme of bitsandbytes."""
    return lambda bench: quantize_by_library(bench.folder, scheme)[0]


def rows() -> Iterator[tuple[str, Make]]:
    """All rows, in the order in which they are worth waiting for."""
    yield "dense", lambda bench: load_model(bench.folder)
    yield NF4, library("nf4")
    yield SAME_BYTES, same_bytes
    yield "INT8", library("int8")
    for keep in KEEPS:
        yield f"rankfold, keep {keep:g}", ours(keep=keep)
        yield f"LoRD, keep {keep:g}", ours(keep=keep, method="lord")
        yield f"SVD-LLM (whitened), keep {keep:g}", ours(keep=keep, method="whitened")
    for average in BUDGETS:
        yield f"rankfold, {average:g} bits", ours(bits=average)
    for bits in BITS:
        yield f"GPTQ, {bits} bits", gptq(bits)
    for keep in KEEPS:
        yield f"SVD, keep {keep:g}", ours(keep=keep, method="svd")
        yield f"ASVD, keep {keep:g}", peer(asvd, keep)
        yield f"block removal, keep {keep:g}", peer(block_removal, keep)
    # 7.9 and 10.5 % of SmolLM2-135M, about the 9 % of that paper.
    for count in AT_RANK_ONE:
        yield f"Tucker, {count} blocks at rank 1", at_rank_one(count)


class Row:
    """A row and what is known of it."""

    def __init__(self, bench: Bench, name: str, make: Make, results: Results) -> None:
        self.bench, self.name, self.make, self.results = bench, name, make, results
        self.base, self.folder = bench.place.name, bench.place / name
        self.facts: dict[str, Any] = {"base": self.base, "row": name}

    @cached_property
    def model(self) -> Any:
        """The model as it comes from its folder, made first where it is not there."""
        made = self.folder / "seconds"
        if not made.exists():
            start = time.perf_counter()
            rankfold.save(self.make(self.bench), self.bench.tokenizer, self.folder)
            made.write_text(f"{time.perf_counter() - start:.0f}")
        self.facts["seconds_to_make"] = int(made.read_text())
        self.facts["bytes"] = None if self.name.startswith(BY_WEIGHTS) else stored(self.folder)
        model = load_model(self.folder)
        prefer(model, "speed")
        return model

    def has(self, part: str) -> bool:
        """Whether a part was measured."""
        limit = self.bench.arguments.limit if part in TASKS else None
        return self.results.has(self.name, base=self.base, part=part, limit=limit)

    def add(self, part: str, values: Sequence[tuple[str, float, str, float | None, dict[str, Any]]]) -> None:
        """Write one part: names, values, units, errors and facts of their own."""
        here = self.bench.here()
        limit = self.bench.arguments.limit if part in TASKS else None
        shared = self.facts | {"part": part, "limit": limit}
        self.results.append(
            here.record(self.name, name, value, unit, error, **shared, **facts)
            for name, value, unit, error, facts in values
        )
        shown = ", ".join(f"{name} {value:.4g}" for name, value, *_ in values)
        print(f"{self.base} | {self.name} | {part}: {shown}", flush=True)

    def loss(self) -> None:
        """Loss on held-out text, and how far the predictions are from the dense model's."""
        if self.has("loss"):
            return
        found = next_token_quality(self.model, self.bench.text, dense=self.bench.dense)
        facts = {"data": self.bench.corpus.name, "tokens": found.tokens}
        losses = [round(loss, 5) for loss in found.window_losses]
        self.add(
            "loss",
            [
                ("loss", found.loss, "nat/token", found.loss_error, facts | {"losses": losses}),
                ("divergence", found.kl or 0.0, "nat/token", found.kl_error, facts),
            ],
        )

    def benchmark(self, task: str, data: Path) -> None:
        """Answers to the questions of one task."""
        if self.has(task):
            return
        start = time.perf_counter()
        answers = ask(
            {self.name: self.model}, self.bench.tokenizer, task, folder=data, limit=self.bench.arguments.limit, seed=0
        )[self.name]
        values = []
        for metric, found in answers.values.items():
            mean = share(found) if {*found} <= {0.0, 1.0} else paired_difference(found, [0.0] * len(found))
            facts = {
                "metric": metric,
                "items": len(found),
                "answers": "".join(f"{value:.0f}" for value in found),
                "lm_eval": answers.version,
                "seconds": round(time.perf_counter() - start),
            }
            values.append((f"{task} {metric}", mean.value, "1", mean.error, facts))
        self.add(task, values)

    def speed(self) -> None:
        """Tokens a second beside the dense model's, taking turns: as both are loaded, and as both are fastest."""
        if self.has(SPEED) or self.name == "dense" or self.name.startswith(BY_WEIGHTS):
            return
        models = {"dense": self.bench.dense, self.name: self.model}
        values = []
        for what in ("balance", "speed"):
            for model in models.values():
                prefer(model, what)
            found = interleaved_latency(models, rounds=9)
            dense, own = found["dense"], found[self.name]
            facts = {"contended": own.contended, "group": what}
            values += [
                ("prefill over dense", dense.prefill_seconds / own.prefill_seconds, "1", None, facts),
                ("decode over dense", (dense.decode_seconds or 0) / (own.decode_seconds or 1), "1", None, facts),
            ]
        self.add(SPEED, values)


def shared_arguments(description: str | None, **text: Any) -> argparse.ArgumentParser:
    """What programs of this kind are told: the model, texts (as `text` says), the folder of work and rows."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", help="text to calibrate on", **text)
    parser.add_argument("--text", help="held-out text", **text)
    parser.add_argument(
        "--work", required=True, type=Path, help="folder for the models of all rows; remove it when a method changes"
    )
    parser.add_argument("--rows", nargs="*", help="names of rows, or how they begin (default: all)")
    return parser


def prepared(arguments: argparse.Namespace) -> Bench:
    """The dense model, written to the folder of work if it is not there."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    quiet()
    place = arguments.work / Path(arguments.model).name.removesuffix(".gguf")
    if not (place / "original").is_dir():
        model, tokenizer = rankfold.load(arguments.model, dtype=torch.bfloat16)
        rankfold.save(model, tokenizer, place / "original")
    return Bench(place, arguments)


def asked_for(rows: Iterator[tuple[str, Make]], names: Sequence[str] | None) -> list[tuple[str, Make]]:
    """Rows of some names, or beginnings of names; all without any."""
    return [(name, make) for name, make in rows if not names or any(name.startswith(wanted) for wanted in names)]


def main() -> None:
    """Measure what is missing, row by row."""
    parser = shared_arguments(__doc__, required=True)
    parser.add_argument("--data", required=True, type=Path, help="folder of the benchmarks' files")
    parser.add_argument("--tasks", nargs="*", default=TASKS, choices=TASKS)
    parser.add_argument("--limit", type=int, default=400, help="questions of each task")
    results = Results("real_quality")
    arguments = parser.parse_args()
    bench, data = prepared(arguments), arguments.work / "data"
    if not data.is_dir():
        convert_data(arguments.data, data)
    chosen = asked_for(rows(), arguments.rows)
    # What tells most in the least time first, of all rows.
    for name, make in chosen:
        row = Row(bench, name, make, results)
        row.loss()
        row.speed()
    for name, make in chosen:
        row = Row(bench, name, make, results)
        for task in arguments.tasks:
            row.benchmark(task, data)


if __name__ == "__main__":
    main()
