"""What a compression did: a table by kind of site, its notes and totals, and the records."""

from __future__ import annotations

import resource
import sys
from collections import Counter
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


def _in_ranks(kind: str, pairs: list[Any]) -> list[str]:
    """A row of a kind of site whose rank alone was chosen."""
    dense = sum(option.form == DENSE for _, option in pairs)
    drawn = [option.shrinkage for _, option in pairs if option.shrinkage is not None]
    shrinkage = f"{min(drawn):.0e}..{max(drawn):.0e}" if drawn else "-"
    return [*_ranks(kind, pairs), str(dense), shrinkage]


def _in_bits(kind: str, pairs: list[Any]) -> list[str]:
    """A row of a kind of site whose bits were chosen too."""
    counts = Counter(option.described for _, option in pairs).most_common()
    return [*_ranks(kind, pairs), ", ".join(f"{count} x {what}" for what, count in counts)]


def _ranks(kind: str, pairs: list[Any]) -> list[str]:
    ranks = sorted({option.ranks[0] for _, option in pairs if option.form != DENSE})
    shown = f"{ranks[0]}..{ranks[-1]}" if len(ranks) > 1 else "".join(map(str, ranks)) or "-"
    full = min(pairs[0][0].out_features, pairs[0][0].in_features)
    return [kind, str(len(pairs)), str(full), shown]


def _say_bits(plan: Plan, sites: Sites) -> None:
    """What is stored for a weight, and what the same bits everywhere would store and cost."""
    weights = sum(site.out_features * site.in_features for site in sites)
    say(f"Sites: {plan.bytes:,} bytes, {8 * plan.bytes / weights:.2f} bits a weight, everything counted")
    few = plan.calibration.get("embeddings")
    if few:
        say(
            f"Embeddings and head: {few['dense_bytes']:,} -> {few['bytes']:,} bytes, in {few['bits']} bits; alone they "
            f"move predictions by {few['divergence']:.4f} nat/token"
        )
    uniform = plan.calibration.get("uniform", ())
    rows = []
    for row in sorted(uniform, key=lambda row: -row["bits"]):
        size, loss = row["bytes"], row["loss"]
        rows.append([f"{row['bits']} bits everywhere", f"{size:,.0f}", f"{8 * size / weights:.2f}", f"{loss:.4f}"])
    loss = "-" if plan.predicted_loss is None else f"{plan.predicted_loss:.4f}"
    rows.append(["this plan", f"{plan.bytes:,}", f"{8 * plan.bytes / weights:.2f}", loss])
    print_table("What else the sites could be", ["", "bytes", "bits a weight", "predicted increase"], rows)


def report_plan(output: Path, model: Any, plan: Plan, sites: Sites, before: int, seconds: float) -> None:
    """Table by kind, notes, and the records of a compression."""
    after = parameter_count(model)
    kinds: dict[str, list[Any]] = {}
    option_of = {name: option for option in plan.options for name in option.sites}
    for site in sites:
        kinds.setdefault(site.kind, []).append((site, option_of[site.name]))
    shares_bits = any(option.bits or option.factor_bits for option in plan.options)
    rows = [_in_bits(kind, pairs) if shares_bits else _in_ranks(kind, pairs) for kind, pairs in kinds.items()]
    header = ["kind", "sites", "full rank", "rank", *(["becomes"] if shares_bits else ["left dense", "shrinkage"])]
    print_table(f"{plan.method}, {plan.allocation}", header, rows)
    for note in sorted({option.note for option in plan.options if option.note}):
        say(f"left dense: {note}")
    if plan.predicted_loss is not None:
        bound = ""
        if plan.bound is not None and shares_bits:
            # The choice is priced again once its layers are made, so the price may lie below what bounded the choice.
            bound = f"; when it was chosen, nothing within this budget was predicted below {plan.bound:.4f}"
        elif plan.bound is not None:
            bound = f"; no ranks within this budget are predicted below {plan.bound:.4f}"
        say(f"Predicted increase in loss: {plan.predicted_loss:.4f} nat/token{bound}")
    if "measured_increase" in plan.calibration:
        say(f"Measured increase on held-out text: {plan.calibration['measured_increase']:.4f} nat/token")
    if "measured_speedup" in plan.calibration:
        facts = plan.calibration
        say(
            f"Speed of {facts['speed_of']}: {facts['measured_speedup']:.2f} times the dense model's, timed before and "
            f"after; {facts['speedup']:.2f} were asked for"
        )
    if shares_bits:
        _say_bits(plan, sites)
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
