"""One worker of a search, from the words of the command line to the finished trials, here or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rankfold.calibration import (
    calibrate,
    calibration_windows,
    default_length,
    load_corpus,
    make_batches,
    masked_batches,
    usual_loss,
)
from rankfold.checkpoint import load_model, load_tokenizer
from rankfold.circumstances import versions
from rankfold.errors import InputError
from rankfold.exploration.bench import Bench
from rankfold.exploration.space import DesignSpace, Losses, choices
from rankfold.exploration.study import Done, failures, finished, open_study, search
from rankfold.factorization import METHODS, SiteMoments
from rankfold.fingerprint import fingerprint
from rankfold.measurement import scorer_for
from rankfold.pipeline import RETRIES, connect, share_of_machine
from rankfold.progress import Stage, Step, no_step
from rankfold.sites import find_sites

BATCH = 8
"""Windows a batch."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Exploration:
    """Everything that a worker needs to know, as plain data that can be sent to it."""

    model: str
    study: str
    """Address of the database."""
    name: str
    """Name of the study in it."""
    objectives: tuple[str, ...] = ("quality", "bytes")
    trials: int = 200
    strategy: str = "tpe"
    methods: tuple[str, ...] = ("kfac",)
    ranks: tuple[float, ...] = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)
    """Ranks; below 1 shares of the full rank."""
    form: str | None = None
    sites: tuple[str, ...] = ()
    tied: bool = False
    one_choice: bool = False
    skip_first: int = 0
    skip_last: int = 0
    distance: int = 1
    calibration: str = "bundled:calibration"
    sequences: int = 64
    text: str = "bundled:python-held-out"
    labels: str | None = None
    windows: int = 64
    device: str = "cpu"
    dtype: str | None = None
    seed: int = 0


class Measured(NamedTuple):
    """What is measured of the dense model once, for all trials of all workers of a cluster."""

    statistics: Mapping[str, SiteMoments]
    losses: Losses


class Worker(NamedTuple):
    """A study and the model on which this process works on it."""

    study: Any
    bench: Bench
    settings: Exploration

    def run(self, on_step: Step = no_step) -> list[Done]:
        """Work until the study has its trials, whoever makes them; gives all of them."""
        settings = self.settings
        search(self.study, self.bench, settings.trials, strategy=settings.strategy, seed=settings.seed, on_step=on_step)
        return _all_of(self)


def _all_of(worker: Worker) -> list[Done]:
    """The finished trials; an error where there is none."""
    done = finished(worker.study, worker.bench)
    if not done:
        reasons = "; ".join(failures(worker.study)) or "none was measured"
        raise InputError(f"No trial of the study gave a result: {reasons}.")
    return done


def prepare(settings: Exploration, stage: Stage, measured: Measured | None = None) -> Worker:
    """Load the model, measure its inputs and gradients unless that was done elsewhere, and open the study.

    Raises:
        ValueError: If a setting makes no sense, or the study is one of something else.
    """
    dtype = None if settings.dtype is None else DTYPES[settings.dtype]
    model = load_model(settings.model, dtype=dtype, device=settings.device)
    tokenizer = load_tokenizer(settings.model)
    space = DesignSpace(
        sites=tuple(find_sites(model).select(settings.sites)),
        choices=choices(settings.methods, settings.ranks, settings.form),
        tied=settings.tied,
        one_choice=settings.one_choice,
        skip_first=settings.skip_first,
        skip_last=settings.skip_last,
        distance=settings.distance,
    )
    length = default_length(model.config)
    corpus = load_corpus(settings.calibration)
    found, _, facts = calibration_windows(
        model, tokenizer, corpus, sequences=settings.sequences, length=length, seed=settings.seed
    )
    score, data = scorer_for(
        model, tokenizer, text=settings.text, labels=settings.labels, length=length, windows=settings.windows
    )
    same = {k: v for k, v in asdict(settings).items() if k not in ("study", "name", "trials", "device", "model")}
    study = open_study(
        settings.study,
        settings.name,
        {
            "fingerprint": fingerprint(model, found, data.fingerprint, same),
            "model": Path(settings.model).name,
            "calibration": dict(facts),
            "data": data.name,
            "versions": versions(),
        },
        settings.objectives,
    )
    if measured is None:
        batches = make_batches(model, found, BATCH)
        if data.mask_token is not None:
            batches = masked_batches(batches, data.mask_token, tokenizer.all_special_ids, settings.seed)
        measured = _measure(model, space, batches, settings.seed, stage)
    return Worker(study, Bench(model, space, measured.statistics, measured.losses, score), settings)


