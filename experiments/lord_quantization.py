"""LoRD and its like with quantization on top: python experiments/lord_quantization.py [MODEL ...].

Rows: the dense model, LoRD of the down-projections at half rank, and rankfold at keep 0.8 in both forms; each in 16
bits, INT8 and NF4 (bitsandbytes), 3 and 4 bits rounded to nearest, by GPTQ and by SpQR, and with two of four weights
pruned. Columns: rise of the loss on held-out Python over the dense model, bytes of the blocks' matrices, bits a weight.
Results: benchmarks/results/lord_quantization.jsonl.
"""

from __future__ import annotations

import copy
import itertools
import sys
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from lord import MODELS, Results, Subject, quiet
from torch import Tensor

from rankfold.checkpoint import save
from rankfold.modules import SpQRLinear, is_linear, set_matrix, stored_matrix
from rankfold.quality import Quality, paired_difference
from rankfold.quantization import Grid, quantize_blocks, quantize_by_library
from rankfold.quantization.blocks import each_layer

GROUP = 24
"""Weights with a scale and a zero point of 16 bits each in the simpler roundings: 1.33 bits, no less than SpQR's."""


def ranges(W: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Step and whole zero point of every row of a group."""
    low, high = W.amin(1).clamp(max=0), W.amax(1).clamp(min=0)
    scale = (high - low).clamp(min=1e-9) / (2**bits - 1)
    return scale[:, None], (-low / scale).round()[:, None]


def to_nearest(W: Tensor, S: Tensor, bits: int) -> Tensor:
    """Round to nearest, group by group."""
    parts = []
    for part in W.split(GROUP, 1):
        scale, zero = ranges(part, bits)
        parts.append(((part / scale + zero).round().clamp(0, 2**bits - 1) - zero) * scale)
    return torch.cat(parts, 1)


def by_gptq(W: Tensor, S: Tensor, bits: int) -> Tensor:
    """GPTQ (arXiv:2210.17323) in the order of the columns."""
    H = S.double() + 0.01 * S.double().diagonal().mean() * torch.eye(len(S), dtype=torch.float64)
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True).float()
    W, rounded = W.clone(), torch.zeros_like(W)
    for column in range(W.shape[1]):
        if column % GROUP == 0:
            scale, zero = ranges(W[:, column : column + GROUP], bits)
        level = (W[:, column : column + 1] / scale + zero).round().clamp(0, 2**bits - 1)
        rounded[:, column] = ((level - zero) * scale)[:, 0]
        error = (W[:, column] - rounded[:, column]) / U[column, column]
        W[:, column:] -= torch.outer(error, U[column, column:])
    return rounded


def two_of_four(W: Tensor, S: Tensor) -> Tensor:
    """Of every four weights the two that matter more stay, by Wanda's measure (arXiv:2306.11695)."""
    width = W.shape[1] - W.shape[1] % 4
    score = (W[:, :width].abs() * S.diagonal()[:width].float().sqrt()).reshape(len(W), -1, 4)
    keep = torch.zeros_like(score).scatter_(2, score.topk(2, dim=2).indices, 1.0).reshape(len(W), width)
    return torch.cat([W[:, :width] * keep, W[:, width:]], 1)


def change_layers(
    change: Callable[[Tensor, Tensor], Tensor], bits: float
) -> Callable[[Subject, Any], tuple[Any, float]]:
    """Every matrix of the blocks replaced by another, block after block, and the bits of a weight that this takes."""

    def run(subject: Subject, model: Any) -> tuple[Any, float]:
        for layer, second in each_layer(model, subject.batches):
            set_matrix(layer, change(stored_matrix(layer).detach(), second))
        return model, bits

    return run


def spqr(bits: int) -> Callable[[Subject, Any], tuple[Any, float]]:
    """SpQR as `rankfold quantize` does it."""

    def run(subject: Subject, model: Any) -> tuple[Any, float]:
        quantize_blocks(model, subject.batches, "spqr", Grid(bits))
        layers = [module for module in model.modules() if isinstance(module, SpQRLinear)]
        stored = sum(8 * b.numel() * b.element_size() for layer in layers for b in layer.buffers())
        return model, stored / sum(layer.out_features * layer.in_features for layer in layers)

    return run


def library(scheme: str, bits: float) -> Callable[[Subject, Any], tuple[Any, float]]:
    """bitsandbytes, by way of a saved checkpoint; zeros that fill up ranks count."""

    def run(subject: Subject, model: Any) -> tuple[Any, float]:
        numbers = block_weights(model)
        with tempfile.TemporaryDirectory() as folder:
            save(model, subject.tokenizer, Path(folder) / "model")
            made, summary = quantize_by_library(Path(folder) / "model", scheme, dtype=torch.float32)
        left = sum(made.get_submodule(name).weight.numel() for name in summary.left)
        stored = bits * (numbers + summary.padded - left) + 16 * left
        return made, stored / numbers

    return run


def block_weights(model: Any) -> int:
    """Numbers of the matrices of the blocks."""
    head = model.get_output_embeddings()
    return sum(m.weight.numel() for m in model.modules() if is_linear(m) and m is not head)


SCHEMES: dict[str, Callable[[Subject, Any], tuple[Any, float]]] = {
    "16 bits": lambda subject, model: (model, 16.0),
    "INT8": library("int8", 8.25),
    "NF4": library("nf4", 4.5),
    "4 bits to nearest": change_layers(lambda W, S: to_nearest(W, S, 4), 4 + 32 / GROUP),
    "4 bits GPTQ": change_layers(lambda W, S: by_gptq(W, S, 4), 4 + 32 / GROUP),
    "4 bits SpQR": spqr(4),
    "3 bits to nearest": change_layers(lambda W, S: to_nearest(W, S, 3), 3 + 32 / GROUP),
    "3 bits GPTQ": change_layers(lambda W, S: by_gptq(W, S, 3), 3 + 32 / GROUP),
    "3 bits SpQR": spqr(3),
    "2:4 pruned": change_layers(two_of_four, 9.0),
}
"""INT8 has a float32 scale a row, counted as a quarter bit; 2:4 keeps half of 16 bits and two bits a kept weight."""


def starts(subject: Subject) -> dict[str, Callable[[], Any]]:
    """What is quantized: the dense model, and three compressed ones."""
    half = subject.dense.get_input_embeddings().weight.shape[1] // 2
    made = {
        "dense": cache(subject.load),
        f"LoRD, down-projections at rank {half}": cache(lambda: subject.lord(half)),
        "rankfold, keep 0.8": cache(lambda: subject.rankfold(0.8)),
        "rankfold, keep 0.8, two factors": cache(lambda: subject.rankfold(0.8, form="low_rank")),
    }
    return {name: lambda make=make: copy.deepcopy(make()) for name, make in made.items()}


def row(subject: Subject, dense: Quality, start: Callable[[], Any], scheme: str) -> dict[str, Any]:
    """Rise of the loss, bits and bytes of one model under one scheme."""
    model = start()
    weights = block_weights(model)
    model, bits = SCHEMES[scheme](subject, model)
    found = subject.quality(model)
    rise = paired_difference(found.window_losses, dense.window_losses)
    perplexity = (found.perplexity, found.perplexity_error)
    return {"rise": tuple(rise), "perplexity": perplexity, "bits": bits, "bytes": bits * weights / 8, "scheme": scheme}


def main() -> None:
    """Measure what is missing."""
    quiet()
    results = Results("lord_quantization")
    for subject in map(Subject, sys.argv[1:] or MODELS):
        dense = subject.quality(subject.dense)
        for (name, start), scheme in itertools.product(starts(subject).items(), SCHEMES):
            make = partial(row, subject, dense, start, scheme)
            results.measure(subject.name, f"{name} | {scheme}", subject.context.also(start=name), make)


if __name__ == "__main__":
    main()
