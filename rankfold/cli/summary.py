"""What a compression did: a table by kind of site, its notes and totals, and the records."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

from rankfold.circumstances import circumstances
from rankfold.cli.terminal import print_table, say, write_records
from rankfold.cost import parameter_count
from rankfold.plan import DENSE, Plan
from rankfold.sites import Sites


def skipped_rows(sites: Sites) -> list[list[str]]:
    """Rows of a table: what is not factorized, and why."""
    return [[s.name, " x ".join(map(str, s.shape)), s.reason] for s in sites.skipped]


def report_plan(output: Path, model: Any, plan: Plan, sites: Sites, before: int, seconds: float) -> None:
    """Table by kind, notes, and the records of a compression."""
    after = parameter_count(model)
    kinds: dict[str, list[Any]] = {}
    option_of = {name: option for option in plan.options for name in option.sites}
    for site in sites:
        kinds.setdefault(site.kind, []).append((site, option_of[site.name]))
    rows = []
    for kind, pairs in kinds.items():
        ranks = sorted({option.ranks[0] for _, option in pairs if option.form != DENSE})
        shown = f"{ranks[0]}..{ranks[-1]}" if len(ranks) > 1 else "".join(map(str, ranks)) or "dense"
        full = min(pairs[0][0].out_features, pairs[0][0].in_features)
        dense = sum(option.form == DENSE for _, option in pairs)
        drawn = [option.shrinkage for _, option in pairs if option.shrinkage is not None]
        shrinkage = f"{min(drawn):.0e}..{max(drawn):.0e}" if drawn else "-"
        rows.append([kind, str(len(pairs)), str(full), shown, str(dense), shrinkage])
    header = ["kind", "sites", "full rank", "rank", "left dense", "shrinkage"]
    print_table(f"{plan.method}, {plan.allocation}", header, rows)
    for note in sorted({option.note for option in plan.options if option.note}):
        say(f"left dense: {note}")
    if plan.predicted_loss is not None:
        bound = "" if plan.bound is None else f"; no ranks within this budget are predicted below {plan.bound:.4f}"
        say(f"Predicted increase in loss: {plan.predicted_loss:.4f} nat/token{bound}")
    if "measured_increase" in plan.calibration:
        say(f"Measured increase on held-out text: {plan.calibration['measured_increase']:.4f} nat/token")
    total = sum(site.parameters for site in sites)
    say(f"Sites: {total:,} -> {plan.parameters:,} parameters ({plan.parameters / total:.1%} kept)")
    say(f"Model: {before:,} -> {after:,} parameters ({after / before:.1%} kept)")
    say(f"Checkpoint: {output}   ({seconds:.1f} s)\nNext: rankfold measure {output} --dense MODEL --text TEXT")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    asked = {"method": plan.method, "allocation": plan.allocation, "keep": plan.keep, "rank": plan.rank}
    here = circumstances(
        model,
        data=plan.calibration.get("corpus"),
        data_sha256=plan.calibration.get("sha256"),
        seed=plan.seed,
        **asked,
    )
    values = [
        ("site_parameters", plan.parameters, "1"),
        ("parameters", after, "1"),
        ("dense_parameters", before, "1"),
        ("compression_time", seconds, "second"),
        ("peak_memory", peak, "byte"),
    ]
    write_records([here.record(output.name, *row) for row in values], output=None)
