"""`rankfold export`: a compressed model in another form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rankfold.checkpoint import export_dense, load_model, tokenizer_if_any
from rankfold.cli.options import Dtype, Model, Overwrite, to_dtype
from rankfold.shards import check_target
from rankfold.terminal import say


def export(
    model: Model,
    output: Annotated[Path, typer.Argument(help="Folder of the exported model.")],
    dense: Annotated[bool, typer.Option("--dense", help="Multiply the factors out: an ordinary checkpoint.")] = False,
    overwrite: Overwrite = False,
    dtype: Dtype = "auto",
) -> None:
    """Write a compressed model in another form; --dense gives a checkpoint that anything loads."""
    if not dense:
        raise ValueError("export knows one form so far: pass --dense to multiply the factors out.")
    check_target(output, overwrite)
    export_dense(load_model(model, dtype=to_dtype(dtype)), tokenizer_if_any(model), output, overwrite=overwrite)
    say(f"Dense checkpoint: {output}")
