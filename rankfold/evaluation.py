"""What models write and choose: programs, next lines and continuations, scored side by side, as records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rankfold.quality import Sampling, choice_items, choose, paired_difference, share
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

Stage = Callable[[str, int], Callable[[], None]]
"""Opens a stage of work with a title and a number of steps; what it returns is called after each step."""


def evaluate_choices(  # noqa: PLR0913
    models: Mapping[str, Any], tokenizer: Any, texts: Sequence[str], context: Mapping[str, Any], *, count: int,
    length: int, seed: int, stage: Stage,
) -> list[Record]:  # fmt: skip
    """Share of questions in which a model finds the true continuation of held-out text among others."""
    items = choice_items(tokenizer, texts, count=count, context=length, seed=seed)
    advance = stage("continuations", len(models) * -(-count // 8))
    right = {name: choose(model, items, on_batch=advance) for name, model in models.items()}
    return _compared("choice", right, context)


def evaluate_lines(
    models: Mapping[str, Any], tokenizer: Any, texts: Sequence[str], context: Mapping[str, Any], *, count: int,
    seed: int, stage: Stage,
) -> list[Record]:  # fmt: skip
    """Share of lines of held-out code that a model writes exactly."""
    lines = choose_lines(texts, count, seed)
    advance = stage("next lines", len(models) * -(-count // 16))
    right = {name: exact_lines(model, tokenizer, lines, on_batch=advance) for name, model in models.items()}
    return _compared("next_line", right, context)


def evaluate_programs(  # noqa: PLR0913
    models: Mapping[str, Any], tokenizer: Any, tasks: Sequence[Task], context: Mapping[str, Any], *,
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
            on_completion=stage(f"{name}: completions", len(tasks) * samples),
        )
        scores[name] = score_completions(made, ks, sandbox, on_program=stage(f"{name}: programs", len(made)))
    details = {**context, **describe(protection), "samples": samples, "temperature": sampling.temperature}
    details |= {"top_p": sampling.top_p, "new_tokens": sampling.new_tokens, "seed": seed}
    records = []
    for k in ks:
        records += _compared(f"pass@{k}", {name: score.rates[k] for name, score in scores.items()}, details)
    for name, score in scores.items():
        for what, value in (("parses", score.parses), ("knows_names", score.knows_names)):
            records.append(_record(name, what, value.value, value.error, {**details, "interval": value[1:3]}))
        records.append(_record(name, "repeated", score.repeated, None, details))
        records.append(_record(name, "distinct", score.distinct, None, details))
        records += [
            _record(name, f"programs that ended in {error}", float(count), None, details)
            for error, count in score.errors.items()
        ]
    return records


def _compared(what: str, values: Mapping[str, Sequence[float | int]], context: Mapping[str, Any]) -> list[Record]:
    """The mean of every model with its interval, and its paired difference from the first, which is the dense one."""
    records = []
    reference, *others = values
    for name, found in values.items():
        mean = share(found)
        details = {**context, "items": mean.observations, "interval": [mean.low, mean.high]}
        records.append(_record(name, what, mean.value, mean.error, details))
    for name in others:
        difference = paired_difference(values[name], values[reference])
        # No item that differs does not prove that none would: the error is then that of a single one.
        error = difference.error or 1 / len(values[name])
        records.append(_record(name, f"{what}_minus_dense", difference.value, error, dict(context)))
    return records


def _record(subject: str, name: str, value: float, error: float | None, context: Mapping[str, Any]) -> Record:
    return Record(subject=subject, name=name, value=value, unit="1", error=error, context=context)
