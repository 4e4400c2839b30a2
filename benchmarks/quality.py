"""Quality per byte: every method on the same calibration tokens and the same evaluation text, with its error bar.

    pip install -e '.[peers]'
    python benchmarks/quality.py --assets ASSETS                 # stories260K, MiniLM + SST-2 and the bundled models
    python benchmarks/quality.py --part bundled                  # only what needs no ASSETS

Parts: `grid` (training-free methods, three seeds), `ablation`, `tokens` (calibration size), `labels`, `trained` (block
refinement and recovery), `bundled` (the models of models/) and `encoder` (MiniLM). Every number is one line of
benchmarks/results/quality.jsonl; a number that is there is not measured again. ASSETS holds weights/ and data/.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import BertForSequenceClassification

sys.path.append(str(Path(__file__).parent.parent / "experiments"))
from assets import asset
from results import Results, quiet

from rankfold import allocate, calibrate, compress, find_sites
from rankfold.calibration import (
    Corpus,
    load_corpus,
    make_batches,
    overlap,
    random_windows,
    special_tokens,
    split_windows,
    summed_loss,
    token_stream,
)
from rankfold.checkpoint import load_model, load_tokenizer
from rankfold.circumstances import Circumstances, circumstances
from rankfold.factorization import SiteMoments, truncated_svd
from rankfold.measurement import evaluation_windows
from rankfold.modules import linear_at, matrix_of
from rankfold.plan import Plan
from rankfold.quality import classification_accuracy, next_token_quality
from rankfold.quality.classification import Labelled
from rankfold.recovery import recover, refine_blocks, refine_predictions, sample_windows

ROOT = Path(__file__).parent.parent
KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5)
BATCH = 32
REFINE_STEPS = 300
TRAINING_BATCH = 16
"""Windows a step of recovery."""

RECOVERY_STEPS = 1200

Score = Callable[[Any], tuple[float, float | None]]


@dataclass
class Subject:
    """A model, what it is calibrated on and how it is scored."""

    name: str
    quantity: str
    load: Callable[[], Any]
    tokenizer: Any
    windows: Callable[[int, int], Tensor]
    """Calibration windows: how many, seed."""
    count: int
    score: Score
    labels: str
    here: Circumstances

    def batches(self, model: Any, seed: int, count: int | None = None) -> list[dict[str, Tensor]]:
        """Calibration batches of a seed."""
        return make_batches(model, self.windows(count or self.count, seed), BATCH)


# --- one-shot methods ------------------------------------------------------------------------------------------------


def ours(count: int | None = None, **choices: Any) -> Callable[..., float]:
    """`rankfold.compress`, as users call it, at its best effort, with some choices of its own."""

    def run(subject: Subject, model: Any, keep: float, seed: int) -> float:
        settings = {"labels": subject.labels, "effort": "best", **choices}
        windows = subject.windows(count or subject.count, seed)
        sites = find_sites(model).select()
        plan = compress(model, text=windows, batch_size=BATCH, keep=keep, seed=seed, sites=sites, **settings)
        return kept(plan, sites)

    return run


def kept(plan: Plan, sites: Any) -> float:
    """Share of the sites' parameters that is stored."""
    return plan.parameters / sum(site.parameters for site in sites)


# --- peers, written again from their papers --------------------------------------------------------------------------


def asvd(subject: Subject, model: Any, keep: float, seed: int) -> float:
    """ASVD (arXiv:2312.05821): columns scaled by the root of the mean absolute input, then the plain SVD."""
    sites = find_sites(model).select()
    scales: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str) -> Callable[..., None]:
        def take(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1]).abs()
            scales[name] = scales.get(name, 0) + rows.sum(0)
            counts[name] = counts.get(name, 0) + len(rows)

        return take

    handles = [linear_at(model, site.name).register_forward_pre_hook(watch(site.name)) for site in sites]
    with torch.no_grad():
        for batch in subject.batches(model, seed):
            model(**batch)
    for handle in handles:
        handle.remove()
    plan = allocate(sites, keep=keep, method="svd")
    for option in plan.factorized:
        for name in option.sites:
            linear = linear_at(model, name)
            scale = (scales[name] / counts[name]).clamp(min=1e-6).sqrt()
            W, _ = matrix_of(linear)
            factors = truncated_svd(W * scale, option.ranks[0])
            linear.weight.data = ((factors.up @ factors.down) / scale).to(linear.weight.dtype)
    return kept(plan, sites)


