"""Where in a model low rank costs what: heat maps of blocks and tensors, studies, spectra."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rankfold.plan import Plan
from rankfold.record import Record
from rankfold.reports.section import COLOURS, MARKS, Figure, Section, written


def heat(records: Sequence[Record], plan: Plan | None) -> Iterator[Section]:
    """Block x tensor: what each site costs alone, and what the chosen plan keeps of it."""
    figures: list[Figure] = []
    studied = [r for r in records if r.name.endswith("_rise") and len(r.context.get("sites", ())) == 1]
    for subject, share in sorted({(record.subject, float(record.context["share"])) for record in studied}):
        chosen = [r for r in studied if r.subject == subject and float(r.context["share"]) == share]
        cells = {r.context["sites"][0]: float(r.value or 0) for r in chosen}
        rank = "rank 1" if share == 0 else f"{share:g} of the full rank"
        caption = f"{subject}: rise of the loss when one site alone has {rank}, everything else dense."
        figures.append(_map(f"heat-{len(figures)}", cells, caption, studied[0].unit))
    if plan is not None:
        kept = {name: _kept(option) for option in plan.options for name in option.sites}
        figures.append(
            _map("heat-plan", kept, "Numbers that the chosen plan keeps of each site, in thousands.", "thousand")
        )
    if figures:
        yield Section(name="heat", title="Blocks and tensors", figures=figures)


def _kept(option: Any) -> float:
    return float(option.parameters) / len(option.sites) / 1e3


def _map(name: str, cells: Mapping[str, float], caption: str, unit: str) -> Figure:
    """A heat map of sites, blocks across and kinds down."""
    places = {site: _place(site) for site in cells}
    blocks = list(dict.fromkeys(block for block, _ in places.values()))
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    grid: list[list[float | None]] = [[None] * len(blocks) for _ in kinds]
    for site, value in cells.items():
        block, kind = places[site]
        grid[kinds.index(kind)][blocks.index(block)] = value
    trace = {
        "type": "heatmap",
        "x": blocks,
        "y": kinds,
        "z": grid,
        "colorscale": "Viridis",
        "colorbar": {"title": {"text": unit}},
        "hovertemplate": "block %{x}, %{y}: %{z:.4g}<extra></extra>",
    }
    layout = {
        "xaxis": {"title": {"text": "block"}, "type": "category"},
        "yaxis": {"autorange": "reversed", "automargin": True},
    }
    rows = [[*places[site], written(value)] for site, value in cells.items()]
    return Figure(name=name, caption=caption, data=[trace], layout=layout, header=["block", "tensor", unit], rows=rows)


def _place(site: str) -> tuple[str, str]:
    """Number of the block and kind of a site, from its path.

    >>> _place("model.layers.3.mlp.up_proj")
    ('3', 'mlp.up_proj')
    """
    parts = site.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    if number is None:
        return "-", site
    return parts[number], ".".join(parts[number + 1 :])


def studies(records: Sequence[Record], plan: Plan | None) -> Iterator[Section]:
    """Rise of the loss against what was removed, for every group of a study."""
    found = [
        r for r in records if r.name.endswith("_rise") and r.context.get("by", "site") != "site" and r.value is not None
    ]
    figures = []
    for number, key in enumerate(dict.fromkeys(map(_study_of, found))):
        chosen, by = [record for record in found if _study_of(record) == key], key[-1]
        if len({record.context["share"] for record in chosen}) == 1:
            figures.append(_bars(f"study-{number}", by, chosen))
            continue
        traces = []
        for place, group in enumerate(dict.fromkeys(str(r.context["group"]) for r in chosen)):
            line = sorted(
                (r for r in chosen if r.context["group"] == group), key=lambda r: r.context["removed_of_model"]
            )
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": group,
                    "x": [100 * r.context["removed_of_model"] for r in line],
                    "y": [r.value for r in line],
                    "error_y": {"type": "data", "array": [r.error or 0 for r in line], "thickness": 1, "width": 2},
                    "marker": {"color": COLOURS[place % 7], "symbol": MARKS[(place + place // 7) % 7]},
                    "hovertemplate": "%{y:.4f} at %{x:.2f} % removed<extra>" + group + "</extra>",
                }
            )
        caption = f"{chosen[0].subject}, {chosen[0].context.get('method', '')}: what low rank costs, by {by}."
        layout = {
            "xaxis": {"title": {"text": "parameters removed, % of the model"}},
            "yaxis": {"title": {"text": f"{chosen[0].name.replace('_', ' ')}, {chosen[0].unit}"}},
        }
        rows = [
            [str(r.context["group"]), ", ".join(map(str, r.context["ranks"])), written(r.value), written(r.error)]
            for r in chosen
        ]
        figures.append(
            Figure(name=f"study-{number}", caption=caption, data=traces, layout=layout,
                   header=["group", "ranks", "rise", "standard error"], rows=rows)
        )  # fmt: skip
    if figures:
        yield Section(name="studies", title="What a rank costs", figures=figures)


def _study_of(record: Record) -> tuple[str, ...]:
    return record.subject, str(record.context.get("method", "")), str(record.context["by"])


def _bars(name: str, by: str, chosen: Sequence[Record]) -> Figure:
    """A study of one rank: a bar for every group."""
    trace = {
        "type": "bar",
        "name": by,
        "x": [str(record.context["group"]) for record in chosen],
        "y": [record.value for record in chosen],
        "error_y": {"type": "data", "array": [record.error or 0 for record in chosen]},
        "marker": {"color": COLOURS[0]},
    }
    layout = {
        "xaxis": {"type": "category", "automargin": True},
        "yaxis": {"title": {"text": f"{chosen[0].name.replace('_', ' ')}, {chosen[0].unit}"}},
    }
    ranks = sorted({rank for record in chosen for rank in record.context["ranks"]})
    shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    return Figure(
        name=name,
        caption=f"{chosen[0].subject}, {chosen[0].context.get('method', '')}: what rank {shown} costs, by {by}.",
        data=[trace],
        layout=layout,
        header=["group", "rise", "standard error"],
        rows=[[str(r.context["group"]), written(r.value), written(r.error)] for r in chosen],
    )


def spectra(records: Sequence[Record], plan: Plan | None) -> Iterator[Section]:
    """Singular values of the weights."""
    found = [record for record in records if record.context.get("spectrum")]
    if not found:
        return
    traces, rows = [], []
    kinds = list(dict.fromkeys(str(record.context["kind"]) for record in found))
    seen: set[str] = set()
    for record in found:
        kind, values = str(record.context["kind"]), record.context["spectrum"]
        fractions = [(place + 1) / len(values) for place in range(len(values))]
        traces.append(
            {
                "type": "scatter", "mode": "lines", "name": kind, "legendgroup": kind, "showlegend": kind not in seen,
                "x": fractions, "y": values, "line": {"width": 1, "color": COLOURS[kinds.index(kind) % 7]},
                "opacity": 0.7, "text": [record.subject] * len(values),
                "hovertemplate": "%{text}<br>%{y:.3g} at %{x:.2f} of the full rank<extra></extra>",
            }
        )  # fmt: skip
        seen.add(kind)
        middle = values[len(values) // 2]
        rows.append([record.subject, written(record.value), f"{middle:.3g}"])
    layout = {
        "xaxis": {"title": {"text": "rank / full rank"}},
        "yaxis": {"title": {"text": "singular value / largest"}, "type": "log"},
    }
    figure = Figure(
        name="spectra-plot", caption="Singular values of every site, one line a site, coloured by the kind of tensor.",
        data=traces, layout=layout, header=["site", "break-even rank", "value at half of the full rank"], rows=rows,
    )  # fmt: skip
    yield Section(name="spectra", title="Spectra", figures=[figure])
