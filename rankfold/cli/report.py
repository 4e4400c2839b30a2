"""`rankfold report`: records become one page that opens offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rankfold.cli.options import read_plan
from rankfold.cli.terminal import say
from rankfold.reports.page import read_records, write_page


def report(
    records: Annotated[list[Path], typer.Argument(help="Files of records, from any verb.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("report.html"),
    plan: Annotated[Path | None, typer.Option(help="The plan that was chosen, as JSON.")] = None,
    title: Annotated[str, typer.Option(help="Title of the page.")] = "Rankfold report",
) -> None:
    """Make one self-contained page from records: fronts, maps, spectra, roofline, benchmarks, how to reproduce it."""
    found = read_records(records)
    write_page(found, output, title=title, plan=None if plan is None else read_plan(plan))
    say(f"{len(found)} records in {output}, {output.stat().st_size / 2**20:.1f} MiB. Open it in a browser.")
