"""What models write and choose: programs, next lines and continuations, scored side by side, as records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankfold.circumstances import Circumstances
from rankfold.measurement.paired import paired_record
from rankfold.progress import Stage
from rankfold.quality import Sampling, choice_items, choose, share
from rankfold.quality.code import (
    CodeScores,
    Sandbox,
    Task,
    choose_lines,
    complete_tasks,
    describe,
    exact_lines,
    score_completions,
    strongest_protection,
)
from rankfold.record import Record


def evaluate_choices(  # noqa: PLR0913
    models: Mapping[str, Any], tokenizer: Any, texts: Sequence[str], here: Circumstances, *, count: int,
    length: int, seed: int, stage: Stage,
) -> list[Record]:  # fmt: skip
    """Share of questions in which a model finds the true continuation of held-out text among others."""
    items = choice_items(tokenizer, texts, count=count, context=length, seed=seed)
    advance = stage("continuations", len(models) * -(-count // 8))
    right = {name: choose(model, items, on_step=advance) for name, model in models.items()}
    return _compared("choice", right, here)


def evaluate_lines(
    models: Mapping[str, Any], tokenizer: Any, texts: Sequence[str], here: Circumstances, *, count: int,
    seed: int, stage: Stage,
) -> list[Record]:  # fmt: skip
    """Share of lines of held-out code that a model writes exactly."""
    lines = choose_lines(texts, count, seed)
    advance = stage("next lines", len(models) * -(-count // 16))
    right = {name: exact_lines(model, tokenizer, lines, on_step=advance) for name, model in models.items()}
    return _compared("next_line", right, here)


def evaluate_programs(  # noqa: PLR0913
    models: Mapping[str, Any], tokenizer: Any, tasks: Sequence[Task], here: Circumstances, *,
    files: Mapping[str, Path], ks: Sequence[int], samples: int, sampling: Sampling, batch_size: int, seed: int,
    stage: Stage,
) -> list[Record]:  # fmt: skip
    """pass@k of every model on programming tasks, and what else their completions tell."""
    protection = strongest_protection()
    sandbox = Sandbox(protection=protection)
    scores: dict[str, CodeScores] = {}
    for name, model in models.items():
        made = complete_tasks(
            model,
            tokenizer,
            tasks,
            files[name],
            samples=samples,
            sampling=sampling,
            batch_size=batch_size,
            seed=seed,
            on_step=stage(f"{name}: completions", len(tasks) * samples),
        )
        scores[name] = score_completions(made, ks, sandbox, on_step=stage(f"{name}: programs", len(made)))
    details = {**describe(protection), "samples": samples, "temperature": sampling.temperature}
    details |= {"top_p": sampling.top_p, "new_tokens": sampling.new_tokens}
    here = here.also(seed=seed, **details)
    records = []
    for k in ks:
        records += _compared(f"pass@{k}", {name: score.rates[k] for name, score in scores.items()}, here)
    for name, score in scores.items():
        for what, value in (("parses", score.parses), ("knows_names", score.knows_names)):
            records.append(here.record(name, what, value.value, "1", value.error, interval=value[1:3]))
        records.append(here.record(name, "repeated", score.repeated))
        records.append(here.record(name, "distinct", score.distinct))
        records += [
            here.record(name, f"programs that ended in {error}", float(count)) for error, count in score.errors.items()
        ]
    return records


def _compared(what: str, values: Mapping[str, Sequence[float | int]], here: Circumstances) -> list[Record]:
    """The share of every model with its interval, and its paired difference from the first, which is the dense one."""
    records = []
    reference, *others = values
    for name, found in values.items():
        mean = share(found)
        details = {"items": mean.observations, "interval": [mean.low, mean.high]}
        records.append(here.record(name, what, mean.value, "1", mean.error, **details))
    for name in others:
        records.append(paired_record(here, name, what, values[name], values[reference], minus=reference))
    return records
