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
from assets import asset
from results import Results, quiet

from rankfold import compress
from rankfold.calibration import random_windows, token_stream
from rankfold.checkpoint import load_model, load_tokenizer
from rankfold.circumstances import circumstances
from rankfold.harness import BENCHMARKS, ask, benchmark_records, convert_data

LIMITS = {"mmlu": 5, "gsm8k": 20}
"""Questions of each task; MMLU has 57 tasks, and GSM8K asks for whole texts."""
LIMIT = 200


def main() -> None:
    """Ask what was not asked yet."""
    quiet()
    assets = Path(sys.argv[1])
    folder = asset("weights/stories260K", assets)
    dense, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
    story = asset("data/tinystories", assets) / "tinystories_sample.txt"
    text = story.read_text()
    stream = token_stream(tokenizer, (text[: int(0.7 * len(text))],))
    small = copy.deepcopy(dense)
    compress(small, tokenizer, keep=0.8, text=random_windows(stream, 128, 256, 0), batch_size=32, effort="best")
    models = {"dense": dense, "rankfold, keep 0.8": small}
    results, here = Results("benchmarks"), circumstances(models, seed=0)
    with tempfile.TemporaryDirectory() as work:
        convert_data(assets / "data", Path(work))
        for name in BENCHMARKS:
            limit = LIMITS.get(name, LIMIT)
            if results.has("dense", benchmark=name, limit=limit):
                continue
            answers = ask(models, tokenizer, name, folder=Path(work), limit=limit, seed=0)
            facts = here.also(data=name, benchmark=name, limit=limit)
            results.append(benchmark_records(name, answers, facts))
            print(name, flush=True)


if __name__ == "__main__":
    main()
