"""`rankfold benchmark`: the benchmarks of the field, the same items for the dense and the compressed model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rankfold.checkpoint import load_model, load_tokenizer
from rankfold.circumstances import circumstances
from rankfold.cli.options import Devices, Dtype, Model, Records, is_decoder, to_dtype
from rankfold.cli.terminal import check_records, print_table, progress, say, write_records
from rankfold.errors import InputError
from rankfold.fingerprint import file_digest, fingerprint
from rankfold.harness import BENCHMARKS, ask, benchmark_records, local_files
from rankfold.harness import convert_data as convert
from rankfold.measurement import check_comparable
from rankfold.record import Record


def benchmark(
    model: Model,
    dense: Annotated[str | None, typer.Option(help="The dense model, asked the same questions.")] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help=f"A benchmark, {', '.join(BENCHMARKS)}, or any task of the harness; repeat it (default: all)."
        ),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of local files, from rankfold convert-data (default: the hub).")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum questions per task.")] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Few-shot examples per question (default: the harness's number).")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Questions per batch.")] = 8,
    device: Devices = "auto",
    dtype: Dtype = "auto",
    seed: Annotated[int | None, typer.Option(help="Seed for choosing the examples (default: the harness's).")] = None,
    output: Records = None,
) -> None:
    """Run benchmarks through lm-evaluation-harness, with error bars and paired differences."""
    check_records(output)
    names = {"dense": dense, "compressed": model} if dense else {"model": model}
    models = {name: load_model(str(source), dtype=to_dtype(dtype), device=device) for name, source in names.items()}
    check_comparable(models)
    if not is_decoder(models.values()):
        raise InputError(
            "The harness evaluates causal language models only. Measure a classifier with rankfold measure --labels."
        )
    tokenizer = load_tokenizer(model)
    here = circumstances(models, seed=seed, limit=limit)
    records: list[Record] = []
    rows = []
    for name in task or BENCHMARKS:
        with progress(name, len(models)) as advance:
            answers = ask(
                models, tokenizer, name, folder=data_dir, limit=limit, shots=shots, batch_size=batch, seed=seed,
                on_step=advance,
            )  # fmt: skip
        found = benchmark_records(name, answers, here.also(data=name, data_sha256=_data_digest(name, data_dir)))
        records += found
        rows += _rows(found, list(names))
    print_table(str(model), ["", "items", "shots", *names, "difference", "McNemar p"], rows)
    write_records(records, output)


def convert_data(
    source: Annotated[Path, typer.Argument(help="Folder of benchmark files in other layouts.")],
    target: Annotated[Path, typer.Argument(help="Folder for files that rankfold benchmark --data-dir reads.")],
) -> None:
    """Convert benchmark files to the layout that the harness reads."""
    counts = convert(source, target)
    subjects = {name: count for name, count in counts.items() if not name.startswith("mmlu_")}
    rows = [[name, f"{count:,}"] for name, count in subjects.items()]
    for split in sorted({name.partition(".")[2] for name in counts.keys() - subjects.keys()}):
        files = [count for name, count in counts.items() if name.startswith("mmlu_") and name.endswith(f".{split}")]
        rows.append([f"mmlu, {len(files)} subjects, {split}", f"{sum(files):,}"])
    print_table(str(target), ["file", "rows"], rows)
    say(f"Next: rankfold benchmark MODEL --data-dir {target}")


def _data_digest(name: str, folder: Path | None) -> str | None:
    """Hash of the local files that a benchmark reads; `None` where the harness loads them from the hub."""
    if folder is None:
        return None
    files = [file for splits in local_files(name, folder).values() for file in splits.values()]
    return fingerprint([file_digest(file) for file in files])


def _rows(records: list[Record], names: list[str]) -> list[list[str]]:
    """A row for every metric: each model's value, the difference, and how likely it is to be chance."""
    rows = []
    for name in dict.fromkeys(record.name for record in records if not record.is_difference):
        values: dict[str, Record] = {
            record.subject: record for record in records if record.name == name and not record.is_difference
        }
        apart = next((record for record in records if record.name == name and record.is_difference), None)
        facts: Any = next(iter(values.values())).context
        cells = [f"{values[key].value:.2%} ± {values[key].error:.2%}" for key in names]
        difference, chance = "", ""
        if apart is not None:
            difference = f"{apart.value:+.2%} ± {apart.error:.2%}"
            chance = "" if apart.context.get("mcnemar_p") is None else f"{apart.context['mcnemar_p']:.3g}"
        shots = "" if facts["shots"] is None else str(facts["shots"])
        rows.append([name, f"{facts['items']:,}", shots, *cells, difference, chance])
    return rows
