"""Figures from plain numbers; matplotlib is imported only when one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankfold.errors import InputError


def check_figure(path: str | Path) -> None:
    """Whether a figure can be written here, to be asked before the work that it takes.

    Raises:
        ValueError: If the suffix is unknown or the folder does not exist.
    """
    if Path(path).suffix not in {".png", ".svg", ".pdf"}:
        raise InputError(f"{path}: a figure must be named .png, .svg or .pdf.")
    if not Path(path).parent.is_dir():
        raise InputError(f"{path}: the folder {Path(path).parent} does not exist. Make it first.")


def draw_spectra(spectra: Mapping[str, Mapping[str, Sequence[float]]], path: str | Path) -> None:
    """Draw singular values, one panel for each kind of site and one line for each block.

    Args:
        spectra: For each kind, singular values by the name of the site, largest first.
        path: Where to write; the suffix (`.png`, `.svg`) says how.

    Raises:
        ValueError: If there is nothing to draw, the path is no place for a figure, or matplotlib is missing.
    """
    check_figure(path)
    if not spectra:
        raise InputError(f"{path}: nothing to draw, since no site was chosen.")
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("Drawing needs matplotlib: pip install 'rankfold[plots]'") from error
    columns = min(len(spectra), 4)
    rows = -(-len(spectra) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel, (kind, lines) in zip(panels, spectra.items(), strict=False):
        for position, values in enumerate(lines.values()):
            fractions = [(index + 1) / len(values) for index in range(len(values))]
            shade = colormaps["viridis"](position / max(len(lines) - 1, 1))
            panel.semilogy(fractions, [value / (values[0] or 1) for value in values], color=shade, linewidth=1)
        panel.set_title(kind, fontsize=8)
        panel.set_xlabel("rank / full rank", fontsize=7)
        panel.set_ylabel("singular value / largest", fontsize=7)
        panel.tick_params(labelsize=6)
    for panel in panels:
        panel.set_visible(False)
    figure.suptitle("Spectra of the weights, one line a block: first dark, last bright", fontsize=9)
    _write(figure, path)


def draw_points(
    series: Mapping[str, Sequence[tuple[float, float]]],
    path: str | Path,
    *,
    title: str,
    axes: tuple[str, str],
    lines: bool = False,
    diagonal: bool = False,
) -> None:
    """Draw points on logarithmic axes, one colour and one mark for each series.

    Args:
        series: Points (x, y) by the name of the series.
        path: Where to write; the suffix says how.
        title: Title of the figure.
        axes: Names of the axes, with units.
        lines: Whether a series' points are joined; the x axis is then linear.
        diagonal: Whether the line y = x is drawn.

    Raises:
        ValueError: If there is nothing to draw, the path is no place for a figure, or matplotlib is missing.
    """
    check_figure(path)
    if not any(series.values()):
        raise InputError(f"{path}: nothing to draw, since there are no points.")
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("Drawing needs matplotlib: pip install 'rankfold[plots]'") from error
    figure = Figure(figsize=(9.5, 4.8), layout="constrained")
    panel = figure.subplots()
    for index, (name, points) in enumerate(series.items()):
        # Marks shift by one after every ten colours, so that no two series look alike.
        mark = "osD^vP*X<>"[(index + index // 10) % 10]
        style: dict[str, Any] = {"color": colormaps["tab10"](index % 10), "marker": mark, "label": name}
        x, y = zip(*sorted(points), strict=True)
        panel.plot(x, y, linestyle="-" if lines else "none", markersize=5, linewidth=1, **style)
    if diagonal:
        values = [value for points in series.values() for point in points for value in point if value > 0]
        panel.plot([min(values), max(values)], [min(values), max(values)], color="grey", linewidth=1, zorder=0)
    panel.set_yscale("log")
    if not lines:
        panel.set_xscale("log")
    panel.set_xlabel(axes[0])
    panel.set_ylabel(axes[1])
    panel.set_title(title, fontsize=10)
    panel.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    panel.grid(alpha=0.3)
    _write(figure, path)


def _write(figure: Any, path: str | Path) -> None:
    """Save a figure; as SVG the same one is the same file."""
    from matplotlib import rc_context

    undated = {"metadata": {"Date": None}} if Path(path).suffix == ".svg" else {}
    with rc_context({"svg.hashsalt": "rankfold"}):
        figure.savefig(path, dpi=150, **undated)
