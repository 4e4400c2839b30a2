"""`rankfold evaluate`: what models write and choose, programs run in a sandbox."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rankfold.calibration import load_corpus, max_length
from rankfold.checkpoint import load_model, load_tokenizer
from rankfold.circumstances import circumstances
from rankfold.cli.options import Devices, Dtype, Model, Records, Seed, is_decoder, to_dtype
from rankfold.cli.terminal import check_records, keeps, print_table, say, stages, write_records
from rankfold.errors import InputError
from rankfold.fingerprint import fingerprint
from rankfold.measurement import check_comparable, table
from rankfold.measurement.evaluation import evaluate_choices, evaluate_lines, evaluate_programs
from rankfold.quality import Sampling
from rankfold.quality.code import load_tasks, strongest_protection
from rankfold.record import Record

CONTEXT, SCORED = 96, 16
"""Tokens before a continuation, and of it."""


def evaluate(
    model: Model,
    dense: Annotated[str | None, typer.Option(help="The dense model, to evaluate side by side.")] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="Programming tasks: a JSONL file in HumanEval or MBPP layout, or a data set name."),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Held-out text for continuations and next lines (default: bundled:python-held-out)."),
    ] = None,
    items: Annotated[int, typer.Option(min=0, help="Continuations and next lines per text (0: none).")] = 200,
    samples: Annotated[int, typer.Option(min=1, help="Completions per task.")] = 1,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 takes the most likely token.")] = 0.0,
    new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens per completion (default: 256, or half the model's limit).")
    ] = None,
    k: Annotated[list[int] | None, typer.Option(help="The k of pass@k; repeat it (default: 1).")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts per batch.")] = 16,
    work: Annotated[
        Path, typer.Option(help="Folder in which completions are kept, so that an interrupted run resumes.")
    ] = Path("rankfold-completions"),
    device: Devices = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    output: Records = None,
) -> None:
    """Have models write programs, predict next lines and choose continuations, side by side.

    Generated programs run in a sandbox: bubblewrap or namespaces where the system allows it.
    """
    check_records(output)
    ks = sorted(set(k or [1]))
    if ks[0] < 1 or ks[-1] > samples:
        raise InputError(f"pass@k needs k between 1 and --samples, but got k {ks} and {samples} samples.")
    sets = {name: load_tasks(name) for name in tasks or ()}
    corpora = [load_corpus(name) for name in text or ["bundled:python-held-out"]] if items else []
    names = {"dense": dense, "compressed": model} if dense else {"model": model}
    models = {name: load_model(str(source), dtype=to_dtype(dtype), device=device) for name, source in names.items()}
    check_comparable(models)
    if not is_decoder(models.values()):
        raise InputError("Only causal language models write text. Measure a classifier with rankfold measure --labels.")
    tokenizer = load_tokenizer(model)
    reads = min(max_length(measured.config) or 4096 for measured in models.values())
    sampling = Sampling(temperature, 1.0 if temperature == 0 else 0.95, new_tokens or min(256, reads // 2))
    if sets:
        _say_protection()
    records: list[Record] = []
    keeps(
        f"no records were written; the same command resumes with the completions in {work}."
        if sets
        else "nothing was written."
    )
    here = circumstances(models, seed=seed)
    with stages() as stage:
        for corpus in corpora:
            facts = here.also(data=corpus.name, data_sha256=corpus.sha256)
            length = min(CONTEXT, reads - SCORED)
            records += evaluate_choices(
                models, tokenizer, corpus.texts, facts, count=items, length=length, seed=seed, stage=stage
            )
            records += evaluate_lines(models, tokenizer, corpus.texts, facts, count=items, seed=seed, stage=stage)
        for name, found in sets.items():
            files = {
                subject: work
                / f"{Path(name).name}-{fingerprint(measured, found, sampling, samples, batch, seed)}.jsonl"
                for subject, measured in models.items()
            }
            facts = here.also(data=Path(name).name, data_sha256=fingerprint(found))
            records += evaluate_programs(
                models, tokenizer, found, facts, files=files, ks=ks, samples=samples,
                sampling=sampling, batch_size=batch, seed=seed, stage=stage,
            )  # fmt: skip
    print_table(str(model), ["", *names, ""], table(records, names))
    _say_differences(records)
    write_records(records, output)


def _say_protection() -> None:
    protection = strongest_protection()
    reach = f"; programs can reach: {', '.join(protection.reachable)}" if protection.reachable else ""
    say(f"Generated programs run under {protection.name}{reach}.")
    if protection.name != "bubblewrap":
        say("Install bubblewrap for the strongest protection.")


def _say_differences(records: list[Record]) -> None:
    for record in records:
        if record.is_difference and record.value is not None and record.error is not None:
            beyond = "" if abs(record.value) > 2 * record.error else ": within the noise of these items"
            found = f"{record.value:+.1%} ± {record.error:.1%} against {record.context['minus']}"
            say(f"{record.name}, {record.context['data']}: {found}{beyond}.")
