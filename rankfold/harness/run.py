"""Models asked by lm-evaluation-harness on the same items, and how far apart their answers are."""

from __future__ import annotations

import contextlib
import io
import logging
import numbers
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rankfold.circumstances import Circumstances
from rankfold.errors import InputError
from rankfold.harness.layouts import BENCHMARKS, local_files
from rankfold.measurement import paired_record
from rankfold.progress import Step, no_step
from rankfold.quality import paired_difference, share
from rankfold.record import Record


class Answers(NamedTuple):
    """What a model reached on the items of one benchmark."""

    values: Mapping[str, Sequence[float]]
    """By metric, the value of every item, in the order of the items."""
    shots: int | None
    """Examples before each question; `None` where tasks of a group have different numbers."""
    version: str
    """Version of the harness."""


def ask(  # noqa: PLR0913
    models: Mapping[str, Any],
    tokenizer: Any,
    name: str,
    *,
    folder: Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 8,
    seed: int | None = None,
    on_step: Step = no_step,
) -> dict[str, Answers]:
    """Ask every model the same questions, as the harness does.

    Args:
        models: Causal language models by name.
        tokenizer: Their tokenizer.
        name: A key of `BENCHMARKS`; without `folder` any task of the harness.
        folder: Local files (`layouts.local_files`); without it the harness loads the data set from the hub.
        limit: Questions of each task at most.
        shots: Examples before each question (default: the harness's own number).
        batch_size: Questions at once.
        seed: Seed of the choice of examples (default: the harness's own).
        on_step: Called after each model.

    Raises:
        ValueError: If the harness is missing, the benchmark is unknown, or its files are not what they must be.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError("Benchmarks need lm-evaluation-harness: pip install 'rankfold[benchmarks]'") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    answers = {}
    with _configurations(name, folder) as (tasks, include):
        # Only the given configurations are read: to index the harness's own takes ten seconds.
        manager = TaskManager(include_path=str(include), include_defaults=False) if include else TaskManager()
        unknown = sorted(set(tasks) - set(manager.all_tasks))
        if unknown:
            raise InputError(f"A benchmark must be a task of lm-evaluation-harness, but got {unknown[0]!r}.")
        for model_name, model in models.items():
            with _asking(name), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                result: Any = lm_eval.simple_evaluate(
                    model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                    tasks=list(tasks),
                    num_fewshot=shots,
                    limit=limit,
                    bootstrap_iters=0,
                    task_manager=manager,
                    **({} if seed is None else {"random_seed": seed, "fewshot_random_seed": seed}),
                )
            answers[model_name] = _answers(result, name, lm_eval.__version__)
            on_step()
    return answers


@contextlib.contextmanager
def _asking(name: str) -> Iterator[None]:
    """What the harness makes of questions that cannot be asked, in words that say what to do."""
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise InputError(
            f"{name}: its data set cannot be reached ({_first_line(error)}). Give local files with `data_dir`, which "
            "rankfold convert-data makes, or go online."
        ) from error
    except (ValueError, KeyError, IndexError, AssertionError, TypeError) as error:
        raise InputError(
            f"{name}: the harness cannot ask these questions ({type(error).__name__}: {_first_line(error)}). "
            "There must be more examples than `shots`, an answer to each question among its choices, and room for the "
            "longest answer in what the model reads at once; --debug shows the trace."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


@contextlib.contextmanager
def _configurations(name: str, folder: Path | None) -> Iterator[tuple[list[str], Path | None]]:
    """Tasks, and a folder of configurations that are the harness's own but for the place of their data."""
    if folder is None:
        yield [name], None
        return
    import lm_eval

    own = Path(lm_eval.__file__).parent / "tasks"
    benchmark = BENCHMARKS.get(name)
    files = local_files(name, folder)
    assert benchmark is not None, "unknown names have no files"
    with tempfile.TemporaryDirectory() as made:
        for task, splits in files.items():
            configuration = {
                "include": str(own / benchmark.task.format(task.removeprefix("mmlu_"))),
                "task": task,
                "dataset_path": "json",
                "dataset_name": None,
                "dataset_kwargs": {"data_files": {split: str(file.resolve()) for split, file in splits.items()}},
                "training_split": "train" if "train" in splits else None,
                "validation_split": "validation" if "validation" in splits else None,
                "test_split": "test" if "test" in splits else None,
                "tag": None,
            }
            if benchmark.examples is not None:
                configuration["fewshot_split"] = benchmark.examples if benchmark.examples in splits else None
            (Path(made) / f"{task}.yaml").write_text(yaml.safe_dump(configuration))
        yield list(files), Path(made)


def _answers(result: Mapping[str, Any], name: str, version: str) -> Answers:
    """The values of all items, tasks of a group one after the other."""
    wanted = BENCHMARKS[name].metrics if name in BENCHMARKS else None
    values: dict[str, list[float]] = {}
    for task in sorted(result["samples"]):
        for sample in sorted(result["samples"][task], key=lambda sample: sample["doc_id"]):
            for metric in sample["metrics"]:
                key = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
                if (wanted is None or key in wanted) and isinstance(sample[metric], numbers.Real):
                    values.setdefault(key, []).append(float(sample[metric]))
    if not values:
        raise InputError(f"{name}: this task has no numeric metric per item, so models cannot be compared in pairs.")
    shots = set(result["n-shot"].values())
    ordered = {key: values[key] for key in wanted or values if key in values}
    return Answers(ordered, shots.pop() if len(shots) == 1 else None, version)


def benchmark_records(name: str, answers: Mapping[str, Answers], here: Circumstances) -> list[Record]:
    """The mean of every model with its standard error, and its paired difference from the first, the dense one."""
    records = []
    reference, *others = answers
    for model, found in answers.items():
        for metric, values in found.values.items():
            # Zeros and ones alone would have no spread at 0 % and at 100 %: their error is that of Wilson's interval.
            binary = {*values} <= {0.0, 1.0}
            mean = share(values) if binary else paired_difference(values, [0.0] * len(values))
            facts = {"metric": metric, "items": len(values), "shots": found.shots, "lm_eval": found.version}
            records.append(here.record(model, f"{name} {metric}", mean.value, "1", mean.error, **facts))
    for model in others:
        for metric, values in answers[model].values.items():
            dense = answers[reference].values[metric]
            records.append(
                paired_record(here, model, f"{name} {metric}", values, dense, minus=reference, metric=metric)
            )
    return records
