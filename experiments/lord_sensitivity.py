"""Which layers of a model of code bear low rank, and ranks chosen from it.

    python experiments/lord_sensitivity.py [MODEL ...]

For each bundled model: one kind of layer at a time, then one block at a time, LoRD at eighths of the full rank, as
`rankfold sensitivity` does it. Then LoRD of all layers in two factors at keep 0.9, 0.8 and 0.7, with ranks that are
uniform, at parity, shared out by the measured sensitivity of the kinds or of the blocks, or by the predicted loss of
every site. Results: benchmarks/results/lord_sensitivity*.jsonl; figures: docs/figures/sensitivity-*.svg.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from lord import MODELS, RESULTS, ROOT, Results, Subject, quiet

from rankfold import Plan, allocate, calibrate, factorize, find_sites
from rankfold.exploration.sensitivity import measured_losses, run_trials, sensitivity_trials
from rankfold.progress import no_stage
from rankfold.quality import Quality, next_token_score, paired_difference
from rankfold.record import Record
from rankfold.reports.figures import draw_points
from rankfold.sites import Sites

KEEPS = (0.9, 0.8, 0.7)


def study(subject: Subject, sites: Sites, by: str) -> list[Record]:
    """One study, and its figure."""
    here = subject.context.also(study=f"{subject.name}, by {by}", method="lord")
    records = run_trials(
        subject.dense, sites, sensitivity_trials(sites, by=by), subject.batches,
        next_token_score(subject.held_out, batch_size=32),
        file=RESULTS / f"lord_sensitivity-{subject.name}-{by}.jsonl", here=here, stage=no_stage,
    )  # fmt: skip
    points: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        if record.value is not None and record.value > 0:
            place = (100 * record.context["removed_of_model"], record.value)
            points.setdefault(record.context["group"], []).append(place)
    figure = ROOT / "docs" / "figures" / f"sensitivity-{subject.name}-{by}.svg"
    axes = ("parameters removed, % of the model", "rise of the loss, nat/token")
    draw_points(points, figure, title=f"{subject.name}, LoRD: one {by} at a time", axes=axes, lines=True)
    return records


def choices(subject: Subject, sites: Sites) -> tuple[dict[str, Callable[[float], Plan]], Any]:
    """Ways to choose ranks, each from keep to plan, and the statistics to carry plans out with."""
    statistics = calibrate(subject.dense, sites, subject.batches)
    plain = partial(allocate, sites, method="lord")
    shared = partial(plain, allocation="knapsack")
    kinds, blocks = (measured_losses(study(subject, sites, by), sites) for by in ("kind", "block"))
    predicted = statistics.losses("lord")
    return {
        "uniform": lambda keep: plain(keep=keep),
        "parity": lambda keep: plain(keep=keep, allocation="parity"),
        "measured sensitivity of kinds": lambda keep: shared(keep=keep, losses=kinds),
        "measured sensitivity of blocks": lambda keep: shared(keep=keep, losses=blocks),
        "predicted loss of every site": lambda keep: shared(keep=keep, losses=predicted),
    }, statistics


def row(subject: Subject, plan: Plan, statistics: Any, dense: Quality) -> dict[str, Any]:
    """What one plan costs."""
    model = subject.load()
    total = sum(site.parameters for site in find_sites(model).select())
    plan = factorize(model, plan, statistics)
    found = subject.quality(model)
    rise = paired_difference(found.window_losses, dense.window_losses)
    return {"rise": tuple(rise), "perplexity": found.perplexity, "stored": plan.parameters / total}


def main() -> None:
    """Measure what is missing."""
    quiet()
    results = Results("lord_sensitivity")
    for subject in map(Subject, sys.argv[1:] or MODELS):
        ways, statistics = choices(subject, find_sites(subject.dense).select())
        dense = subject.quality(subject.dense)
        for keep, (name, choose) in itertools.product(KEEPS, ways.items()):
            run = partial(row, subject, choose(keep), statistics, dense)
            results.measure(subject.name, f"keep {keep}: {name}", subject.context.also(keep=keep), run)


if __name__ == "__main__":
    main()
