"""`rankfold explore`: the design space searched for the best trade of quality against what a model costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rankfold.calibration import load_corpus
from rankfold.circumstances import circumstances
from rankfold.cli.options import DTYPES, Device, Dtype, Model, Records, Seed, SiteNames
from rankfold.cli.terminal import check_records, print_table, say, stages, write_records
from rankfold.errors import InputError
from rankfold.exploration import OBJECTIVES, front
from rankfold.factorization import METHODS
from rankfold.reports.figures import check_figure, draw_points

SHOWN = 20
"""Rows of the table: the best trials, evenly along the front."""


def _option(help: str, panel: str, **settings: Any) -> Any:
    return typer.Option(help=help, rich_help_panel=panel, **settings)


def explore(
    model: Model,
    objective: Annotated[
        list[str] | None,
        typer.Option(help=f"What to minimize: {', '.join(OBJECTIVES)}; repeat it (default: quality, bytes)."),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Total trials of the study, over all workers and restarts.")] = 200,
    plans: Annotated[Path | None, typer.Option(help="Folder for the plans on the front, one JSON file each.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Plot the trials to this .png or .svg.")] = None,
    sites: SiteNames = None,
    method: Annotated[
        list[str] | None, _option(f"How to factorize: {', '.join(METHODS)}; repeat it (default: kfac).", "Space")
    ] = None,
    rank: Annotated[
        list[float] | None,
        _option("A rank, or below 1 a share of the full rank; repeat it (default: eighths to 0.75).", "Space"),
    ] = None,
    tied: Annotated[
        bool, _option("Use one subset of tensor kinds and one rank for all chosen blocks, as in the paper.", "Space")
    ] = False,
    one_rank: Annotated[bool, _option("Use one rank for all chosen sites.", "Space")] = False,
    skip_first: Annotated[int, _option("Number of first blocks to leave dense.", "Space", min=0)] = 0,
    skip_last: Annotated[int, _option("Number of last blocks to leave dense.", "Space", min=0)] = 0,
    distance: Annotated[int, _option("Minimum distance between decomposed blocks.", "Space", min=1)] = 1,
    study: Annotated[
        str | None,
        _option(
            "Database of the study: sqlite:///file.db or postgresql://user@host/name (default: a file here).", "Workers"
        ),
    ] = None,
    name: Annotated[
        str | None, _option("Name of the study in the database (default: that of the model).", "Workers")
    ] = None,
    workers: Annotated[int, _option("Workers on a Ray cluster (0: work in this process).", "Workers", min=0)] = 0,
    ray: Annotated[
        str | None, _option("Address of the cluster, auto for this machine's (default: start one).", "Workers")
    ] = None,
    calibration: Annotated[
        str, _option("Text to calibrate on: a text or JSONL file, or a data set name.", "Text")
    ] = "bundled:calibration",
    sequences: Annotated[int, _option("Sequences of the calibration text.", "Text", min=1)] = 64,
    text: Annotated[str, _option("Held-out text to measure quality on.", "Text")] = "bundled:python-held-out",
    labels: Annotated[
        Path | None, _option("JSONL with sentence and label: measure quality by a classifier's errors.", "Text")
    ] = None,
    windows: Annotated[int, _option("Maximum windows of held-out text.", "Text", min=2)] = 64,
    output: Records = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
) -> None:
    """Search the design space from the knapsack's plans and the paper's rules; an interrupted search resumes."""
    from rankfold.exploration.explore import Exploration, prepare, run_on_ray
    from rankfold.exploration.study import shown, trial_records

    check_records(output)
    if plot:
        check_figure(plot)
        if objective and len(objective) < 2:
            raise InputError("A plot needs two objectives: repeat --objective, or omit --plot.")
    if dtype not in DTYPES:
        raise InputError(f"--dtype must be one of {', '.join(DTYPES)}, but got {dtype!r}.")
    named = name or Path(model).name
    settings = Exploration(
        model=model,
        study=study or f"sqlite:///{named}-explore.db",
        name=named,
        objectives=tuple(objective or ("quality", "bytes")),
        trials=trials,
        methods=tuple(method or ("kfac",)),
        ranks=tuple(rank or Exploration.ranks),
        sites=tuple(sites or ()),
        tied=tied,
        one_choice=one_rank,
        skip_first=skip_first,
        skip_last=skip_last,
        distance=distance,
        calibration=calibration,
        sequences=sequences,
        text=text,
        labels=None if labels is None else str(labels),
        windows=windows,
        device=device,
        dtype=None if dtype == "auto" else dtype,
        seed=seed,
    )
    measured_on = None
    with stages() as stage:
        if workers:
            done = run_on_ray(settings, workers, ray, stage)
        else:
            worker = prepare(settings, stage)
            say(f"The space has {worker.bench.space.size:.3g} points; the study is stored in {shown(settings.study)}.")
            done = worker.run(stage("trials of this worker", trials))
            measured_on = worker.bench.model
    best = [done[number] for number in front([list(trial.values.values()) for trial in done])]
    best.sort(key=lambda trial: list(trial.values.values())[-1], reverse=True)
    _print_front(model, best, done)
    if plans:
        plans.mkdir(parents=True, exist_ok=True)
        for trial in best:
            (plans / f"trial-{trial.number}.json").write_text(trial.plan.to_json() + "\n")
        say(f"{len(best)} plans in {plans}: apply one with rankfold compress MODEL OUTPUT --plan {plans}/trial-N.json")
    if plot:
        _draw(plot, model, best, done, settings.objectives)
    here = circumstances(
        measured_on or model,
        data=load_corpus(text),
        study=f"{shown(settings.study)} {named}",
        space=settings.ranks,
        seed=seed,
    )
    chosen = {trial.number for trial in best}
    records = trial_records(done, here)
    write_records([_marked(record, chosen) for record in records], output)


def _marked(record: Any, chosen: set[int]) -> Any:
    from dataclasses import replace

    return replace(record, context={**record.context, "on_front": record.context["trial"] in chosen})


def _print_front(model: str, best: list[Any], done: list[Any]) -> None:
    """The front, thinned out evenly."""
    step = max(1, len(best) / SHOWN)
    shown = [best[int(number * step)] for number in range(int(len(best) / step))]
    names = list(done[0].values)
    rows = []
    for trial in shown:
        values = [_written(name, trial) for name in names]
        rows.append([str(trial.number), trial.start or "search", *values, str(len(trial.plan.factorized))])
    title = f"{Path(model).name}: {len(best)} of {len(done)} trials are Pareto-optimal"
    print_table(title, ["trial", "from", *names, "sites decomposed"], rows)


def _written(name: str, trial: Any) -> str:
    value = trial.values[name]
    if name == "quality":
        return f"{value:+.4f} ± {trial.error:.4f}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3f}"


def _draw(plot: Path, model: str, best: list[Any], done: list[Any], objectives: tuple[str, ...]) -> None:
    """The trials in the plane of the first two objectives."""
    x, y = (objectives[1], objectives[0])
    groups = {
        "front": best,
        "starting points": [trial for trial in done if trial.start],
        "search": [trial for trial in done if not trial.start],
    }
    series = {
        name: [(t.values[x], t.values[y]) for t in trials if t.values[x] > 0 and t.values[y] > 0]
        for name, trials in groups.items()
    }
    axes = (f"{x}: {OBJECTIVES[x].about}", f"{y}: {OBJECTIVES[y].about}, {OBJECTIVES[y].unit}")
    draw_points(
        {k: v for k, v in series.items() if v}, plot, title=f"{Path(model).name}: {len(done)} trials", axes=axes
    )
    say(f"Trials plotted to {plot}")