def _measure(
    model: Any, space: DesignSpace, batches: Sequence[Mapping[str, Tensor]], seed: int, stage: Stage
) -> Measured:
    passes = len(space.blocks) + 1
    advance = stage("measuring inputs and gradients", 2 * passes * len(batches))
    statistics = calibrate(model, space.sites, batches, loss=usual_loss(model, batches, seed), on_step=advance)
    methods = {choice.method for choice in space.choices}
    advance = stage("predicting losses", len(methods))
    losses = {}
    for method in METHODS:
        if method in methods:
            losses[method] = statistics.losses(method)
            advance()
    # Without the model, since they are sent to other workers.
    return Measured(dict(statistics), losses)


def run_on_ray(settings: Exploration, workers: int, address: str | None, stage: Stage) -> list[Done]:
    """Work on a study with several workers of a Ray cluster, and give all of its trials.

    Args:
        settings: What to do; the model, the texts and the database must be found from every machine.
        workers: Workers, each with a model of its own and one processor or accelerator.
        address: Address of a running cluster, `auto` for the one of this machine; without it one is started here.
        stage: Opens a stage of work, for progress bars.

    Raises:
        ValueError: If Ray is missing, the cluster cannot hold the workers, or a worker cannot reach the database.
    """
    # The study is made, and whatever is wrong with the settings said, before anything is started. Workers run in
    # folders of their own, so paths become absolute.
    settings = _absolute(settings)
    worker = prepare(settings, stage)
    ray = connect(address, workers, settings.device)
    machines = {node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
    if len(machines) > 1 and settings.study.startswith("sqlite"):
        raise InputError(
            f"Workers on {len(machines)} machines cannot share a SQLite file: give `study` a PostgreSQL database."
        )
    task = ray.remote(**share_of_machine(settings.device), max_retries=RETRIES, scheduling_strategy="SPREAD")(_work)
    measured = ray.put(Measured(worker.bench.statistics, worker.bench.losses))
    running = [task.remote(settings, number, measured) for number in range(workers)]
    advance, seen = stage("trials", settings.trials), 0
    while running:
        ready, running = ray.wait(running, num_returns=len(running), timeout=1.0)
        try:
            ray.get(ready)
        except ray.exceptions.RayTaskError as error:
            raise InputError(f"A worker failed: {error.cause}") from error
        done = finished(worker.study, worker.bench)
        for _ in range(len(done) - seen):
            advance()
        seen = len(done)
    return _all_of(worker)


def _absolute(settings: Exploration) -> Exploration:
    """The settings with the paths of what lies here made absolute."""
    own = asdict(settings)
    for name in ("model", "calibration", "text", "labels"):
        if own[name] is not None and Path(str(own[name])).exists():
            own[name] = str(Path(str(own[name])).resolve())
    file = settings.study.removeprefix("sqlite:///")
    if file != settings.study:
        own["study"] = f"sqlite:///{Path(file).resolve()}"
    return Exploration(**own)


def _work(settings: Exploration, number: int, measured: Measured) -> int:
    """What a worker of the cluster does: the number of trials when it stopped."""
    torch.set_num_threads(1)
    own = {**asdict(settings), "seed": settings.seed}
    made = prepare(Exploration(**own), lambda title, steps: lambda: None, measured)
    # Workers draw on from different seeds, though they begin with as many trials.
    made = made._replace(settings=Exploration(**{**own, "seed": settings.seed + 17 * (number + 1)}))
    return len(made.run())
