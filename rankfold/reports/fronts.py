"""Quality against every cost: trials of a search, and models that were measured beside the dense one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rankfold.plan import Plan
from rankfold.record import Record
from rankfold.reports.section import COLOURS, MARKS, Figure, Section, label, model_name, written


def pareto(records: Sequence[Record], plan: Plan | None) -> Iterator[Section]:
    """Quality against every cost: trials of a search, and models that were measured."""
    points = [*_trials(records), *_measured(records)]
    costs = [cost for cost in COSTS if sum(cost in point.values for point in points) > 1]
    if not costs:
        return
    traces, rows = [], []
    for number, kind in enumerate(dict.fromkeys(point.kind for point in points)):
        group = [point for point in points if point.kind == kind]
        if kind.endswith(FRONT):
            group.sort(key=lambda point: point.values.get(costs[0], 0))
        traces.append(
            {
                "name": kind,
                "mode": "lines+markers" if kind.endswith(FRONT) else "markers" if len(group) > 8 else "markers+text",
                "type": "scatter",
                "x": [point.values.get(costs[0]) for point in group],
                "y": [point.quality for point in group],
                "error_y": {"type": "data", "array": [point.error or 0 for point in group], "thickness": 1, "width": 2},
                "text": [point.name for point in group],
                "textposition": "top center",
                "hovertemplate": "%{text}<br>quality %{y:.4f}<br>cost %{x:,}<extra></extra>",
                "marker": {"color": COLOURS[number % 7], "symbol": MARKS[number % 7], "size": 9},
                "line": {"width": 1, "shape": "hv"},
                "choices": [[point.values.get(cost) for point in group] for cost in costs],
            }
        )
        rows += [
            [kind, point.name, f"{point.quality:.4f}", *(written(point.values.get(cost)) for cost in costs)]
            for point in group
        ]
    figure = Figure(
        name="pareto-plot",
        caption="Rise of the loss against cost, less of both being better; the line joins what nothing else beats.",
        data=traces,
        layout={
            "xaxis": {"title": {"text": COSTS[costs[0]]}},
            "yaxis": {"title": {"text": "rise of the loss, nat/token"}},
            "choices": [COSTS[cost] for cost in costs],
        },
        header=["group", "what", "rise of the loss", *(COSTS[cost] for cost in costs)],
        rows=rows,
        choices=[COSTS[cost] for cost in costs],
    )
    yield Section(name="pareto", title="Quality against cost", figures=[figure])


FRONT = "search: no other trial beats it"

COSTS = {
    "bytes": "bytes of the weights",
    "memory": "bytes of the weights",
    "parameters": "parameters",
    "multiplications": "multiplications of a token",
    "decode": "seconds of a decoded token (search: over dense)",
    "prefill": "seconds of a prefill (search: over dense)",
    "energy": "joules of a prompt and its decoded tokens",
}


@dataclass(frozen=True)
class _Point:
    kind: str
    name: str
    quality: float
    error: float | None
    values: Mapping[str, float]


def _trials(records: Sequence[Record]) -> Iterator[_Point]:
    by_trial: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if "trial" in record.context:
            study = f"{model_name(record)} {record.context.get('study', '')}"
            by_trial.setdefault((study, record.subject), []).append(record)
    several = len({study for study, _ in by_trial}) > 1
    for (study, subject), found in by_trial.items():
        model = f"{study.split()[0]}, " if several else ""
        name = f"{model}{subject}"
        values = {record.name: float(record.value) for record in found if record.value is not None}
        quality = values.pop("quality", None)
        if quality is None:
            continue
        facts = found[0].context
        group = FRONT if facts.get("on_front") else "search: starting points" if facts.get("start") else "search: tried"
        kind = f"{model}{group}"
        error = next((record.error for record in found if record.name == "quality"), None)
        label = f"{name} ({facts['start']})" if facts.get("start") else name
        yield _Point(kind, label, quality, error, values)


def _measured(records: Sequence[Record]) -> Iterator[_Point]:
    """Models that were measured beside a dense one, which is a point itself."""
    losses = [
        record
        for record in records
        if record.name in ("loss", "masked_loss") and record.context.get("data") and not record.is_difference
    ]
    several = len({model_name(record) for record in losses if record.subject == "dense"}) > 1
    seen: set[tuple[str, str]] = set()
    for record in losses:
        file = str(record.context.get("file", ""))
        data = next(other.context["data"] for other in losses if other.context.get("file", "") == file)
        # A model is compared with the dense one of its own file.
        reference = next(
            (o for o in losses if o.subject == "dense" and o.context.get("file", "") == file
             and o.context["data"] == data),
            None,
        )  # fmt: skip
        dense = None if reference is None else reference.value
        if record.value is None or dense is None or record.context["data"] != data or (file, label(record)) in seen:
            continue
        seen.add((file, label(record)))
        values: dict[str, float] = {}
        for other in records:
            same = label(other) == label(record) and other.context.get("file", "") == file
            if same and not other.is_difference and other.name in COSTS and other.value is not None:
                values.setdefault("bytes" if other.name == "memory" else other.name, float(other.value))
        kind = f"{model_name(reference)}, measured" if several and reference is not None else "measured"
        yield _Point(kind, label(record), record.value - dense, record.error, values)