def aa_svd(subject: Subject, model: Any, keep: float, seed: int) -> float:
    """AA-SVD's closed form (its objective 4): dense outputs from the compressed prefix's inputs, uniform ranks."""
    sites, batches = find_sites(model).select(), subject.batches(model, seed)
    dense = copy.deepcopy(model)
    plan = allocate(sites, keep=keep, method="whitened")
    rank_of = {name: option.ranks[0] for option in plan.factorized for name in option.sites}
    for block in dict.fromkeys(site.block for site in sites):
        group = [site for site in sites if site.block == block]
        moments = paired_moments(dense, model, [site.name for site in group], batches)
        for site in group:
            cross, second = moments[site.name]
            if site.name not in rank_of:
                continue
            linear = linear_at(model, site.name)
            W = linear_at(dense, site.name).weight.double()
            second = second + 1e-6 * second.diagonal().mean() * torch.eye(len(second), dtype=second.dtype)
            target = torch.linalg.solve(second, (W @ cross).T).T
            _, vectors = torch.linalg.eigh(target @ second @ target.T)
            U = vectors[:, -rank_of[site.name] :]
            linear.weight.data = (U @ (U.T @ target)).to(linear.weight.dtype)
    return kept(plan, sites)


@torch.no_grad()
def paired_moments(
    dense: Any, model: Any, names: list[str], batches: list[dict[str, Tensor]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """`E[x x'^T]` and `E[x' x'^T]` of what some sites read in the dense and in the compressed model."""
    seen: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    handles = []
    for owner, place in zip((dense, model), seen, strict=True):
        for name in names:
            hook = lambda _, args, name=name, place=place: place.__setitem__(name, args[0])  # noqa: E731
            handles.append(linear_at(owner, name).register_forward_pre_hook(hook))
    sums: dict[str, list[Any]] = {name: [0.0, 0.0] for name in names}
    count = 0
    for batch in batches:
        dense(**batch)
        model(**batch)
        count += batch["input_ids"].numel()
        for name in names:
            x, y = (place[name].reshape(-1, place[name].shape[-1]).double() for place in seen)
            sums[name][0] = sums[name][0] + x.T @ y
            sums[name][1] = sums[name][1] + y.T @ y
    for handle in handles:
        handle.remove()
    return {name: (cross / count, second / count) for name, (cross, second) in sums.items()}


def basis_sharing(subject: Subject, model: Any, keep: float, seed: int) -> float:
    """Basis Sharing (arXiv:2410.03765): neighbouring blocks' q, k, v, gate and up share one whitened row basis."""
    sites = find_sites(model).select()
    loss = summed_loss(model, subject.labels, seed)
    statistics = calibrate(model, sites, subject.batches(model, seed), loss=loss)
    stored = 0
    blocks = list(dict.fromkeys(site.block for site in sites))
    for kind in dict.fromkeys(site.kind for site in sites):
        of_kind = [site for site in sites if site.kind == kind]
        shared = any(part in kind for part in ("q_proj", "k_proj", "v_proj", "gate", "up_proj"))
        size = 2 if shared else 1
        for start in range(0, len(blocks), size):
            group = [site for site in of_kind if site.block in blocks[start : start + size]]
            if not group:
                continue
            site = group[0]
            budget = int(keep * sum(s.out_features * s.in_features for s in group))
            rank = budget // (site.in_features + sum(s.out_features for s in group))
            rank = max(1, min(rank, site.in_features, sum(s.out_features for s in group)))
            W = torch.cat([matrix_of(linear_at(model, s.name))[0] for s in group]).double()
            # One Gram matrix for the group: the sum of the members'.
            S = sum(_input_moment(statistics[s.name]) for s in group)
            values, vectors = torch.linalg.eigh(S)
            root = vectors * values.clamp(min=1e-9 * float(values.max())).sqrt()
            inverse = (vectors / values.clamp(min=1e-9 * float(values.max())).sqrt()).T
            U, sigma, Vh = torch.linalg.svd(W @ root, full_matrices=False)
            product = (U[:, :rank] * sigma[:rank]) @ (Vh[:rank] @ inverse)
            for s, part in zip(group, product.split([s.out_features for s in group]), strict=True):
                linear = linear_at(model, s.name)
                linear.weight.data = part.to(linear.weight.dtype).contiguous()
            stored += rank * (site.in_features + sum(s.out_features for s in group))
    return stored / sum(site.parameters for site in sites)


def _input_moment(moments: SiteMoments) -> Tensor:
    assert moments.inputs is not None, "inputs are always measured where gradients are"
    return moments.inputs.second


# --- what a user would take instead ----------------------------------------------------------------------------------


def int8(subject: Subject, model: Any, keep: float, seed: int) -> float:
    """Weight-only INT8 by torchao, one scale a row, of the same layers."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    names = {site.name for site in find_sites(model).select()}
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name in names)
    return _bits(model, names, 8, rows=True)


def nf4(subject: Subject, model: Any, keep: float, seed: int) -> float:
    """4-bit NormalFloat by bitsandbytes, a float32 scale for 64 weights, of the same layers."""
    names = {site.name for site in find_sites(model).select()}
    for name in names:
        weight = linear_at(model, name).weight
        weight.data = rounded_to_nf4(weight.data)
    return _bits(model, names, 4 + 32 / 64, rows=False)


def rounded_to_int8(W: Tensor) -> Tensor:
    """A matrix as 8-bit integers hold it, one scale a row."""
    scale = W.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return (W / scale).round() * scale


def rounded_to_nf4(W: Tensor) -> Tensor:
    """A matrix as bitsandbytes' 4-bit NormalFloat holds it."""
    import bitsandbytes.functional as bnb

    # One row: the CPU kernel of some versions misreads the scales of matrices (checked below).
    flat = W.float().reshape(1, -1).contiguous()
    packed, state = bnb.quantize_4bit(flat, blocksize=64, quant_type="nf4")
    restored = bnb.dequantize_4bit(packed, state)
    error = float((restored - flat).norm() / flat.norm())
    assert error < 0.15, f"4-bit weights are off by {error:.0%}: this build of bitsandbytes is broken"
    return restored.reshape(W.shape).to(W.dtype)


class Rounded(nn.Module):
    """A weight that computes as a quantizer stores it, and is trained as if it did not (Bengio et al. 2013)."""

    def __init__(self, rounded: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._rounded = rounded

    def forward(self, W: Tensor) -> Tensor:
        """The matrix as it is stored, differentiable as the identity."""
        return W + (self._rounded(W.detach()) - W).detach()


def rounding(rounded: Callable[[Tensor], Tensor], bits: float, rows: bool) -> Callable[..., float]:
    """A quantizer that training sees: weights are rounded in every forward pass, and at last for good."""

    def run(subject: Subject, model: Any, keep: float, seed: int) -> float:
        names = {site.name for site in find_sites(model).select()}
        stored = _bits(model, names, bits, rows)
        for name in names:
            parametrize.register_parametrization(linear_at(model, name), "weight", Rounded(rounded))
        return stored

    return run


def _bits(model: Any, names: set[str], bits: float, rows: bool) -> float:
    """Stored share against 16 bits a weight, scales included."""
    shapes = [linear_at(model, name).weight.shape for name in names]
    stored = sum(out * columns * bits + (32 * out if rows else 0) for out, columns in shapes)
    return float(stored / sum(16 * out * columns for out, columns in shapes))


def block_removal(subject: Subject, model: Any, keep: float, seed: int) -> float:
    """The best whole blocks to leave out, all subsets tried on a sample of the calibration text."""
    layers = model.model.layers if hasattr(model, "model") else model.transformer.h
    total, number = len(layers), max(1, round((1 - keep) * len(layers)))
    sample = subject.windows(16, seed)
    originals = list(layers)

    def without(chosen: tuple[int, ...]) -> None:
        rest = [layer for index, layer in enumerate(originals) if index not in chosen]
        for index, layer in enumerate(rest):
            (layer.self_attn if hasattr(layer, "self_attn") else layer.attn).layer_idx = index
        replaced = nn.ModuleList(rest)
        if hasattr(model, "model"):
            model.model.layers = replaced
        else:
            model.transformer.h = replaced
        for field in ("num_hidden_layers", "n_layer"):
            if hasattr(model.config, field):
                setattr(model.config, field, len(rest))
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[: len(rest)]

    def loss_without(chosen: tuple[int, ...]) -> float:
        without(chosen)
        return next_token_quality(model, sample).loss

    best: tuple[int, ...] = ()
    if total <= 6:
        best = min(itertools.combinations(range(total), number), key=loss_without)
    else:
        for _ in range(number):
            best = min(((*best, index) for index in range(total) if index not in best), key=loss_without)
    without(best)
    return 1 - number / total


TRAINING_FREE: dict[str, Callable[..., float]] = {
    "svd": ours(method="svd"),
    "asvd": asvd,
    "lord": ours(method="lord"),
    "whitened = SVD-LLM": ours(method="whitened"),
    "basis sharing": basis_sharing,
    "aa-svd, closed form": aa_svd,
    "block removal": block_removal,
    "rankfold": ours(),
}

PLAIN: dict[str, Callable[..., float]] = {"int8": int8, "nf4": nf4}

TRAINABLE = TRAINING_FREE | {
    "int8": rounding(rounded_to_int8, 8, rows=True),
    "nf4": rounding(rounded_to_nf4, 4 + 32 / 64, rows=False),
}
"""What recovery can start from."""

ONCE: dict[str, Any] = {"rounds": 0, "drift": 0.0}

ABLATION: dict[str, Callable[..., float]] = {
    "whitened, uniform, two factors": ours(method="whitened"),
    "+ pivoted form": ours(method="whitened", form="pivoted"),
    "+ weighed on both sides (kfac)": ours(allocation="uniform", **ONCE),
    "+ knapsack": ours(**ONCE),
    "+ drift correction": ours(rounds=0),
    "+ 1 round": ours(rounds=1),
    "+ 2 rounds = rankfold": ours(),
    "3 rounds": ours(rounds=3),
    "rankfold without pivoted form": ours(form="low_rank"),
    "rankfold without knapsack": ours(allocation="uniform"),
    "rankfold without rounds": ours(rounds=0),
    "rankfold without drift correction": ours(drift=0.0),
    "rankfold with all of the drift corrected": ours(drift=1.0),
    "knapsack alone (whitened, two factors)": ours(method="whitened", allocation="knapsack", form="low_rank"),
    "pivoted + knapsack (whitened)": ours(method="whitened", allocation="knapsack", form="pivoted"),
    "kfac alone (uniform, two factors)": ours(allocation="uniform", form="low_rank", **ONCE),
}


# --- subjects --------------------------------------------------------------------------------------------------------


def stories(assets: Path) -> tuple[Subject, Tensor]:
    """stories260K with the split of the design: 70 % of one stream to calibrate and train on, the rest to test."""
    folder = asset("weights/stories260K", assets)
    tokenizer = load_tokenizer(folder)
    text = (asset("data/tinystories", assets) / "tinystories_sample.txt").read_text()
    ids = torch.tensor(tokenizer(text)["input_ids"])
    cut = int(0.7 * len(ids))
    test = split_windows(ids[cut:], 256)
    seen, unseen = tokenizer.decode(ids[:cut]), tokenizer.decode(ids[cut:])
    here = circumstances(
        load_model(folder),
        data=Corpus("last 30 % of the TinyStories sample", (unseen,)),
        calibration="256 x 256 tokens of the first 70 % of the TinyStories sample",
        overlap_with_calibration=round(overlap([seen], [unseen]), 4),
    )
    subject = Subject(
        "stories260K",
        "perplexity",
        lambda: load_model(folder),
        tokenizer,
        lambda count, seed: random_windows(ids[:cut], count, 256, seed),
        256,
        perplexity_of(test),
        "text",
        here,
    )
    return subject, ids[:cut]


def bundled(name: str) -> Subject:
    """A model of models/: calibrated on the bundled sample, measured on held-out Python."""
    folder = ROOT / "models" / name
    tokenizer = load_tokenizer(folder)
    corpus, held_out = load_corpus("bundled:calibration"), load_corpus("bundled:python-held-out")
    stream = token_stream(tokenizer, corpus.texts)
    here = circumstances(
        load_model(folder, dtype=torch.float32),
        data=held_out,
        calibration="bundled:calibration, 128 x 256 tokens",
        overlap_with_calibration=round(overlap(corpus.texts, held_out.texts), 4),
    )
    return Subject(
        name,
        "perplexity",
        lambda: load_model(folder, dtype=torch.float32),
        tokenizer,
        lambda count, seed: random_windows(stream, count, 256, seed),
        128,
        perplexity_of(evaluation_windows(tokenizer, held_out, 256, 256)),
        "text",
        here,
    )


def minilm(assets: Path) -> Subject:
    """all-MiniLM-L6-v2 with the SST-2 head: accuracy on the 872 validation rows; labels drawn from the model."""
    folder = asset("weights/all-MiniLM-L6-v2", assets)
    tokenizer = load_tokenizer(folder)
    head = load_file(asset("weights/all-MiniLM-L6-v2-sst2-head", assets) / "delta.safetensors")

    def load() -> Any:
        model = BertForSequenceClassification.from_pretrained(folder, num_labels=2)
        model.load_state_dict(head, strict=False)
        return model.eval()

    rows_file = asset("data/sst2", assets) / "sst2_validation.jsonl.gz"
    with gzip.open(rows_file, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    labelled = Labelled([row["sentence"] for row in rows], [row["label"] for row in rows])

    def score(model: Any) -> tuple[float, float | None]:
        accuracy = classification_accuracy(model, tokenizer, labelled)
        return accuracy.value, accuracy.error

    stream = token_stream(tokenizer, load_corpus(asset("data/wikitext2", assets) / "wiki.valid.tokens").texts)
    frame = special_tokens(tokenizer)
    here = circumstances(load(), data=rows_file, calibration="WikiText-2 validation, 128 x 64 tokens")
    return Subject(
        "MiniLM-L6 + SST-2",
        "accuracy",
        load,
        tokenizer,
        lambda count, seed: random_windows(stream, count, 64, seed, *frame),
        128,
        score,
        "sampled",
        here,
    )


def perplexity_of(windows: Tensor) -> Score:
    """Perplexity and its standard error over windows."""

    def score(model: Any) -> tuple[float, float | None]:
        quality = next_token_quality(model, windows, batch_size=BATCH)
        return quality.perplexity, quality.perplexity_error

    return score


# --- the program -----------------------------------------------------------------------------------------------------


def add(
    results: Results,
    subject: Subject,
    key: tuple[str, str, float, int],
    run: Callable[[], tuple[Any, float]],
) -> None:
    """Measure one number, unless it is there: by part, row, keep and seed."""
    part, row, keep, seed = key
    facts = {"part": part, "row": row, "keep": keep, "seed": seed}
    if results.has(subject.name, **facts):
        return
    start = time.perf_counter()
    model, stored = run()
    seconds = time.perf_counter() - start
    value, error = subject.score(model)
    details = {"stored": round(stored, 4), "seconds": round(seconds, 1)}
    results.append([subject.here.record(subject.name, subject.quantity, value, "1", error, **facts, **details)])
    print(f"{subject.name} | {part} | {row} | keep {keep} | seed {seed}: {value:.4g} ({seconds:.0f} s)", flush=True)


def rows(
    results: Results,
    subject: Subject,
    part: str,
    table: dict[str, Callable[..., float]],
    keeps: tuple[float, ...],
    seeds: tuple[int, ...] = (0,),
) -> None:
    """Every row of a table at every keep and seed."""
    for seed, (row, method), keep in itertools.product(seeds, table.items(), keeps):

        def run(method: Callable[..., float] = method, keep: float = keep, seed: int = seed) -> tuple[Any, float]:
            model = subject.load()
            return model, method(subject, model, keep, seed)

        add(results, subject, (part, row, keep, seed), run)


def dense_row(results: Results, subject: Subject) -> None:
    """The model as it is, and what plain quantization makes of it."""
    add(results, subject, ("plain", "dense", 1.0, 0), lambda: (subject.load(), 1.0))
    rows(results, subject, "plain", PLAIN, (1.0,))


class Training:
    """Block refinement and recovery of one subject, every start computed once."""

    def __init__(self, subject: Subject, stream: Tensor, steps: int) -> None:
        self.subject, self.steps = subject, steps
        self.teacher = subject.load()
        self._stream = stream
        self._starts: dict[tuple[str, float], tuple[Any, float]] = {}

    @cached_property
    def texts(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Windows to train on and to decide on: of the text at hand, of the teacher's own, and of both."""
        cut = int(0.9 * len(self._stream))
        given = random_windows(self._stream[:cut], 4096, 256, seed=100), split_windows(self._stream[cut:], 256)
        made = sample_windows(self.teacher, self.subject.tokenizer, 4096 + 64, 256, seed=0, batch_size=256)
        return {
            "given text": given,
            "generated text": (made[:-64], made[-64:]),
            "both texts": (torch.cat([given[0], made[:-64]]), given[1]),
        }

    def start(self, row: str, keep: float) -> tuple[Any, float]:
        """A compressed model, refined where the row says so, and what it stores."""
        if (row, keep) not in self._starts:
            model = self.subject.load()
            dense = {site.name: linear_at(model, site.name) for site in find_sites(model).select()}
            method = row.removesuffix(REFINED_OUTPUTS).removesuffix(REFINED)
            stored = TRAINABLE[method](self.subject, model, keep, 0)
            batches = make_batches(model, self.subject.windows(1024, 0), TRAINING_BATCH)
            if row.endswith(REFINED):
                refine_predictions(model, self.subject.load(), batches, steps=REFINE_STEPS)
            elif row.endswith(REFINED_OUTPUTS):
                refine_blocks(model, batches, dense, steps=REFINE_STEPS)
            self._starts[row, keep] = model, stored
        model, stored = self._starts[row, keep]
        return copy.deepcopy(model), stored

    def recovered(self, row: str, keep: float, text: str) -> tuple[Any, float]:
        """The same after recovery on a text."""
        model, stored = self.start(row, keep)
        windows, held_out = self.texts[text]
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder) / "work"
            recover(model, self.teacher, windows, held_out, work=work, steps=self.steps, batch_size=TRAINING_BATCH)
        for module in list(model.modules()):
            if parametrize.is_parametrized(module):
                parametrize.remove_parametrizations(module, "weight")
        return model, stored


REFINED = " + refinement"
REFINED_OUTPUTS = " + refinement towards outputs"

BOTH = (0.8, 0.6)

TRAINED: tuple[tuple[str, str | None, tuple[float, ...]], ...] = (
    ("rankfold", None, BOTH),
    ("rankfold" + REFINED_OUTPUTS, None, BOTH),
    ("lord", None, BOTH),
    ("block removal", None, BOTH),
    ("rankfold" + REFINED, None, BOTH),
    ("rankfold" + REFINED, "both texts", BOTH),
    ("rankfold", "both texts", BOTH),
    ("lord", "both texts", BOTH),
    ("block removal", "both texts", BOTH),
    ("int8", "both texts", (1.0,)),
    ("nf4", "both texts", (1.0,)),
    ("rankfold", "given text", (0.8,)),
    ("rankfold", "generated text", (0.8,)),
    ("lord" + REFINED, None, (0.8,)),
)
"""What is trained, the text of its recovery, and what it keeps."""


def trained(results: Results, training: Training, keeps: tuple[float, ...]) -> None:
    """Refinement, then recovery; peers with the same refinement and the same recovery."""
    for row, text, kept_shares in TRAINED:
        for keep in (keep for keep in kept_shares if keep in keeps):

            def run(row: str = row, text: str | None = text, keep: float = keep) -> tuple[Any, float]:
                return training.start(row, keep) if text is None else training.recovered(row, keep, text)

            name = row if text is None else f"{row} + KL on {text}"
            add(results, training.subject, ("trained", name, keep, 0), run)


def parts(results: Results, arguments: argparse.Namespace) -> Iterator[str]:
    """The parts that were asked for, one after the other."""
    wanted = arguments.part
    if arguments.assets:
        subject, stream = stories(arguments.assets)
        if "grid" in wanted:
            dense_row(results, subject)
            rows(results, subject, "grid", TRAINING_FREE, KEEPS, tuple(range(arguments.seeds)))
            yield "grid"
        if "ablation" in wanted:
            rows(results, subject, "ablation", ABLATION, (0.8, 0.6))
            yield "ablation"
        if "tokens" in wanted:
            sizes = {f"{n} sequences": ours(n) for n in (64, 256, 1024)}
            rows(results, subject, "tokens", sizes, (0.8, 0.6))
            yield "tokens"
        if "labels" in wanted:
            kinds = {"labels sampled": ours(labels="sampled")}
            rows(results, subject, "labels", kinds, (0.8, 0.6), (0, 1, 2))
            yield "labels"
        if "trained" in wanted:
            trained(results, Training(subject, stream, arguments.steps), tuple(arguments.keep))
            yield "trained"
        if "encoder" in wanted:
            encoder = minilm(arguments.assets)
            dense_row(results, encoder)
            table = {
                row: method for row, method in TRAINING_FREE.items() if row not in ("block removal", "basis sharing")
            }
            rows(results, encoder, "grid", table, (0.8, 0.6))
            yield "encoder"
    if "bundled" in wanted:
        for name in ("pycode-llama", "pycode-starcoder"):
            model = bundled(name)
            dense_row(results, model)
            table = {row: method for row, method in TRAINING_FREE.items() if row not in ("basis sharing",)}
            rows(results, model, "grid", table, (0.8, 0.6))
        yield "bundled"


PARTS = ("grid", "ablation", "tokens", "labels", "trained", "encoder", "bundled")


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, help="folder with weights/ and data/")
    parser.add_argument("--part", nargs="*", default=PARTS, choices=PARTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", type=float, nargs="*", default=(1.0, *BOTH), help="what the part `trained` keeps")
    parser.add_argument("--steps", type=int, default=RECOVERY_STEPS, help="steps of recovery")
    results = Results("quality")
    arguments = parser.parse_args()
    quiet()
    for part in parts(results, arguments):
        print(f"{part}: done")


if __name__ == "__main__":
    main()
