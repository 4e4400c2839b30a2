"""`rankfold measure`: quality, size and speed, beside the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rankfold.checkpoint import chosen_device, load_model, load_tokenizer
from rankfold.cli import in_options
from rankfold.cli.options import Devices, Dtype, Model, Records, to_dtype
from rankfold.cli.terminal import check_records, print_table, say, stages, write_records
from rankfold.cost import open_meter
from rankfold.measurement import HELD_OUT_TEXTS, table
from rankfold.measurement import measure as measure_models
from rankfold.modules import PREFERENCES, check_preference, prefer


def told(line: str) -> None:
    """A line of the library, in the words of this verb."""
    say(in_options(line, ["measure"]))


def measure(
    model: Model,
    dense: Annotated[str | None, typer.Option(help="The dense model, to compare with.")] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Evaluation text: a file or data set name; repeat it (default: the two bundled ones)."),
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="JSONL with sentence and label, for a classifier.")] = None,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens per window (default: 512, or the model's limit if lower).")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Maximum windows to score.")] = 256,
    latency: Annotated[
        bool, typer.Option(help="Time prefill and decoding, models interleaved.", rich_help_panel="Cost")
    ] = True,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens in the timed prompt.", rich_help_panel="Cost")] = 128,
    batch: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="Batch size to time; repeat it, for example 1 to 64 (default: 1).", rich_help_panel="Cost"
        ),
    ] = None,
    preference: Annotated[
        str,
        typer.Option(
            "--prefer",
            help=f"What layers keep in memory: {', '.join(PREFERENCES)}. With speed layers in bfloat16 are held in the "
            "order of the CPU's kernels too, and those in few bits as a 16-bit copy for prompts.",
            rich_help_panel="Cost",
        ),
    ] = "balance",
    watts: Annotated[
        float | None,
        typer.Option(min=0, help="Power to assume if there is no energy counter: an estimate.", rich_help_panel="Cost"),
    ] = None,
    device: Devices = "auto",
    dtype: Dtype = "auto",
    output: Records = None,
) -> None:
    """Measure quality, size and speed, side by side with the dense model if it is given."""
    names = {"dense": dense, "compressed": model} if dense else {"model": model}
    # A folder of adapters holds no model of its own.
    folders = {name: str(source) for name, source in names.items() if (Path(str(source)) / "config.json").is_file()}
    check_records(output)
    check_preference(preference)
    models = {name: load_model(str(source), dtype=to_dtype(dtype), device=device) for name, source in names.items()}
    for loaded in models.values():
        prefer(loaded, preference)
    with stages() as stage:
        records = measure_models(
            models, load_tokenizer(model), text=text or HELD_OUT_TEXTS, labels=labels, length=length, windows=windows,
            latency=latency, prompt=prompt, batches=sorted(set(batch or [1])), folders=folders,
            meter=open_meter(str(chosen_device(device)), watts=watts) if latency else None, stage=stage, say=told,
        )  # fmt: skip
    print_table(str(model), ["", *names, "ratio" if dense else ""], table(records, names))
    if any(record.context.get("contended") for record in records):
        say("Warning: other processes slowed this machine down during timing. Repeat the timing when it is idle.")
    for record in records:
        if record.name == "failure sign":
            say(f"Warning: {record.subject}: {record.context['text']}.")
    write_records(records, output)
