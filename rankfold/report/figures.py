"""Figures from plain numbers; matplotlib is imported only when one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def check_figure(path: str | Path) -> None:
    """Whether a figure can be written here, to be asked before the work that it takes.

    Raises:
        ValueError: If the suffix is unknown or the folder does not exist.
    """
    if Path(path).suffix not in {".png", ".svg", ".pdf"}:
        raise ValueError(f"{path}: a figure must be named .png, .svg or .pdf.")
    if not Path(path).parent.is_dir():
        raise ValueError(f"{path}: the folder {Path(path).parent} does not exist. Make it first.")


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
        raise ValueError(f"{path}: nothing to draw, since no site was chosen.")
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("Drawing needs matplotlib: pip install 'rankfold[plots]'") from error
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
    figure.savefig(path, dpi=150)
