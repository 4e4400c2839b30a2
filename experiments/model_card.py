"""Measure a model of models/ and write its card.

    python experiments/model_card.py models/pycode-llama --corpus corpus.jsonl.xz

Held-out text are the projects that training left out (`train_code_model.HELD_OUT`), from the corpus or from the
bundled sample. A model is saturated when `whitened` at keep 0.8 raises its held-out loss by 0.1 nat or more: an
undertrained one compresses for free and proves nothing.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
from pathlib import Path
from typing import Any

import torch
import transformers
from train_code_model import json_lines, split

from rankfold import allocate, find_sites
from rankfold.calibration import Corpus, load_corpus, make_batches, random_windows, token_stream
from rankfold.checkpoint import load_model, load_tokenizer
from rankfold.compression import factorize_blocks
from rankfold.cost import disk_bytes, parameter_count
from rankfold.measurement import evaluation_windows
from rankfold.quality import next_token_quality

SAMPLES, SAMPLE_TOKENS, DROPPED_LINES = 200, 120, 3


def parses(text: str) -> bool:
    """Whether a sample is Python once its unfinished last line and at most three more are dropped."""
    lines = text.split("\n")[:-1]
    for dropped in range(DROPPED_LINES + 1):
        kept = "\n".join(lines[: len(lines) - dropped])
        try:
            ast.parse(kept)
        except (SyntaxError, ValueError):
            continue
        return bool(kept.strip())
    return False


def share_that_parses(model: Any, tokenizer: Any) -> float:
    """Share of samples from the begin token, at temperature 0.8, that parse."""
    transformers.set_seed(0)
    begin = torch.full((50, 1), tokenizer.bos_token_id)
    texts: list[str] = []
    while len(texts) < SAMPLES:
        ids = model.generate(
            input_ids=begin, do_sample=True, temperature=0.8, top_k=0, max_new_tokens=SAMPLE_TOKENS,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return sum(map(parses, texts)) / len(texts)


def card(folder: Path, corpus: Corpus) -> str:
    """The card's text, every number of it measured or read from `training.json`."""
    model, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
    facts = json.loads((folder / "training.json").read_text())
    stream = token_stream(tokenizer, corpus.texts)
    bytes_per_token = sum(len(text.encode()) for text in corpus.texts) / len(stream)
    windows = evaluation_windows(tokenizer, corpus, 256)
    windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))[:512]]
    dense = next_token_quality(model, windows)
    parsed = share_that_parses(model, tokenizer)
    parameters = parameter_count(model)
    sites = find_sites(model).select()
    calibration = token_stream(tokenizer, load_corpus("bundled:calibration").texts)
    batches = make_batches(model, random_windows(calibration, 128, 256))
    factorize_blocks(model, allocate(sites, keep=0.8, method="whitened"), sites, batches)
    rise = next_token_quality(model, windows).loss - dense.loss
    config = load_model(folder).config
    seconds = f"{facts['seconds']:,} seconds" if facts["seconds"] else "seconds not recorded, the run was resumed,"
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return f"""---
license: apache-2.0
library_name: transformers
tags: [code, python]
---
# {folder.name}

A small {type(load_model(folder)).__name__} of Python source, trained for measuring compression: small and saturated, not useful
as an assistant. {config.num_hidden_layers} blocks of width {config.hidden_size}, {parameters:,} parameters
({parameters - model.get_input_embeddings().weight.numel():,} outside the token embedding), {disk_bytes(folder):,} bytes in bfloat16, vocabulary {config.vocab_size}.

| | |
|---|---|
| data | {facts["corpus"]}: Python files of CPython's library, numpy, pygments, sympy, torch, transformers |
| kept out | whole projects: {", ".join(facts["held_out_projects"])} |
| tokens seen | {facts["tokens_seen"]:,} ({facts["tokens_seen"] / parameters:.0f} per parameter) |
| training | {seconds} on one thread of a shared x86-64 CPU; batches of {facts["batch_tokens"]} tokens, peak learning rate {facts["learning_rate"]}, seed {facts["seed"]} |
| versions | {versions} |
| held-out perplexity | {dense.perplexity:.2f} ± {dense.perplexity_error:.2f} per token ({dense.tokens:,} tokens of {corpus.name}, windows of 256) |
| held-out bits per byte | {dense.loss / math.log(2) / bytes_per_token:.3f} |
| samples that parse | {parsed:.0%} of {SAMPLES}, {SAMPLE_TOKENS} tokens each at temperature 0.8, the unfinished last line and at most {DROPPED_LINES} more dropped |
| saturation | `whitened` at keep 0.8 raises the held-out loss by {rise:.3f} nat (0.1 or more is saturated) |

Made by `python experiments/train_code_model.py experiments/configs/{folder.name}.json models/{folder.name} --corpus ...`;
measured by `python experiments/model_card.py models/{folder.name}`. The training text was read under the licences of
its projects (PSF-2.0, BSD-3-Clause, BSD-2-Clause, Apache-2.0); none of it is in this folder.
"""


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--corpus", type=Path, help="the JSONL corpus that it was trained on")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    corpus = load_corpus("bundled:python-held-out")
    if arguments.corpus:
        held_out = split(json_lines(arguments.corpus))[1]
        corpus = Corpus("the held-out projects", tuple(held_out))
    (arguments.folder / "README.md").write_text(card(arguments.folder, corpus))
    print((arguments.folder / "README.md").read_text())


if __name__ == "__main__":
    main()
