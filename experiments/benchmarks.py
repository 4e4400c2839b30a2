"""The benchmarks of arXiv:2405.06626, dense beside compressed: python experiments/benchmarks.py ASSETS.

ASSETS holds `data` (files as their authors publish them, read by `rankfold convert-data`), `weights/stories260K` and
`data/tinystories`. The story-teller is compressed by rankfold to keep 0.8, calibrated on the first 70 % of the stories,
and both answer the same questions through lm-evaluation-harness. A model of this size is at chance on nearly all: the
rows show the way, error bars and paired differences, not a capability. Results: benchmarks/results/benchmarks.jsonl.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from pathlib import Path

import torch
from lord import RESULTS, quiet

from rankfold import Record, allocate, find_sites
from rankfold.calibration import make_batches, random_windows, summed_loss, token_stream
from rankfold.checkpoint import load_model, load_tokenizer
from rankfold.compression import compress_in_rounds
from rankfold.harness import BENCHMARKS, ask, benchmark_records, convert_data
from rankfold.measure import circumstances

LIMITS = {"mmlu": 5, "gsm8k": 20}
"""Questions of each task; MMLU has 57 tasks, and GSM8K asks for whole texts."""
LIMIT = 200


def main() -> None:
    """Ask what was not asked yet."""
    quiet()
    assets = Path(sys.argv[1])
    folder = assets / "weights" / "stories260K"
    dense, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
    (story,) = (assets / "data" / "tinystories").glob("*.txt")
    text = story.read_text()
    stream = token_stream(tokenizer, (text[: int(0.7 * len(text))],))
    small = copy.deepcopy(dense)
    sites = find_sites(small).select()
    compress_in_rounds(
        small,
        sites,
        make_batches(small, random_windows(stream, 128, 256, 0), 32),
        loss=summed_loss(small, "text", 0),
        allocate=lambda losses: allocate(sites, keep=0.8, losses=losses, method="kfac", allocation="knapsack"),
    )
    path = RESULTS / "benchmarks.jsonl"
    path.touch()
    asked = {Record.from_json(line).context["benchmark"] for line in path.read_text().splitlines()}
    with tempfile.TemporaryDirectory() as work:
        convert_data(assets / "data", Path(work))
        for name in BENCHMARKS:
            if name in asked:
                continue
            limit = LIMITS.get(name, LIMIT)
            answers = ask(
                {"dense": dense, "rankfold, keep 0.8": small}, tokenizer, name, folder=Path(work), limit=limit, seed=0
            )
            facts = circumstances(benchmark=name, model="stories260K", limit=limit, seed=0)
            records = benchmark_records(name, answers, facts)
            with path.open("a") as file:
                file.write("".join(record.to_json() + "\n" for record in records))
            print(name, flush=True)


if __name__ == "__main__":
    main()
