"""`rankfold export`: a compressed model in another form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rankfold.checkpoint import export_dense, load_model, save, tokenizer_if_any
from rankfold.cli.options import Dtype, Model, Overwrite, to_dtype
from rankfold.cli.terminal import say
from rankfold.compression import shrink
from rankfold.errors import InputError
from rankfold.shards import check_target


def export(
    model: Model,
    output: Annotated[Path, typer.Argument(help="Folder of the exported model.")],
    dense: Annotated[bool, typer.Option("--dense", help="Multiply the factors out into a dense checkpoint.")] = False,
    keep: Annotated[
        float | None, typer.Option(help="Cut a nested model to this fraction of its sites' parameters.")
    ] = None,
    overwrite: Overwrite = False,
    dtype: Dtype = "auto",
) -> None:
    """Export a compressed model: with its factors multiplied out, or a nested one cut to a budget."""
    if dense == (keep is not None):
        raise InputError("Pass exactly one of --dense, to multiply the factors out, and --keep, to cut a nested model.")
    check_target(output, overwrite)
    loaded = load_model(model, dtype=to_dtype(dtype))
    if keep is None:
        export_dense(loaded, tokenizer_if_any(model), output, source=model, overwrite=overwrite)
        say(f"Dense checkpoint: {output}")
        return
    plan = shrink(loaded, keep)
    save(loaded, tokenizer_if_any(model), output, source=model, overwrite=overwrite)
    say(f"Checkpoint: {output}, {plan.parameters:,} parameters in its sites")
    if plan.predicted_loss is not None:
        say(f"Predicted increase in loss: {plan.predicted_loss:.4f} nat/token")
