"""Studies: some sites at a time, a kind, a block or blocks apart, are factorized to one rank after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from rankfold.allocation import factorized_option
from rankfold.calibration import calibrate
from rankfold.circumstances import Circumstances
from rankfold.compression import factorize, restore, with_layers
from rankfold.errors import InputError
from rankfold.factorization import METHODS
from rankfold.modules import linear_at
from rankfold.plan import Option, Plan
from rankfold.progress import Stage
from rankfold.quality import Score, Scorer, paired_difference
from rankfold.record import Record, whole_lines
from rankfold.sites import Site, Sites

Cost = Callable[[Any, Any], Mapping[str, Any]]
"""What a compressed model costs beside the dense one, from both."""

SHARES = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)
"""Shares of the full rank that are tried."""

GROUPS: dict[str, Callable[[Site], str]] = {
    "kind": lambda site: site.kind,
    "block": lambda site: site.block or "outside of the blocks",
}
"""What is factorized together, one after the other."""

BLOCKS_APART = 3
"""Blocks that are factorized together when their distance is studied."""


def _grouped(key: Callable[[Site], str]) -> Callable[[Sequence[Site]], dict[str, list[Site]]]:
    def groups(sites: Sequence[Site]) -> dict[str, list[Site]]:
        found: dict[str, list[Site]] = {}
        for site in sites:
            found.setdefault(key(site), []).append(site)
        return found

    return groups


def _in_blocks(sites: Sequence[Site], chosen: Sequence[int]) -> list[Site]:
    blocks = list(dict.fromkeys(site.block for site in sites if site.block))
    names = {blocks[position] for position in chosen}
    return [site for site in sites if site.block in names]


def _apart(sites: Sequence[Site]) -> dict[str, list[Site]]:
    """Some blocks at every distance, in every place where they fit, so that where they lie can be told from how far."""
    count = len({site.block for site in sites if site.block})
    found = {}
    for distance in range(1, (count - 1) // (BLOCKS_APART - 1) + 1):
        for start in range(count - distance * (BLOCKS_APART - 1)):
            chosen = [start + distance * step for step in range(BLOCKS_APART)]
            found[f"{distance} apart: blocks {', '.join(map(str, chosen))}"] = _in_blocks(sites, chosen)
    return found


def _counted(sites: Sequence[Site]) -> dict[str, list[Site]]:
    """One block, two, and so on to all of them, spread over the depth as evenly as whole numbers allow."""
    count = len({site.block for site in sites if site.block})
    return {
        f"{chosen} of {count} blocks": _in_blocks(sites, [(2 * n + 1) * count // (2 * chosen) for n in range(chosen)])
        for chosen in range(1, count + 1)
    }


STUDIES: dict[str, Callable[[Sequence[Site]], dict[str, list[Site]]]] = {
    **{name: _grouped(key) for name, key in GROUPS.items()},
    "site": lambda sites: {site.name: [site] for site in sites},
    "ranks": lambda sites: {"all sites": list(sites)},
    "distance": _apart,
    "count": _counted,
}
"""The values of `rankfold sensitivity --by`: by name the groups of sites, each factorized alone."""


@dataclass(frozen=True)
class Trial:
    """One group of sites at one share of their full rank, everything else dense."""

    group: str
    share: float
    options: tuple[Option, ...]
    dense_parameters: int
    """Of the group's sites."""

    @property
    def removed(self) -> int:
        """Parameters that the model loses; negative where two factors are larger than the matrix."""
        return self.dense_parameters - sum(option.parameters for option in self.options)


def sensitivity_trials(
    sites: Sequence[Site], *, method: str = "lord", by: str = "kind", shares: Sequence[float] = SHARES
) -> list[Trial]:
    """Every group at every share of the full rank, those past the break-even rank too.

    Raises:
        ValueError: If the method or grouping is unknown, a share is out of range, or there are too few blocks.
    """
    if method not in METHODS or by not in STUDIES:
        raise InputError(
            f"A study needs a method of {', '.join(METHODS)} and groups by {' or '.join(STUDIES)}, but got {method!r} "
            f"and {by!r}."
        )
    if not all(0 <= share <= 1 for share in shares):
        raise InputError(f"Shares of the full rank lie in [0, 1], 0 being rank 1, but got {list(shares)}.")
    groups = STUDIES[by](sites)
    if not groups:
        raise InputError(f"The model has too few blocks to study {by}: choose another `by`.")
    return [
        Trial(name, share, tuple(_option(site, share, method) for site in group), sum(s.parameters for s in group))
        for name, group in groups.items()
        for share in sorted(shares, reverse=True)
    ]


def _option(site: Site, share: float, method: str) -> Option:
    chosen = METHODS[method]
    rank = max(1, round(share * min(site.out_features, site.in_features)))
    return replace(
        factorized_option(chosen.form, [site], rank, site.bias or chosen.adds_bias),
        method=method,
    )


