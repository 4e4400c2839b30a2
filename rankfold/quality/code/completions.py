"""Completions of programming tasks, written to a file as they are made, so that an interrupted run resumes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rankfold.errors import InputError
from rankfold.progress import Step, no_step
from rankfold.quality.code.tasks import Task
from rankfold.quality.generation import Sampling, complete, prompt_ids, prompt_room
from rankfold.record import whole_lines

Key = tuple[str, int]
"""A task's name and the number of the sample."""


class Completion(NamedTuple):
    """One answer to one task."""

    task: Task
    sample: int
    text: str


def complete_tasks(  # noqa: PLR0913
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    file: Path,
    *,
    samples: int = 1,
    sampling: Sampling,
    batch_size: int = 16,
    seed: int = 0,
    on_step: Step = no_step,
) -> list[Completion]:
    """Several answers to every task, those that stand in `file` taken from there.

    Batches are the same in every run, so that an interrupted run ends with what it would have had. The file is in
    the layout of other evaluators: one JSON object a line, with `task_id` and `completion`.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        tasks: What is asked.
        file: JSONL file of the completions of this model with these settings and no others.
        samples: Answers to each task.
        sampling: How they are drawn.
        batch_size: Prompts at once.
        seed: Seed of the draws.
        on_step: Called for each answer.

    Raises:
        ValueError: If more than one greedy answer is asked for, or the model does not generate.
    """
    if samples > 1 and not sampling.temperature:
        raise InputError(f"Greedy completions are all identical: set a temperature to draw {samples} samples per task.")
    room = prompt_room(model, sampling)
    lengths = {task.name: len(prompt_ids(tokenizer, task.prompt.rstrip(), room)) for task in tasks}
    wanted = [(task, sample) for task in sorted(tasks, key=lambda t: lengths[t.name]) for sample in range(samples)]
    file.parent.mkdir(parents=True, exist_ok=True)
    done = read_completions(file)
    for number, start in enumerate(range(0, len(wanted), batch_size)):
        batch = wanted[start : start + batch_size]
        if not all((task.name, sample) in done for task, sample in batch):
            stops = sorted({stop for task, _ in batch for stop in task.stops})
            # A line's end and the next line's indentation are one token to most tokenizers: the model writes both.
            prompts = [task.prompt.rstrip() for task, _ in batch]
            texts = complete(model, tokenizer, prompts, sampling=sampling, stops=stops, seed=1_000_003 * seed + number)
            made = {(task.name, sample): text for (task, sample), text in zip(batch, texts, strict=True)}
            _append(file, {key: text for key, text in made.items() if key not in done})
            done = made | done
        for _ in batch:
            on_step()
    return [Completion(task, sample, done[task.name, sample]) for task in tasks for sample in range(samples)]


def read_completions(file: Path) -> dict[Key, str]:
    """The completions of a file; a line that a kill left unfinished is removed from it.

    Raises:
        ValueError: If a whole line is no completion.
    """
    found: dict[Key, str] = {}
    for number, line in enumerate(whole_lines(file), 1):
        try:
            row = json.loads(line)
            found.setdefault((row["task_id"], row["sample"]), row["completion"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{file}, line {number}: a completion must have task_id, sample and completion. The file is not one "
                "that rankfold wrote, or is damaged: remove it to begin again."
            ) from error
    return found


def _append(file: Path, made: dict[Key, str]) -> None:
    rows = [{"task_id": name, "sample": sample, "completion": text} for (name, sample), text in made.items()]
    with file.open("a", encoding="ascii") as opened:
        opened.write("".join(json.dumps(row) + "\n" for row in rows))
