"""`rankfold demo`: the main job on the bundled model, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rankfold import demo as demonstration


def demo(
    output: Annotated[Path, typer.Argument(help="Folder of the compressed model.")] = Path("demo-checkpoint"),
    keep: Annotated[float, typer.Option(help="Fraction of the sites' parameters to keep.")] = 0.8,
) -> None:
    """Run the main job on the bundled model, offline: compress, save, load, measure side by side, generate."""
    demonstration.run(output, keep)