def run_trials(  # noqa: PLR0913
    model: Any,
    sites: Sites,
    trials: Sequence[Trial],
    batches: Sequence[Mapping[str, Tensor]],
    score: Scorer,
    *,
    file: Path,
    here: Circumstances,
    stage: Stage,
    cost: Cost | None = None,
) -> list[Record]:
    """The rise of the score in every trial, written to `file` as it is found; what stands there is not measured again.

    Args:
        model: A model, which is left as it was.
        sites: Its sites.
        trials: From `sensitivity_trials`.
        batches: Calibration batches, measured once for all trials.
        score: What is scored, for example the next-token loss of held-out windows.
        file: Records of this study, one a line.
        here: What the study depends on, with a `study` that tells it from others.
        stage: Opens a stage of work, for progress bars.
        cost: Measures what the model of a trial costs beside the dense one, for the record's context.

    Raises:
        ValueError: If the file holds records of another study, or the dense model gives no finite numbers.
    """
    done = _read(file, str(here.facts["study"]))
    subject = str((here.facts.get("model") or {"name": "model"})["name"])
    missing = [trial for trial in trials if (trial.group, trial.share) not in done]
    if not missing:
        return [done[trial.group, trial.share] for trial in trials]
    method = METHODS[missing[0].options[0].method]
    statistics: Mapping[str, Any] = {}
    if method.needs_data:
        passes = len({site.block for site in sites}) + 1
        advance = stage("measuring inputs", passes * len(batches) * (2 if method.needs_gradients else 1))
        statistics = calibrate(model, sites, batches, method=missing[0].options[0].method, on_step=advance)
    advance = stage("trials", len(missing))
    total = sum(parameter.numel() for parameter in model.parameters())
    dense = score(model)
    for trial in missing:
        found: Score | None
        try:
            found, price = _measured(model, trial, statistics, score, cost)
            facts = here.also(cost=price)
        except ValueError as error:
            found, facts = None, here.also(unavailable=str(error))
        record = _record(subject, trial, found, dense, total, facts)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as opened:
            opened.write(record.to_json() + "\n")
        done[trial.group, trial.share] = record
        advance()
    return [done[trial.group, trial.share] for trial in trials]


def _measured(
    model: Any, trial: Trial, statistics: Mapping[str, Any], score: Scorer, cost: Cost | None
) -> tuple[Score, Mapping[str, Any] | None]:
    names = [name for option in trial.options for name in option.sites]
    dense = {name: linear_at(model, name) for name in names}
    earlier = getattr(model.config, "rankfold", None)
    try:
        factorize(model, Plan(options=trial.options, method=trial.options[0].method), statistics)
        return score(model), None if cost is None else cost(with_layers(model, dense), model)
    finally:
        restore(model, dense, earlier)


def _record(subject: str, trial: Trial, found: Score | None, dense: Score, total: int, here: Circumstances) -> Record:
    """A trial's rise; no value, and the reason, where the model gave no finite numbers."""
    rise = None if found is None else paired_difference(found.values, dense.values)
    details = {
        "group": trial.group,
        "sites": [name for option in trial.options for name in option.sites],
        "share": trial.share,
        "ranks": sorted({option.ranks[0] for option in trial.options}),
        "removed": trial.removed,
        "removed_of_model": trial.removed / total,
        dense.name: None if found is None else found.mean,
        f"dense_{dense.name}": dense.mean,
    }
    value, error = (None, None) if rise is None else (rise.value, rise.error)
    return here.record(subject, f"{dense.name}_rise", value, dense.unit, error, **details)


def _read(file: Path, study: str) -> dict[tuple[str, float], Record]:
    """The records of a file by group and share; a line that a kill left unfinished is removed from it."""
    try:
        records = [Record.from_json(line) for line in whole_lines(file)]
        foreign = [record for record in records if record.context["study"] != study]
        if not foreign:
            return {(record.context["group"], record.context["share"]): record for record in records}
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{file}: not the records of a study ({error}). Name another file, or remove it.") from error
    raise InputError(
        f"{file}: holds records of another study: another model, text, method or version. Name another file."
    )


def measured_losses(records: Sequence[Record], sites: Sequence[Site]) -> dict[str, list[float]]:
    """The measured rise of every site at each rank from 0 to full, for `allocate(..., losses=...)`.

    Sites that were measured together share their rise evenly. Between measured ranks it is interpolated, below the
    lowest it grows on as steeply, and it never falls with a falling rank: a gain by a rank less is noise.

    Raises:
        ValueError: If a site was not measured.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        if record.value is None:
            continue
        point = (float(record.context["share"]), max(0.0, float(record.value)))
        if point[0] < 1:
            curves.setdefault(str(record.context["group"]), []).append(point)
    losses = {}
    for site in sites:
        group = next((key(site) for key in GROUPS.values() if key(site) in curves), None)
        if group is None:
            raise InputError(
                f"{site.name}: this site was not measured in the study. Measure all sites that you choose."
            )
        together = sum(any(key(other) == group for key in GROUPS.values()) for other in sites)
        shares, rises = map(np.array, zip(*sorted([*curves[group], (1.0, 0.0)]), strict=True))
        rises = np.maximum.accumulate(rises[::-1])[::-1]
        full = min(site.out_features, site.in_features)
        slope = (rises[1] - rises[0]) / (shares[1] - shares[0])
        at = np.arange(full + 1) / full
        values = np.where(at < shares[0], rises[0] + slope * (at - shares[0]), np.interp(at, shares, rises))
        losses[site.name] = (values / together).tolist()
    return losses
