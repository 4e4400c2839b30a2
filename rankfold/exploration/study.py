"""A search that many workers share: its trials lie in a database, and none is lost or done twice."""

from __future__ import annotations

import math
import os
import platform
import random
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rankfold.circumstances import Circumstances
from rankfold.errors import InputError
from rankfold.exploration.bench import OBJECTIVES, Bench, Trial
from rankfold.exploration.policy import KEEPS, Policy, Prices, point_of, prices, starting_points
from rankfold.exploration.space import Point
from rankfold.plan import Plan
from rankfold.progress import Step, no_step
from rankfold.record import Record

try:
    import optuna
except ImportError as error:
    raise InputError("A search needs Optuna: pip install 'rankfold[explore]'") from error

# Heartbeats are called experimental since version 2.9, at every call.
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)

STUDY_VERSION = 1
"""Version of what a study stores; a reader refuses a newer one instead of guessing."""

STRATEGIES = ("tpe", "random-policies", "random")
"""Policies proposed by TPE (Bergstra et al. 2011), policies drawn, or points drawn."""

HEARTBEAT, GRACE = 5, 20
"""Seconds between a worker's signs of life, and without one until its trial is given to another."""

STARTUP = 60
"""Trials before TPE proposes: the starting points, then policies drawn at random, or it never leaves the former."""

WEIGHT = 1.5
"""Greatest power of two by which a policy corrects predicted losses."""


class Done(NamedTuple):
    """A finished trial."""

    number: int
    start: str
    """Name of the starting point, empty for what the search proposed."""
    point: Point
    plan: Plan
    values: dict[str, float]
    error: float


def open_study(url: str, name: str, facts: Mapping[str, Any], objectives: Sequence[str]) -> optuna.Study:
    """The study of this name in a database, made if it is not there.

    Args:
        url: A database: `sqlite:///file.db`, or `postgresql://user:password@host/database`.
        name: Name of the study in it.
        facts: What every trial of the study depends on, with a `fingerprint` that tells it from others.
        objectives: Keys of `OBJECTIVES`.

    Raises:
        ValueError: If an objective is unknown, the database cannot be reached, or it holds a study of this name of
            something else or of a newer rankfold.
    """
    unknown = [objective for objective in objectives if objective not in OBJECTIVES]
    if unknown or not objectives or len(set(objectives)) < len(objectives):
        raise InputError(f"A search needs different objectives of {', '.join(OBJECTIVES)}, but got {list(objectives)}.")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = _storage(url)
    study = optuna.create_study(
        storage=storage, study_name=name, directions=["minimize"] * len(objectives), load_if_exists=True
    )
    stored = study.user_attrs
    if "study_version" not in stored:
        for key, value in {**facts, "objectives": list(objectives), "study_version": STUDY_VERSION}.items():
            study.set_user_attr(key, value)
        return study
    if stored["study_version"] > STUDY_VERSION:
        raise InputError(
            f"{shown(url)}: the study {name!r} was made by a newer rankfold (study version {stored['study_version']}, "
            f"while this one reads up to {STUDY_VERSION}). Install it: pip install --upgrade rankfold"
        )
    if stored.get("fingerprint") != facts["fingerprint"] or stored.get("objectives") != list(objectives):
        raise InputError(
            f"{shown(url)}: the study {name!r} belongs to another model, text, space or objectives "
            f"({stored.get('model', 'unknown model')}, {', '.join(stored.get('objectives', []))}). Give this one "
            "another `name`, or another `study`."
        )
    return study


def _storage(url: str) -> optuna.storages.RDBStorage:
    from sqlalchemy.exc import ArgumentError, DatabaseError, NoSuchModuleError, OperationalError

    # PostgreSQL's driver is the one of the extra; a busy SQLite file is waited for.
    address = url.replace("postgresql://", "postgresql+psycopg://", 1).replace(
        "postgres://", "postgresql+psycopg://", 1
    )
    waiting = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    try:
        return optuna.storages.RDBStorage(
            address,
            engine_kwargs=waiting,
            heartbeat_interval=HEARTBEAT,
            grace_period=GRACE,
            heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=3),
        )
    except ImportError as error:
        raise InputError(f"{shown(url)}: its driver is missing: pip install 'rankfold[postgres]'") from error
    except (ArgumentError, NoSuchModuleError) as error:
        raise InputError(
            f"{shown(url)}: a study is stored in a database such as sqlite:///study.db or postgresql://user@host/name."
        ) from error
    except OperationalError as error:
        raise InputError(
            f"{shown(url)}: the database cannot be reached ({str(error.orig).strip().splitlines()[0]}). Start it, or "
            "correct the address."
        ) from error
    except DatabaseError as error:
        raise InputError(
            f"{shown(url)}: not a database ({str(error.orig).strip().splitlines()[0]}). Name a file that rankfold "
            "explore made, or one that does not exist yet."
        ) from error


