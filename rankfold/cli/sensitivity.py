"""`rankfold sensitivity`: what a rank costs in each kind of layer, or in each block."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from rankfold.allocation import break_even_rank
from rankfold.calibration import calibration_windows, default_length, load_corpus, make_batches, masked_batches
from rankfold.checkpoint import chosen_device, load_model, load_tokenizer
from rankfold.circumstances import circumstances
from rankfold.cli.options import Device, Dtype, Model, Seed, SiteNames, to_dtype
from rankfold.cli.terminal import print_table, say, stages, write_records
from rankfold.cost import open_meter, relative_cost
from rankfold.errors import InputError
from rankfold.exploration.sensitivity import SHARES, STUDIES, run_trials, sensitivity_trials
from rankfold.factorization import METHODS
from rankfold.fingerprint import fingerprint
from rankfold.measurement import scorer_for
from rankfold.record import Record
from rankfold.reports.figures import check_figure, draw_points
from rankfold.sites import Sites, find_sites

BATCH = 8
"""Windows a batch."""


def sensitivity(
    model: Model,
    records: Annotated[Path, typer.Argument(help="File of the study's records; an interrupted study resumes from it.")],
    by: Annotated[str, typer.Option(help=f"What is factorized together: {', '.join(STUDIES)}.")] = "kind",
    method: Annotated[str, typer.Option(help=f"How to factorize: {', '.join(METHODS)}.")] = "lord",
    share: Annotated[
        list[float] | None, typer.Option(help="Share of the full rank, 0 for rank 1; repeat it (default: eighths).")
    ] = None,
    sites: SiteNames = None,
    plot: Annotated[Path | None, typer.Option(help="Plot the study to this .png or .svg.")] = None,
    calibration: Annotated[
        str,
        typer.Option(rich_help_panel="Text", help="Text to calibrate on: a text or JSONL file, or a data set name."),
    ] = "bundled:calibration",
    sequences: Annotated[
        int, typer.Option(rich_help_panel="Text", min=1, help="Sequences of the calibration text.")
    ] = 64,
    text: Annotated[
        str, typer.Option(rich_help_panel="Text", help="Held-out text to measure the loss on.")
    ] = "bundled:python-held-out",
    labels: Annotated[
        Path | None,
        typer.Option(rich_help_panel="Text", help="JSONL with sentence and label: measure a classifier's errors."),
    ] = None,
    windows: Annotated[int, typer.Option(rich_help_panel="Text", min=2, help="Maximum windows of held-out text.")] = 64,
    cost: Annotated[bool, typer.Option(help="Time every trial against the dense model, and measure energy.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
) -> None:
    """Factorize one kind of layer, one block or a set of spaced blocks at a time, at several ranks, and measure."""
    if plot:
        check_figure(plot)
    if records.is_dir():
        raise InputError(f"{records}: records go to a file, but this is a folder. Name a file, such as study.jsonl.")
    loaded, tokenizer = load_model(model, dtype=to_dtype(dtype), device=device, dense=True), load_tokenizer(model)
    chosen = find_sites(loaded).select(sites or ())
    trials = sensitivity_trials(chosen, method=method, by=by, shares=share or SHARES)
    length = default_length(loaded.config)
    corpus = load_corpus(calibration)
    found, _, facts = calibration_windows(loaded, tokenizer, corpus, sequences=sequences, length=length, seed=seed)
    score, data = scorer_for(loaded, tokenizer, text=text, labels=labels, length=length, windows=windows)
    batches = make_batches(loaded, found, BATCH)
    if data.mask_token is not None:
        batches = masked_batches(batches, data.mask_token, tokenizer.all_special_ids, seed)
    study = fingerprint(loaded, found, data.fingerprint, method, by, [site.name for site in chosen], cost)
    here = circumstances(
        loaded,
        study=study,
        data=data.name,
        data_sha256=fingerprint(data.fingerprint),
        method=method,
        by=by,
        calibration=dict(facts),
        seed=seed,
    )
    meter = open_meter(str(chosen_device(device)))
    with stages() as stage:
        results = run_trials(
            loaded, chosen, trials, batches, score, file=records, here=here, stage=stage,
            cost=partial(relative_cost, meter=meter) if cost else None,
        )  # fmt: skip
    _print_aspects(chosen)
    _print_study(model, results)
    if cost and meter.source == "unavailable":
        say(f"Energy was not counted: {meter.about}.")
    if plot:
        points: dict[str, list[tuple[float, float]]] = {}
        for record in results:
            if record.value is not None and record.value > 0:
                place = (100 * record.context["removed_of_model"], record.value)
                points.setdefault(record.context["group"], []).append(place)
        axes = ("parameters removed, % of the model", f"{results[0].name.replace('_', ' ')}, {results[0].unit}")
        draw_points(points, plot, title=f"{Path(model).name}, {method}: by {by}", axes=axes, lines=True)
        say(f"Study plotted to {plot}")
    say(f"Records: {records}")
    write_records(results, output=None)


def _print_aspects(sites: Sites) -> None:
    """What two factors ask of each shape before they save the first parameter."""
    rows = {}
    for site in sites:
        small, large = sorted((site.out_features, site.in_features))
        even = break_even_rank("low_rank", site, site.bias)
        shape = f"{site.out_features} x {site.in_features}"
        rows[site.kind] = [site.kind, shape, f"{small / large:.2f}", str(even), f"{1 - even / small:.0%}"]
    header = ["kind", "out x in", "aspect", "break-even rank", "rank to cut before it pays"]
    print_table("Aspect ratios", header, rows.values())


def _print_study(model: str, records: list[Record]) -> None:
    """A row for every trial, with times as fast as dense where they were measured."""
    rows = []
    name, unit = records[0].name.removesuffix("_rise"), records[0].unit
    timed = any("cost" in record.context for record in records)
    for record in records:
        facts = record.context
        ranks = sorted({facts["ranks"][0], facts["ranks"][-1]})
        rise = "no numbers" if record.value is None else f"{record.value:+.4f} ± {record.error:.4f}"
        removed = facts["removed_of_model"]
        price = f"{record.value / (100 * removed):.4f}" if removed > 0 and record.value is not None else "-"
        ratios = [facts.get("cost", {}).get(f"{phase}_ratio") for phase in ("prefill", "decode", "energy")]
        costs = ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios] if timed else []
        value = "-" if facts[name] is None else f"{facts[name]:.4g}"
        rows.append([facts["group"], "..".join(map(str, ranks)), value, rise, f"{removed:+.2%}", price, *costs])
    header = ["factorized", "rank", name, f"rise, {unit}", "removed of model", f"{unit} per % removed"]
    print_table(model, header + (["prefill", "decode", "energy"] if timed else []), rows)
