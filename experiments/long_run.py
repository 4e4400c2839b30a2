"""Generation over a long run: python experiments/long_run.py.

pycode-llama writes 20,000 tokens at temperature 0.8, reading at most the last 256 of them, dense and compressed by
rankfold to keep 0.8 and 0.6. For every 2,500 tokens: perplexity of the text to the dense model, divergence of the
compressed model from it on that text, 4-grams repeated, bigrams distinct, seconds a token, bytes kept. Results:
benchmarks/results/long_run.jsonl.
"""

from __future__ import annotations

from typing import Any

import torch
from lord import Results, Subject, quiet

from rankfold.measurement.long_run import stretches, write_long

TOKENS, LENGTH, WINDOW = 20_000, 2_560, 256


def main() -> None:
    """Measure what is missing."""
    quiet()
    subject, results = Subject("pycode-llama"), Results("long_run")
    prompt = torch.tensor(subject.tokenizer("import os\n\n\ndef ", add_special_tokens=True)["input_ids"])
    models = {
        "dense": subject.load,
        "rankfold, keep 0.8": lambda: subject.rankfold(0.8),
        "rankfold, keep 0.6": lambda: subject.rankfold(0.6),
    }
    for name, make in models.items():
        if any(record.context["row"].startswith(name) for record in results.records):
            continue
        model = make()
        written, seconds = write_long(model, prompt, TOKENS, window=WINDOW)
        found = stretches(model, subject.dense, written, seconds, length=LENGTH, window=WINDOW)
        for stretch in found:
            values: dict[str, Any] = stretch._asdict()
            start = values.pop("start")
            context = subject.context.also(model=name, start=start, temperature=0.8, window=WINDOW)
            results.measure(subject.name, f"{name}, from {start}", context, lambda v=values: v)


if __name__ == "__main__":
    main()