def shown(url: str) -> str:
    """An address without what is secret in it: its password, and its query."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url).set(query={}).render_as_string(hide_password=True)
    except ArgumentError:
        return url


def search(
    study: optuna.Study,
    bench: Bench,
    trials: int,
    *,
    strategy: str = "tpe",
    seed: int = 0,
    on_step: Step = no_step,
) -> None:
    """Work on a study until it has so many trials, together with whoever else works on it.

    A worker that dies leaves its trial to be done again by another; a point that was tried already is not measured
    again. The first trials are the starting points (`policy.starting_points`). A point at which the model gives no
    finite numbers is a trial that failed, with the reason, and counts.

    Args:
        study: From `open_study`.
        bench: The model.
        trials: Finished trials at which the study ends.
        strategy: One of `STRATEGIES`; only `tpe` begins with the starting points.
        seed: Seed of the strategy; every worker and every restart draws on from the trials that are there.
        on_step: Called after each trial of this worker.

    Raises:
        ValueError: If the strategy is unknown.
    """
    if strategy not in STRATEGIES:
        raise InputError(f"A strategy is one of {', '.join(STRATEGIES)}, but got {strategy!r}.")
    work = _Work(study, bench, trials, strategy, seed + 1000 * len(study.trials))
    silent: dict[int, float] = {}
    while True:
        optuna.storages.fail_stale_trials(study)
        _bury(study, silent)
        known = study.get_trials(deepcopy=False)
        if sum(map(_is_done, known)) >= trials:
            return
        waiting = any(trial.state == optuna.trial.TrialState.WAITING for trial in known)
        if not waiting and sum(map(_is_taken, known)) >= trials:
            # The rest is with other workers, of which one may have died.
            time.sleep(0.5)
            continue
        study.optimize(work, n_trials=1, catch=(_SuperfluousError, _FailedTrialError))
        on_step()


def _is_done(trial: Any) -> bool:
    """Whether a trial counts: it gave numbers, or the model gave none at its point."""
    return trial.state == optuna.trial.TrialState.COMPLETE or "failed" in trial.user_attrs


def _is_taken(trial: Any) -> bool:
    return _is_done(trial) or trial.state == optuna.trial.TrialState.RUNNING


class _SuperfluousError(Exception):
    """Several workers asked for the last trial."""


class _FailedTrialError(Exception):
    """The model gives no finite numbers at a point."""


def _bury(study: optuna.Study, silent: dict[int, float]) -> None:
    """Give up trials whose worker was killed before its first sign of life; the others Optuna finds by itself.

    Args:
        study: The study.
        silent: When this process first saw a trial without a point, by its own clock: those of machines differ.
    """
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        if "point" in trial.user_attrs:
            continue
        if time.monotonic() - silent.setdefault(trial.number, time.monotonic()) > GRACE:
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)


class _Work:
    """What one worker does with a trial: choose its point, and measure it unless that was done."""

    def __init__(self, study: optuna.Study, bench: Bench, trials: int, strategy: str, seed: int) -> None:
        self.study, self.bench, self.trials, self.strategy = study, bench, trials, strategy
        self.objectives = tuple(study.user_attrs["objectives"])
        self.table = prices(bench.space, bench.losses)
        self.starts = list(starting_points(bench.space, self.table)) if strategy == "tpe" else []
        self.rng = random.Random(seed)
        policies = [policy for *_, policy in self.starts]
        study.sampler = _Sampler(_distributions(bench, self.table), policies, strategy, seed)

    def __call__(self, trial: optuna.Trial) -> tuple[float, ...]:
        """The objectives at the trial's point."""
        known = self.study.get_trials(deepcopy=False)
        if sum(_is_taken(other) for other in known if other.number < trial.number) >= self.trials:
            raise _SuperfluousError
        # A trial that is done again for a dead worker has its point already.
        point = tuple(trial.user_attrs.get("point", ())) or self._choose(trial, known)
        earlier = next((o for o in known if o.values and tuple(o.user_attrs["point"]) == point), None)
        if earlier is not None:
            trial.set_user_attr("same_as", earlier.number)
            trial.set_user_attr("error", earlier.user_attrs["error"])
            return tuple(earlier.values)
        try:
            found: Trial = self.bench.measure(point, self.objectives)
        except ValueError as error:
            trial.set_user_attr("failed", str(error)[:500])
            raise _FailedTrialError from error
        trial.set_user_attr("error", found.error)
        return tuple(float(found.values[name]) for name in self.objectives)

    def _choose(self, trial: optuna.Trial, known: Sequence[Any]) -> Point:
        start, point = self._start(trial.number, known)
        if not start:
            point = self._proposed(trial)
        elif trial.number < len(self.starts) and self.starts[trial.number][2] is not None:
            # The sampler gives the numbers of this start, from which the search learns.
            self._drawn(trial)
        # The point last: with it the trial can be done again.
        for key, value in (("start", start), ("worker", f"{platform.node()}:{os.getpid()}"), ("point", point)):
            trial.set_user_attr(key, value)
        return point

    def _start(self, number: int, known: Sequence[Any]) -> tuple[str, Point]:
        """The starting point of this number, or one whose trial died before it had begun."""
        if number < len(self.starts):
            return self.starts[number][:2]
        alive = [other for other in known if _is_taken(other)]
        claimed = {other.user_attrs.get("start") for other in alive}
        claimed |= {self.starts[other.number][0] for other in alive if other.number < len(self.starts)}
        return next(((name, point) for name, point, _ in self.starts if name not in claimed), ("", ()))

    def _proposed(self, trial: optuna.Trial) -> Point:
        space = self.bench.space
        if self.strategy == "random":
            return space.sample(self.rng)
        return point_of(space, self.table, _policy(self._drawn(trial)))

    def _drawn(self, trial: optuna.Trial) -> dict[str, float]:
        ranges = _distributions(self.bench, self.table)
        return {name: trial.suggest_float(name, d.low, d.high) for name, d in ranges.items()}


