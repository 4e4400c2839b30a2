"""`rankfold roofline`: what this machine allows for each layer, dense and factorized, beside what it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from rankfold.checkpoint import chosen_device, load_model
from rankfold.circumstances import Circumstances, circumstances
from rankfold.cli.options import Device, Dtype, Model, Records, SiteNames, to_dtype
from rankfold.cli.terminal import check_records, print_table, progress, say, write_records
from rankfold.cost import Layer, Peaks, Timed, measure_peaks, parameter_count, reading, time_layers
from rankfold.cost.roofline import ROUNDS
from rankfold.record import Record
from rankfold.reports.figures import check_figure, draw_points
from rankfold.sites import Site, find_sites

AGREE = 0.25
"""Predictions further from the measurement are explained."""


def roofline(
    model: Model,
    share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Rank as a share of the full rank.")] = 0.25,
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens per call; repeat it (default: 1, as in decoding).")
    ] = None,
    sites: SiteNames = None,
    plot: Annotated[Path | None, typer.Option(help="Plot the roofline to this .png or .svg.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    output: Records = None,
) -> None:
    """Measure this machine's bandwidth and compute, and time every layer shape against what they allow."""
    check_records(output)
    if plot:
        check_figure(plot)
    device = str(chosen_device(device))
    loaded = load_model(model, dtype=to_dtype(dtype))
    number = next(loaded.parameters()).dtype
    shapes = {(site.out_features, site.in_features): site for site in find_sites(loaded).select(sites or ())}
    layers = [layer for site in shapes.values() for layer in _forms(site, share)]
    counts = sorted(set(tokens or [1]))
    with progress("roofline", ROUNDS * (1 + len(counts))) as advance:
        peaks = measure_peaks(device, number, advance)
        timed = [
            found
            for count in counts
            for found in time_layers(layers, peaks, tokens=count, device=device, dtype=number, on_step=advance)
        ]
    size = torch.finfo(number).bits // 8
    say(
        f"This machine reads {peaks.bytes_per_second / 1e9:.1f} GB/s and computes {peaks.flops_per_second / 1e9:.0f} "
        f"GFLOP/s in {str(number).removeprefix('torch.')}: below {peaks.ridge:.1f} FLOPs/byte, memory is the limit."
    )
    whole = reading(loaded)
    ratio = 2 * whole.multiplications / whole.bytes
    say(f"Decoding a token takes {ratio:.2f} FLOPs per byte read of the {parameter_count(loaded):,} parameters.")
    print_table(model, ["layer", "tokens", "FLOPs/byte", "predicted", "measured", "ratio"], _rows(timed, size))
    _explain(timed, peaks, size)
    if plot:
        _draw(plot, timed, peaks, size)
    here = circumstances(loaded, dtype=str(number), device=device, share=share)
    write_records(roofline_records(timed, peaks, ratio, size, here), output)


def _forms(site: Site, share: float) -> list[Layer]:
    rank = max(1, round(share * min(site.out_features, site.in_features)))
    shape = f"{site.out_features} x {site.in_features}"
    return [
        Layer(f"{shape}, dense", ((site.out_features, site.in_features),)),
        Layer(f"{shape}, rank {rank}", ((rank, site.in_features), (site.out_features, rank))),
    ]


def _rows(timed: list[Timed], size: int) -> list[list[str]]:
    return [
        [
            found.layer.name,
            str(found.tokens),
            f"{found.layer.intensity(found.tokens, size):.2f}",
            f"{found.predicted_seconds * 1e6:,.1f} µs",
            f"{found.measured_seconds * 1e6:,.1f} µs",
            f"{found.measured_seconds / found.predicted_seconds:.2f}",
        ]
        for found in timed
    ]


def _explain(timed: list[Timed], peaks: Peaks, size: int) -> None:
    """Where prediction and measurement part, and why."""
    for found in timed:
        ratio = found.measured_seconds / found.predicted_seconds
        if abs(ratio - 1) <= AGREE:
            continue
        if found.contended:
            why = "other processes slowed this machine down during timing"
        elif ratio < 1:
            why = "a cache holds some of it"
        elif found.predicted_seconds < 5e-5:
            why = "the calls themselves take longer than the work"
        elif found.layer.intensity(found.tokens, size) < peaks.ridge:
            why = "the kernel for few tokens does not reach the bandwidth of a long read"
        else:
            why = "the kernel does not reach the throughput of a large square product"
        say(f"{found.layer.name}, {found.tokens} token(s): {ratio:.2f} times the prediction: {why}.")


def _draw(plot: Path, timed: list[Timed], peaks: Peaks, size: int) -> None:
    reached = {
        kind: [
            (found.layer.intensity(found.tokens, size), found.layer.flops(found.tokens) / found.measured_seconds / 1e9)
            for found in timed
            if (len(found.layer.shapes) == 1) == (kind == "dense")
        ]
        for kind in ("dense", "factorized")
    }
    ends = [0.1, peaks.ridge, 10 * peaks.ridge]
    roof = [(x, min(x * peaks.bytes_per_second, peaks.flops_per_second) / 1e9) for x in ends]
    axes = ("FLOPs/byte", "GFLOP/s")
    draw_points({**reached, "roof": roof}, plot, title="Roofline of this machine", axes=axes)
    say(f"Roofline plotted to {plot}")


def roofline_records(timed: list[Timed], peaks: Peaks, ratio: float, size: int, here: Circumstances) -> list[Record]:
    """The peaks, and of every layer the measured time with what was predicted."""
    machine = [
        ("bandwidth", peaks.bytes_per_second, "byte/second"),
        ("arithmetic", peaks.flops_per_second, "flop/second"),
        ("compute_to_model_size", ratio, "flop/byte"),
    ]
    records = [here.record("machine", *row) for row in machine]
    for found in timed:
        facts: dict[str, Any] = {
            "tokens": found.tokens,
            "predicted": found.predicted_seconds,
            "intensity": found.layer.intensity(found.tokens, size),
            "flops": found.layer.flops(found.tokens),
            "contended": found.contended,
            "dense": len(found.layer.shapes) == 1,
        }
        records.append(here.record(found.layer.name, "roofline", found.measured_seconds, "second", **facts))
    return records
