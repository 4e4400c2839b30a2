"""LoRD with other compressors on top, one step after the other: python experiments/lord_steps.py.

On pycode-starcoder: down-projections at half rank, distillation from the dense model (200 steps of 16 x 256 tokens of
the bundled sample), two of every four weights pruned by Wanda's measure, distillation again with the zeros held, INT8.
Columns: rise of the loss on held-out Python, bytes of the blocks' matrices, and prefill and decoding in tokens a second
beside the dense model, all models taking turns. PyTorch has 2:4 kernels for CUDA only: here zeros are multiplied.
Results: benchmarks/results/lord_steps.jsonl.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lord import Results, Subject, quiet
from lord_quantization import block_weights, library, two_of_four
from torch.nn.utils import prune

from rankfold.calibration import random_windows, split_windows
from rankfold.cost import interleaved_latency
from rankfold.modules import is_transposed, stored_matrix
from rankfold.quality import paired_difference
from rankfold.quantization.blocks import each_layer
from rankfold.recovery import recover

STEPS, RANK = 200, 64
SPARSE = 9.0
"""Bits of a weight of 16 bits when two of four are left, each with an index of two bits."""
SPARSE_INT8 = 5.25
"""The same of INT8, and a scale of 32 bits a row of 128."""


class Step(NamedTuple):
    """A model after a step, and the bits that its blocks' weights take."""

    name: str
    model: Any
    bits: float
    weights: int


def distilled(subject: Subject, model: Any) -> Any:
    """The model drawn to the dense one's predictions."""
    cut = int(0.9 * len(subject.stream))
    windows = random_windows(subject.stream[:cut], STEPS * 16, 256, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        held_out = split_windows(subject.stream[cut:], 256)[:64]
        recover(model, subject.load(), windows, held_out, work=Path(folder), steps=STEPS)
    return model


def pruned(subject: Subject, model: Any) -> Any:
    """Two of every four weights zero, by masks that training respects."""
    for layer, second in each_layer(model, subject.batches):
        kept = (two_of_four(stored_matrix(layer).detach(), second) != 0).float()
        prune.custom_from_mask(layer, "weight", kept.T if is_transposed(layer) else kept)
    return model


def fixed(model: Any) -> Any:
    """A copy whose zeros are ordinary zeros."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if prune.is_pruned(module) and hasattr(module, "weight_orig"):
            prune.remove(module, "weight")
    return model


def steps(subject: Subject) -> Iterator[Step]:
    """The model after every step."""
    yield Step("dense", subject.load(), 16.0, block_weights(subject.dense))
    model = subject.lord(RANK)
    weights = block_weights(model)
    yield Step(f"+ LoRD, rank {RANK} of 128", copy.deepcopy(model), 16.0, weights)
    model = distilled(subject, model)
    yield Step("+ distillation", copy.deepcopy(model), 16.0, weights)
    model = pruned(subject, model)
    yield Step("+ 2:4 pruning", fixed(model), SPARSE, weights)
    model = fixed(distilled(subject, model))
    yield Step("+ distillation, zeros held", model, SPARSE, weights)
    yield Step("+ INT8", library("int8", 8.25)(subject, copy.deepcopy(model))[0], SPARSE_INT8, weights)


def main() -> None:
    """Measure what is missing; the steps build on each other, so all are made."""
    quiet()
    subject, results = Subject("pycode-starcoder"), Results("lord_steps")
    made = list(steps(subject))
    names = {step.name: step.model for step in made}
    times = {batch: interleaved_latency(names, batch_size=batch, rounds=31) for batch in (1, 16)}
    dense = subject.quality(subject.dense)
    for step in made:
        quality = subject.quality(step.model)
        rise = paired_difference(quality.window_losses, dense.window_losses)
        values: dict[str, Any] = {"rise": tuple(rise), "bits": step.bits, "bytes": step.bits * step.weights / 8}
        for batch, latency in times.items():
            found = latency[step.name]
            values[f"prefill_{batch}"] = batch * 128 / found.prefill_seconds
            values[f"decode_{batch}"] = batch / (found.decode_seconds or float("inf"))
        contended = any(latency[step.name].contended for latency in times.values())
        results.measure(subject.name, step.name, subject.context.also(contended=contended), lambda v=values: v)


if __name__ == "__main__":
    main()
