"""A search of the design space against random search: python experiments/explore.py.

pycode-llama, objectives quality (held-out Python, 16 windows) and bytes, kfac at eighths of the full rank, 200 trials
each: TPE over policies, begun at the knapsack's plans and the paper's rules; policies drawn at random; points of the
space drawn at random. Three seeds. Columns: hypervolume up to 2 nat and the dense bytes, and the least rise of the loss
within 90, 80, 70 and 60 % of the bytes; beside them the knapsack's plan at that budget. Results:
benchmarks/results/explore.jsonl.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

from lord import Results, Subject, quiet

from rankfold import calibrate, find_sites
from rankfold.exploration import Bench, DesignSpace, choices, hypervolume, prices, starting_points
from rankfold.exploration.study import Done, finished, open_study, search
from rankfold.quality import next_token_score

TRIALS, SEEDS, LIMIT = 200, (0, 1, 2), 2.0
OBJECTIVES = ("quality", "bytes")
SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)
BUDGETS = (0.9, 0.8, 0.7, 0.6)


def bench_of(subject: Subject) -> Bench:
    """The model with what its trials share."""
    model = subject.load()
    sites = tuple(find_sites(model).select())
    statistics = calibrate(model, sites, subject.batches)
    losses = {"kfac": statistics.losses("kfac")}
    space = DesignSpace(sites=sites, choices=choices(["kfac"], SHARES))
    return Bench(model, space, statistics, losses, next_token_score(subject.held_out[:16], batch_size=16))


def values(bench: Bench, done: Sequence[Done]) -> dict[str, Any]:
    """Hypervolume, relative to the whole box, and the best of each budget."""
    points = [(trial.values["quality"], trial.values["bytes"]) for trial in done]
    box = (LIMIT, float(bench.dense_bytes) + 1)
    found: dict[str, Any] = {"hypervolume": hypervolume(points, box) / (box[0] * box[1]), "trials": len(done)}
    for budget in BUDGETS:
        inside = [quality for quality, stored in points if stored <= budget * bench.dense_bytes]
        found[f"within {budget:.0%}"] = min(inside, default=float("nan")) if inside else 99.0
    return found


def run(bench: Bench, strategy: str, seed: int) -> dict[str, Any]:
    """One search."""
    with tempfile.TemporaryDirectory() as folder:
        study = open_study(f"sqlite:///{folder}/study.db", "s", {"fingerprint": "", "model": ""}, OBJECTIVES)
        search(study, bench, TRIALS, strategy=strategy, seed=seed)
        return values(bench, finished(study, bench))


def knapsack(bench: Bench) -> dict[str, Any]:
    """The starting points alone."""
    done = []
    for number, (name, point, _) in enumerate(starting_points(bench.space, prices(bench.space, bench.losses))):
        trial = bench.measure(point, OBJECTIVES)
        done.append(Done(number, name, point, trial.plan, trial.values, trial.error))
    return values(bench, done)


def main() -> None:
    """Measure what is missing."""
    quiet()
    subject, results = Subject("pycode-llama"), Results("explore")
    bench = bench_of(subject)
    context = subject.context.also(trials=TRIALS, space=f"{bench.space.size:.3g} points")
    results.measure(subject.name, "starting points alone", context, lambda: knapsack(bench))
    for seed in SEEDS:
        for strategy in ("tpe", "random-policies", "random"):
            made = context.also(seed=seed, strategy=strategy)
            results.measure(subject.name, f"{strategy}, seed {seed}", made, lambda s=strategy, n=seed: run(bench, s, n))


if __name__ == "__main__":
    main()
