"""The studies of arXiv:2405.06626 on models that are at hand: python experiments/characterization.py ASSETS.

The bundled Llama, and models of five other architectures trained on the same text. ASSETS is a folder with `models`,
`weights/stories260K`, `weights/all-MiniLM-L6-v2`, its SST-2 head, `data/wikitext2`, `data/sst2` and `data/tinystories`;
without it only the bundled models are studied. `--only NAME ...` studies some. Tucker without data, as in the paper:
all sites at falling ranks; one block, one tensor kind, one site at a time; three blocks ever further apart, in every
place; ever more blocks. Trials of small models with their cost beside the dense one. Then tasks side by side, and three
blocks at rank 1 beside the same blocks removed. Results: benchmarks/results/characterization-*.jsonl.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from assets import asset
from results import RESULTS, ROOT, Results, quiet
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, BertForSequenceClassification

import rankfold
from rankfold import Record, allocate, factorize, find_sites
from rankfold.calibration import Corpus, load_corpus, make_batches
from rankfold.checkpoint import load_model, load_tokenizer
from rankfold.circumstances import circumstances
from rankfold.compression import restore
from rankfold.cost import open_meter, relative_cost
from rankfold.exploration.sensitivity import Trial, run_trials, sensitivity_trials
from rankfold.measurement import evaluation_windows
from rankfold.modules import linear_at
from rankfold.plan import Plan
from rankfold.progress import no_stage
from rankfold.quality import (
    Scorer,
    choice_items,
    choose,
    load_labelled,
    mistake_score,
    next_token_quality,
    next_token_score,
    paired_difference,
    share,
)

SHARES = {
    "ranks": (0.0, 0.125, 0.25, 0.5),
    "block": (0.0, 0.25),
    "kind": (0.0, 0.25),
    "distance": (0.0,),
    "count": (0.0,),
    "site": (0.25,),
}
"""Shares of the full rank by study; 0 is rank 1."""


ARCHITECTURES = ("pycode-opt", "pycode-bloom", "pycode-mamba", "pycode-starcoder", "pycode-codegen")
"""Bundled models beside the Llama, studied by block, kind and distance: OPT, Bloom, Mamba-2, GPTBigCode, CodeGen."""


REAL = "SmolLM2-135M-Instruct"
"""A language model that people use, studied on the test text of WikiText-2."""

MOST = {"distance": 21, "count": 10}
"""Groups of a study at most, spread evenly, where a model has more than twelve blocks: a trial takes a minute there."""


class Subject(NamedTuple):
    """A model and what it is scored on."""

    name: str
    model: Any
    tokenizer: Any
    score: Scorer
    texts: dict[str, Corpus]


def subjects(assets: Path | None) -> Iterator[Subject]:
    """The bundled models, and with the assets a story-teller and a classifier."""
    folder = ROOT / "models" / "pycode-llama"
    texts = {name: load_corpus(f"bundled:{name}") for name in ("python-held-out", "english-held-out")}
    yield decoder("pycode-llama", folder, texts)
    for name in ARCHITECTURES:
        yield decoder(name, ROOT / "models" / name, texts)._replace(texts={})
    if assets is None:
        return
    yield real(assets)
    story = asset("data/tinystories", assets) / "tinystories_sample.txt"
    whole = story.read_text()
    yield decoder("stories260K", asset("weights/stories260K", assets), {
        "stories": Corpus("the last 30 % of TinyStories", (whole[int(0.7 * len(whole)) :],)),
    })  # fmt: skip
    base = asset("weights/all-MiniLM-L6-v2", assets)
    model = BertForSequenceClassification.from_pretrained(base, num_labels=2).eval()
    head = asset("weights/all-MiniLM-L6-v2-sst2-head", assets) / "delta.safetensors"
    model.load_state_dict(load_file(head), strict=False)
    with gzip.open(asset("data/sst2", assets) / "sst2_validation.jsonl.gz", "rt") as lines:
        rows = sorted(map(json.loads, lines), key=lambda row: len(row["sentence"]))
    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        labelled = load_labelled(file)
    tokenizer = load_tokenizer(base)
    yield Subject("MiniLM, SST-2", model, tokenizer, mistake_score(tokenizer, labelled), {})


def real(assets: Path) -> Subject:
    """A model that people use, on text of the usual kind."""
    model, tokenizer = rankfold.load(asset("models", assets) / f"{REAL}.gguf", dtype=torch.float32)
    corpus = load_corpus(str(asset("data/wikitext2", assets) / "wiki.test.raw"))
    return Subject(REAL, model, tokenizer, next_token_score(evaluation_windows(tokenizer, corpus, 256, 24), 4), {})


def decoder(name: str, folder: Path, texts: dict[str, Corpus]) -> Subject:
    """A causal language model, scored on the first text."""
    model, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
    windows = evaluation_windows(tokenizer, next(iter(texts.values())), 256, 48)
    return Subject(name, model, tokenizer, next_token_score(windows, batch_size=16), texts)


def file_of(name: str, by: str) -> Path:
    """Where the records of a study lie."""
    return RESULTS / f"characterization-{name.split(',', maxsplit=1)[0]}-{by}.jsonl"


def run_studies(subject: Subject) -> None:
    """Every study of a model, each gone on with where it was left."""
    sites = find_sites(subject.model).select()
    cost = partial(relative_cost, meter=open_meter(), rounds=5)
    for by in ("block", "kind", "count", "distance", "ranks", "site"):
        if by == "site" and subject.name != "pycode-llama":
            continue
        if by in ("ranks", "count") and subject.name in ARCHITECTURES:
            continue
        trials = sensitivity_trials(sites, method="tucker", by=by, shares=SHARES[by])
        if len({site.block for site in sites}) > 12:
            trials = spread([trial for trial in trials if by != "block" or trial.share == 0], MOST.get(by))
        here = circumstances(subject.model, study=f"{subject.name}, {by}", method="tucker", by=by, seed=0)
        batches = make_batches(subject.model, torch.full((1, 8), 3)) if subject.texts else [{}]
        run_trials(
            subject.model, sites, trials, batches, subject.score, file=file_of(subject.name, by), here=here,
            stage=no_stage, cost=None if by == "site" or (subject.name == REAL and by != "count") else cost,
        )  # fmt: skip
        print(f"{subject.name}: {by}, {len(trials)} trials", flush=True)


def spread(trials: Sequence[Trial], most: int | None) -> list[Trial]:
    """Trials of some of the groups, spread evenly over all."""
    groups = list(dict.fromkeys(trial.group for trial in trials))
    if most is None or len(groups) <= most:
        return list(trials)
    chosen = {groups[round(number * (len(groups) - 1) / (most - 1))] for number in range(most)}
    return [trial for trial in trials if trial.group in chosen]


def tasks(subject: Subject, level: float | None) -> dict[str, Any]:
    """Losses and choices on every text, all sites at a share of the full rank."""
    sites = find_sites(subject.model).select()
    dense = {site.name: linear_at(subject.model, site.name) for site in sites}
    found: dict[str, Any] = {}
    try:
        if level is not None:
            (trial,) = sensitivity_trials(sites, method="tucker", by="ranks", shares=(level,))

            factorize(subject.model, Plan(options=trial.options, method="tucker"))
        for name, corpus in subject.texts.items():
            windows = evaluation_windows(subject.tokenizer, corpus, 256, 24)
            quality = next_token_quality(subject.model, windows, batch_size=8)
            right = share(choose(subject.model, choice_items(subject.tokenizer, corpus.texts, count=200), alone=True))
            found[f"loss {name}"] = (quality.loss, quality.loss_error)
            found[f"choice {name}"] = (right.value, right.error)
    finally:
        restore(subject.model, dense)
    return found


def without_blocks(subject: Subject, chosen: list[int]) -> list[float]:
    """Loss of every window with blocks removed: what they add to the residual stream is nothing."""
    layers = [subject.model.model.layers[number] for number in chosen]
    ends = [linear for layer in layers for linear in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    kept = [end.weight.detach().clone() for end in ends]
    with torch.no_grad():
        for end in ends:
            end.weight.zero_()
        values = subject.score(subject.model).values
        for end, weight in zip(ends, kept, strict=True):
            end.weight.copy_(weight)
    return list(values)


def removed(subject: Subject, results: Results) -> None:
    """Three blocks at rank 1 beside the same blocks removed."""
    dense = subject.score(subject.model).values
    records = [Record.from_json(line) for line in file_of(subject.name, "distance").read_text().splitlines()]
    for record in records:
        group = str(record.context["group"])
        chosen = [int(number) for number in group.partition("blocks ")[2].split(", ")]

        def run(chosen: list[int] = chosen, record: Record = record) -> dict[str, Any]:
            rise = paired_difference(without_blocks(subject, chosen), dense)
            return {"removed": tuple(rise), "rank 1": (record.value, record.error)}

        results.measure(subject.name, group, circumstances(subject.model, seed=0), run)


def nine_percent() -> dict[str, Any]:
    """Llama-2-7B from its configuration: three of 32 blocks at rank 1."""
    config = AutoConfig.for_model(
        "llama", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=32000,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = sum(p.numel() for p in model.parameters())
    sites = find_sites(model).select([f"model.layers.{number}.*" for number in (8, 16, 24)])
    plan = allocate(sites, rank=1, method="tucker")
    dense = sum(site.parameters for site in sites)
    return {"parameters": total, "removed": (dense - plan.parameters) / total, "left": plan.parameters}


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", nargs="?", type=Path)
    parser.add_argument("--only", nargs="+", help="names of models")
    quiet()
    results = Results("characterization")
    arguments = parser.parse_args()
    results.measure("Llama-2-7B", "three blocks at rank 1", circumstances("Llama-2-7B"), nine_percent)
    for subject in subjects(arguments.assets):
        if arguments.only and subject.name not in arguments.only:
            continue
        run_studies(subject)
        for level in (None, 0.75, 0.5, 0.25, 0.0) if subject.texts else ():
            row = "dense" if level is None else f"all sites at {level:g} of the full rank"
            results.measure(subject.name, row, circumstances(subject.model, seed=0), partial(tasks, subject, level))
        if subject.texts or subject.name == REAL:
            removed(subject, results)


if __name__ == "__main__":
    main()
