"""Perplexity (or accuracy) of every real model against keep, for the four methods; the numbers of docs/log.md.

    python experiments/quality_tables.py                       # the bundled models
    python experiments/quality_tables.py --assets ASSETS       # and stories260K and MiniLM + SST-2, where they lie

Writes one JSON line per number to benchmarks/results/quality_tables.jsonl and prints Markdown tables.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import BertForSequenceClassification

from rankfold import Plan, Record, Sites, allocate, compress_blocks, find_sites
from rankfold.calibration import (
    load_corpus,
    make_batches,
    random_windows,
    special_tokens,
    split_windows,
    token_stream,
)
from rankfold.checkpoint import load_model, load_tokenizer
from rankfold.factorization import METHODS
from rankfold.measure import circumstances, evaluation_windows
from rankfold.quality import classification_accuracy, next_token_quality
from rankfold.quality.classification import Labelled

ROOT = Path(__file__).parent.parent
KEEPS = (0.9, 0.8, 0.7, 0.6)

AT_EQUAL_RANK = "lord at the ranks of whitened"
"""Shows what centring and the bias add when the bias is not charged to the rank."""

ROWS = (*METHODS, AT_EQUAL_RANK)

Load = Callable[[], Any]
Score = Callable[[Any], tuple[float, float]]


def compressed_scores(
    name: str, load: Load, windows: torch.Tensor, score: Score, context: dict[str, Any]
) -> Iterator[Record]:
    """The dense score, then that of every method at every keep."""
    quantity = context.pop("quantity")
    value, error = score(load())
    yield Record(subject=name, name=quantity, value=value, unit="1", error=error, context=context | {"method": "dense"})
    for method in ROWS:
        for keep in KEEPS:
            model = load()
            sites = find_sites(model).select()
            plan = plan_for(method, sites, keep)
            plan = compress_blocks(model, plan, sites, make_batches(model, windows, 32))
            value, error = score(model)
            kept = plan.parameters / sum(site.parameters for site in sites)
            details = context | {"method": method, "keep": keep, "really_kept": round(kept, 4)}
            yield Record(subject=name, name=quantity, value=value, unit="1", error=error, context=details)


def plan_for(row: str, sites: Sites, keep: float) -> Plan:
    """The plan of one row of the table."""
    if row != AT_EQUAL_RANK:
        return allocate(sites, keep=keep, method=row)
    plan = allocate(sites, keep=keep, method="whitened")
    parameters = {site.name: 0 if site.bias else site.out_features for site in sites}
    options = tuple(
        replace(
            option,
            method="lord",
            bias=True,
            parameters=option.parameters + sum(parameters[name] for name in option.sites),
        )
        for option in plan.options
    )
    return replace(plan, method="lord", options=options)


def perplexity_of(windows: torch.Tensor) -> Score:
    """Perplexity and its standard error on these windows."""

    def score(model: Any) -> tuple[float, float]:
        quality = next_token_quality(model, windows)
        return quality.perplexity, quality.perplexity_error

    return score


def bundled(name: str) -> Iterator[Record]:
    """A model of models/: calibrated on the bundled sample, measured on held-out Python."""
    folder = ROOT / "models" / name
    tokenizer = load_tokenizer(folder)
    stream = token_stream(tokenizer, load_corpus("bundled:calibration").texts)
    test = evaluation_windows(tokenizer, load_corpus("bundled:python-held-out"), 256, 256)
    context = circumstances(
        quantity="perplexity",
        calibration="bundled:calibration, 128 x 256 tokens",
        data="bundled:python-held-out",
        seed=0,
    )
    calibration = random_windows(stream, 128, 256, seed=0)
    yield from compressed_scores(name, lambda: load_model(folder), calibration, perplexity_of(test), context)


def stories(assets: Path) -> Iterator[Record]:
    """stories260K with the split of the design's table: 70 % of one stream to calibrate, the rest to test."""
    folder = assets / "weights" / "stories260K"
    text = (assets / "data" / "tinystories" / "tinystories_sample.txt").read_text()
    ids = torch.tensor(load_tokenizer(folder)(text)["input_ids"])
    cut = int(0.7 * len(ids))
    context = circumstances(
        quantity="perplexity", calibration="first 70 % of TinyStories, 256 x 256 tokens", data="last 30 %", seed=0
    )
    calibration, test = random_windows(ids[:cut], 256, 256, seed=0), split_windows(ids[cut:], 256)
    yield from compressed_scores("stories260K", lambda: load_model(folder), calibration, perplexity_of(test), context)


def minilm(assets: Path) -> Iterator[Record]:
    """all-MiniLM-L6-v2 with the SST-2 head: accuracy on the 872 validation rows."""
    folder = assets / "weights" / "all-MiniLM-L6-v2"
    tokenizer = load_tokenizer(folder)
    head = load_file(assets / "weights" / "all-MiniLM-L6-v2-sst2-head" / "delta.safetensors")

    def load() -> Any:
        model = BertForSequenceClassification.from_pretrained(folder, num_labels=2)
        model.load_state_dict(head, strict=False)
        return model.eval()

    with gzip.open(assets / "data" / "sst2" / "sst2_validation.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    labelled = Labelled([row["sentence"] for row in rows], [row["label"] for row in rows])

    def score(model: Any) -> tuple[float, float]:
        accuracy = classification_accuracy(model, tokenizer, labelled)
        return accuracy.value, accuracy.error

    stream = token_stream(tokenizer, load_corpus(assets / "data" / "wikitext2" / "wiki.valid.tokens").texts)
    calibration = random_windows(stream, 128, 64, 0, *special_tokens(tokenizer))
    context = circumstances(
        quantity="accuracy", calibration="WikiText-2 validation, 128 x 64 tokens", data="SST-2 validation", seed=0
    )
    yield from compressed_scores("MiniLM-L6 + SST-2", load, calibration, score, context)


def print_markdown(records: list[Record]) -> None:
    """One table a model: methods down, keep across."""
    for subject in dict.fromkeys(record.subject for record in records):
        rows = [record for record in records if record.subject == subject]
        dense = rows[0]
        print(f"\n{subject}: {dense.name} on {dense.context['data']}, dense {dense.value:.4g} ± {dense.error:.2g}\n")
        print("| method | " + " | ".join(f"keep {keep}" for keep in KEEPS) + " |")
        print("|---" * (len(KEEPS) + 1) + "|")
        for method in ROWS:
            cells = [f"{row.value:.4g} ± {row.error:.2g}" for row in rows if row.context["method"] == method]
            print(f"| {method} | " + " | ".join(cells) + " |")


def main() -> None:
    """Measure, write the records, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, help="folder with weights/ and data/")
    parser.add_argument("--models", nargs="*", default=["pycode-llama", "pycode-starcoder"])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "quality_tables.jsonl")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    sources = [bundled(name) for name in arguments.models]
    if arguments.assets:
        sources += [stories(arguments.assets), minilm(arguments.assets)]
    records = []
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("w") as file:
        for source in sources:
            for record in source:
                records.append(record)
                file.write(record.to_json() + "\n")
                print(record.subject, record.context["method"], record.context.get("keep", ""), f"{record.value:.4g}")
    print_markdown(records)


if __name__ == "__main__":
    main()
