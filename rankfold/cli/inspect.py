"""`rankfold inspect`: what can be factorized, at which rank that pays, and what cannot and why."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from rankfold.checkpoint import load_model
from rankfold.circumstances import circumstances
from rankfold.cli.options import Device, Dtype, Model, Records, SiteNames, to_dtype
from rankfold.cli.summary import skipped_rows
from rankfold.cli.terminal import check_records, print_table, progress, say, write_records
from rankfold.measurement.inspection import inspect_sites
from rankfold.reports.figures import check_figure, draw_spectra
from rankfold.sites import find_sites


def inspect(
    model: Model,
    sites: SiteNames = None,
    plot: Annotated[Path | None, typer.Option(help="Plot the spectra to this .png or .svg.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    output: Records = None,
) -> None:
    """List what can be factorized, with shape, break-even rank and spectrum; and what cannot, with the reason."""
    if plot:
        check_figure(plot)
    check_records(output)
    loaded = load_model(model, dtype=to_dtype(dtype), device=device, dense=True)
    chosen = find_sites(loaded).select(sites or ())
    with progress("spectra", len(chosen)) as advance:
        inspections = inspect_sites(loaded, chosen, advance)
    rows = []
    for found in inspections:
        site, full = found.site, min(found.site.out_features, found.site.in_features)
        energies = [f"{found.energy(rank) or 0:.0%}" for rank in (full // 8, full // 4, full // 2)]
        shape = f"{site.out_features} x {site.in_features}"
        parts = " (" + "+".join(part.name for part in site.parts) + ")" if site.parts else ""
        rows.append(
            [site.name + parts, shape, f"{found.aspect:.2f}", str(found.break_even), f"{found.share:.2%}", *energies]
        )
    header = ["site", "out x in", "aspect", "break-even", "of model", "1/8", "1/4", "1/2"]
    title = f"{model}: {len(chosen)} sites; last columns: energy within 1/8, 1/4 and 1/2 of the full rank"
    print_table(title, header, rows)
    print_table("not factorized", ["weight", "shape", "reason"], skipped_rows(chosen))
    if plot:
        spectra: dict[str, dict[str, Sequence[float]]] = {}
        for found in inspections:
            spectra.setdefault(found.site.kind, {})[found.site.name] = found.spectrum
        draw_spectra(spectra, plot)
        say(f"Spectra plotted to {plot}")
    here = circumstances(loaded)
    write_records([found.record(here) for found in inspections], output)
