"""CP and tensor train beside Tucker on stacks of matrices: python experiments/joint_decompositions.py.

pycode-llama. Stacks: gate and up projections of a block; query projections of four neighbouring blocks. Every form
gets the ranks that store at most 80, 60 and 40 % of the stack, without data; beside them every matrix alone by SVD.
Columns: relative error of the stack and rise of the loss on held-out Python, the forms running as they are stored; of
CP five seeds. Results: benchmarks/results/joint_decompositions.jsonl.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from lord import Results, Subject, quiet

from rankfold import allocate, factorize, find_sites
from rankfold.compression import compress_stacks
from rankfold.modules import linear_at, matrix_of
from rankfold.quality import paired_difference

KEEPS, SEEDS = (0.8, 0.6, 0.4), range(5)


def stacks_of(subject: Subject, name: str) -> list[list[str]]:
    """Paths of the layers of every stack."""
    blocks = subject.dense.config.num_hidden_layers
    if name == "gate and up":
        return [[f"model.layers.{n}.mlp.gate_proj", f"model.layers.{n}.mlp.up_proj"] for n in range(blocks)]
    return [[f"model.layers.{n + k}.self_attn.q_proj" for k in range(4)] for n in range(0, blocks, 4)]


def ranks_within(form: str, shape: tuple[int, int, int], keep: float) -> tuple[int, ...]:
    """The largest ranks whose numbers are within a share of the stack's."""
    k, m, n = shape
    budget = keep * k * m * n
    if form == "cp":
        return (int(budget / (k + m + n)),)
    if form == "tensor_train":
        return max(
            ((a, min(n, int((budget - k * a) / (a * m + n)))) for a in range(1, k + 1)), key=lambda r: r[0] * r[1]
        )
    best = (1, 1, 1)
    for a in range(1, k + 1):
        for o in range(1, m + 1):
            i = min(n, int((budget - k * a - m * o) / (a * o + n)))
            if i > 0 and min(o, i) * a > min(best[1:]) * best[0]:
                best = (a, o, i)
    return best


def joint(subject: Subject, stacks: Sequence[Sequence[str]], form: str, keep: float, seed: int) -> dict[str, Any]:
    """Error, rise, numbers and seconds of one form."""
    model = subject.load()
    first = [matrix_of(linear_at(model, name))[0] for name in stacks[0]]
    shape = (len(first), *first[0].shape)
    ranks = ranks_within(form, shape, keep)
    squares = sum(float(linear_at(model, name).weight.double().square().sum()) for group in stacks for name in group)
    start = time.process_time()
    plan, factors = compress_stacks(model, stacks, form, ranks, seed)
    seconds = time.process_time() - start
    found = subject.quality(model)
    rise = paired_difference(found.window_losses, subject.quality(subject.dense).window_losses)
    stored = plan.parameters / (len(stacks) * shape[0] * shape[1] * shape[2])
    error = sum(made.error for made in factors) / squares
    return {"error": error, "rise": tuple(rise), "stored": stored, "seconds": seconds, "ranks": str(ranks)}


def alone(subject: Subject, stacks: Sequence[Sequence[str]], keep: float) -> dict[str, Any]:
    """Every matrix by its own SVD."""
    model = subject.load()
    names = [name for group in stacks for name in group]
    sites = find_sites(model).select(names)
    before = {name: linear_at(model, name).weight.detach().double() for name in names}
    start = time.process_time()
    plan = factorize(model, allocate(sites, keep=keep, method="svd"))
    seconds = time.process_time() - start
    lost = sum(float((linear_at(model, name).product().double() - W).square().sum()) for name, W in before.items())
    found = subject.quality(model)
    rise = paired_difference(found.window_losses, subject.quality(subject.dense).window_losses)
    total = sum(float(W.square().sum()) for W in before.values())
    stored = plan.parameters / sum(site.parameters for site in sites)
    return {"error": lost / total, "rise": tuple(rise), "stored": stored, "seconds": seconds}


def cp(subject: Subject, stacks: Sequence[Sequence[str]], keep: float) -> dict[str, Any]:
    """Five seeds: the mean, and how far they lie apart."""
    runs = [joint(subject, stacks, "cp", keep, seed) for seed in SEEDS]
    errors = [run["error"] for run in runs]
    rises = [run["rise"][0] for run in runs]
    return {
        **runs[0],
        "error": (statistics.fmean(errors), statistics.stdev(errors)),
        "rise": (statistics.fmean(rises), statistics.stdev(rises)),
        "seconds": statistics.fmean(run["seconds"] for run in runs),
    }


def main() -> None:
    """Measure what is missing."""
    quiet()
    torch.manual_seed(0)
    subject, results = Subject("pycode-llama"), Results("joint_decompositions")
    for name in ("gate and up", "queries of four blocks"):
        stacks = stacks_of(subject, name)
        for keep in KEEPS:
            rows = {
                "each matrix alone, SVD": lambda k=keep, s=stacks: alone(subject, s, k),
                "Tucker": lambda k=keep, s=stacks: joint(subject, s, "tucker_stack", k, 0),
                "tensor train": lambda k=keep, s=stacks: joint(subject, s, "tensor_train", k, 0),
                "CP, five seeds": lambda k=keep, s=stacks: cp(subject, s, k),
            }
            for form, run in rows.items():
                facts = subject.context.also(stacks=name, keep=keep, form=form)
                results.measure(subject.name, f"{name}, keep {keep}: {form}", facts, run)


if __name__ == "__main__":
    main()