def _distributions(bench: Bench, table: Prices) -> dict[str, optuna.distributions.FloatDistribution]:
    """The numbers that make a policy."""
    weight = optuna.distributions.FloatDistribution(-WEIGHT, WEIGHT)
    kinds = bench.space.kinds if len(bench.space.kinds) > 1 else ()
    names = [*(f"kind {kind}" for kind in kinds), "slope", "bend"]
    usable = np.where(np.isinf(table.losses), np.inf, table.costs)
    least = math.ceil(100 * usable.min(1).sum() / table.costs[:, 0].sum()) / 100
    return {
        "keep": optuna.distributions.FloatDistribution(min(max(least, KEEPS[-1]), 0.95), 1.0),
        **dict.fromkeys(names, weight),
    }


def _policy(drawn: Mapping[str, float]) -> Policy:
    kinds = {name.removeprefix("kind "): value for name, value in drawn.items() if name.startswith("kind ")}
    return Policy(drawn["keep"], kinds, drawn["slope"], drawn["bend"])


class _Sampler(optuna.samplers.BaseSampler):
    """Starting points first, by the number of the trial, so that workers share them without talking."""

    def __init__(
        self, distributions: Mapping[str, Any], starts: Sequence[Policy | None], strategy: str, seed: int
    ) -> None:
        self._distributions = distributions
        self._starts = starts
        self._inner: optuna.samplers.BaseSampler = (
            optuna.samplers.TPESampler(multivariate=True, n_startup_trials=STARTUP, seed=seed)
            if strategy == "tpe"
            else optuna.samplers.RandomSampler(seed=seed)
        )
        self._policies = strategy != "random"

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        start = self._starts[trial.number] if trial.number < len(self._starts) else True
        return dict(self._distributions) if self._policies and start is not None else {}

    def sample_relative(self, study: Any, trial: Any, search_space: dict[str, Any]) -> dict[str, Any]:
        start = self._starts[trial.number] if trial.number < len(self._starts) else None
        if start is None:
            if isinstance(self._inner, optuna.samplers.TPESampler):
                return dict(self._inner.sample_relative(study, trial, search_space))
            return {name: self.sample_independent(study, trial, name, d) for name, d in search_space.items()}
        plain = dict.fromkeys(self._distributions, 0.0)
        keep = self._distributions["keep"]
        kinds = {f"kind {kind}": power for kind, power in start.kinds.items() if f"kind {kind}" in plain}
        return {**plain, "keep": min(max(start.keep, keep.low), keep.high), **kinds}

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        return self._inner.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
        self._inner.after_trial(study, trial, state, values)


def failures(study: optuna.Study) -> list[str]:
    """Why trials failed, each reason once."""
    return list(
        dict.fromkeys(t.user_attrs["failed"] for t in study.get_trials(deepcopy=False) if "failed" in t.user_attrs)
    )


def finished(study: optuna.Study, bench: Bench) -> list[Done]:
    """The finished trials, in the order in which they began."""
    objectives = study.user_attrs["objectives"]
    return [
        Done(
            trial.number,
            trial.user_attrs.get("start", ""),
            tuple(trial.user_attrs["point"]),
            bench.space.plan(tuple(trial.user_attrs["point"]), bench.losses),
            dict(zip(objectives, trial.values, strict=True)),
            trial.user_attrs["error"],
        )
        for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    ]


def trial_records(done: Sequence[Done], here: Circumstances) -> list[Record]:
    """A record of every objective of every trial."""
    records = []
    for trial in done:
        facts = {"trial": trial.number, "start": trial.start, "predicted_loss": trial.plan.predicted_loss}
        for name, value in trial.values.items():
            error = trial.error if name == "quality" else None
            unit = OBJECTIVES[name].unit
            records.append(here.record(f"trial {trial.number}", name, value, unit, error, **facts))
    return records
