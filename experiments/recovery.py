"""What recovery gives back, by what it is given: python experiments/recovery.py.

pycode-starcoder compressed by rankfold to keep 0.6 in two factors, drawn to the dense model's predictions on the
bundled sample. One thing at a time around a centre of 150 steps of 16 x 256 tokens, all factors trained at the default
rate on all of the text: learning rate, steps, share of the text, LoRA of rank 8 instead; beside them the dense model in
NF4 with adapters trained in the same way. Column: rise of the loss on held-out Python over the dense model, before and
after. Results: benchmarks/results/recovery.jsonl.
"""

from __future__ import annotations

import copy
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

from lord import Results, Subject, quiet

from rankfold.calibration import random_windows, split_windows
from rankfold.checkpoint import save
from rankfold.quality import paired_difference
from rankfold.quantization import quantize_by_library
from rankfold.recovery import recover

CENTRE: dict[str, Any] = {"steps": 150, "rate": None, "data": 1.0, "lora_rank": None, "start": "low rank"}
CHANGES: tuple[dict[str, Any], ...] = (
    {}, {"rate": 0.0003}, {"rate": 0.005}, {"steps": 50}, {"steps": 450}, {"data": 0.1}, {"data": 0.01},
    {"lora_rank": 8}, {"lora_rank": 32}, {"start": "NF4", "lora_rank": 8},
)  # fmt: skip


def run(subject: Subject, start: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """One recovery."""
    cut = int(0.9 * len(subject.stream))
    stream = subject.stream[: int(settings["data"] * cut)]
    windows = random_windows(stream, settings["steps"] * 16, 256, seed=1)
    held_out = split_windows(subject.stream[cut:], 256)[:64]
    dense = subject.quality(subject.dense)
    model = start()
    before = paired_difference(subject.quality(model).window_losses, dense.window_losses)
    begin = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        result = recover(
            model, subject.load(), windows, held_out, work=Path(folder), steps=settings["steps"], rate=settings["rate"],
            lora_rank=settings["lora_rank"],
        )  # fmt: skip
    after = paired_difference(subject.quality(result.adapters or model).window_losses, dense.window_losses)
    return {
        "before": tuple(before),
        "after": tuple(after),
        "steps": result.steps,
        "seconds": time.process_time() - begin,
    }


def main() -> None:
    """Measure what is missing."""
    quiet()
    subject, results = Subject("pycode-starcoder"), Results("recovery")
    low = cache(lambda: subject.rankfold(0.6, form="low_rank"))

    def nf4() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            save(subject.load(), subject.tokenizer, Path(folder) / "model")
            return quantize_by_library(Path(folder) / "model", "nf4")[0]

    starts = {"low rank": lambda: copy.deepcopy(low()), "NF4": nf4}
    for change in CHANGES:
        settings = {**CENTRE, **change}
        row = ", ".join(f"{name} {value}" for name, value in change.items()) or "centre"
        context = subject.context.also(**settings)
        results.measure(subject.name, row, context, lambda s=settings: run(subject, starts[s["start"]], s))


if __name__ == "__main__":
    main()
