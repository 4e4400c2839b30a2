"""The sections of a report: each looks for its records, and is left out where there are none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rankfold.plan import Plan
from rankfold.record import Record
from rankfold.reports.fronts import pareto
from rankfold.reports.maps import heat, spectra, studies
from rankfold.reports.section import COLOURS, MARKS, Figure, Make, Section, label, model_name, written


def circumstances(records: Sequence[Record], plan: Plan | None) -> Iterator[Section]:
    """What was run, on what."""
    found: dict[str, list[str]] = {}
    for record in records:
        for key in (
            "model",
            "code",
            "hardware",
            "versions",
            "calibration",
            "data",
            "method",
            "dtype",
            "device",
            "seed",
        ):
            value = record.context.get(key)
            if value in (None, ""):
                continue
            shown = (
                ", ".join(f"{k} {v}" for k, v in value.items() if v is not None)
                if isinstance(value, Mapping)
                else str(value)
            )
            if shown not in found.setdefault(key, []):
                found[key].append(shown)
    rows = [[key, shown] for key, texts in found.items() for shown in texts]
    contended = sum(bool(record.context.get("contended")) for record in records)
    text = [f"{len(records)} records."]
    if contended:
        text.append(f"{contended} of them were timed while other processes slowed the machine down: repeat these.")
    yield Section(name="run", title="What was run", text=text, tables=[("", ["what", "value"], rows)])


def signs(records: Sequence[Record], plan: Plan | None) -> Iterator[Section]:
    """Signs of failure that `rankfold measure` saw."""
    found = [record for record in records if record.name == "failure sign"]
    if found:
        text = [f"Warning: {label(record)}: {record.context['text']}." for record in found]
        yield Section(name="signs", title="Warnings", text=text)


def roofline(records: Sequence[Record], plan: Plan | None) -> Iterator[Section]:
    """What the machine allows, and what layers reach."""
    found = [record for record in records if record.name == "roofline" and record.value]
    peaks = {record.name: record.value for record in records if record.subject == "machine"}
    if not found or not peaks.get("bandwidth") or not peaks.get("arithmetic"):
        return
    bandwidth, arithmetic = float(peaks["bandwidth"] or 1), float(peaks["arithmetic"] or 1)
    ridge = arithmetic / bandwidth
    ends = [0.1, ridge, 100 * ridge]
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter", "mode": "lines", "name": "roof", "x": ends,
            "y": [min(x * bandwidth, arithmetic) / 1e9 for x in ends], "line": {"color": "#7f7f7f"},
            "hoverinfo": "skip",
        }
    ]  # fmt: skip
    for number, (name, dense) in enumerate((("dense", True), ("factorized", False))):
        chosen = [record for record in found if record.context["dense"] == dense]
        traces.append(
            {
                "type": "scatter", "mode": "markers", "name": name,
                "x": [r.context["intensity"] for r in chosen],
                "y": [r.context["flops"] / float(r.value or 1) / 1e9 for r in chosen],
                "text": [f"{r.subject}, {r.context['tokens']} token(s)" for r in chosen],
                "marker": {"color": COLOURS[number], "symbol": MARKS[number], "size": 9},
                "hovertemplate": "%{text}<br>%{y:.3g} GFLOP/s at %{x:.2f} FLOPs/byte<extra></extra>",
            }
        )  # fmt: skip
    rows = [
        [r.subject, str(r.context["tokens"]), f"{r.context['intensity']:.2f}", f"{r.context['predicted'] * 1e6:.1f}",
         f"{float(r.value or 0) * 1e6:.1f}", f"{float(r.value or 0) / r.context['predicted']:.2f}"]
        for r in found
    ]  # fmt: skip
    figure = Figure(
        name="roofline-plot",
        caption=f"Roofline: {bandwidth / 1e9:.1f} GB/s and {arithmetic / 1e9:.0f} GFLOP/s measured, dots are layers.",
        data=traces,
        layout={
            "xaxis": {"title": {"text": "FLOPs/byte"}, "type": "log"},
            "yaxis": {"title": {"text": "GFLOP/s"}, "type": "log"},
        },
        header=["layer", "tokens", "FLOPs/byte", "predicted, µs", "measured, µs", "ratio"],
        rows=rows,
    )
    text = []
    if peaks.get("compute_to_model_size"):
        text.append(f"Compute to model size: {peaks['compute_to_model_size']:.2f} FLOPs/byte of weights in decoding.")
    yield Section(name="roofline", title="Roofline", text=text, figures=[figure])


def benchmarks(records: Sequence[Record], plan: Plan | None) -> Iterator[Section]:
    """Accuracies with error bars, models side by side."""
    scored = [record for record in records if _is_benchmark(record) and record.value is not None]
    found = [record for record in scored if not record.is_difference]
    if not found:
        return
    several = {r.name for r in found for other in found if r.name == other.name and _data(r) != _data(other)}

    def title(record: Record) -> str:
        return f"{record.name}, {_data(record)}" if record.name in several else record.name

    names = list(dict.fromkeys(map(title, found)))
    traces = []
    for number, subject in enumerate(dict.fromkeys(label(record) for record in found)):
        values = {title(record): record for record in found if label(record) == subject}
        traces.append(
            {
                "type": "bar", "name": subject, "x": names,
                "y": [100 * float(values[n].value or 0) if n in values else None for n in names],
                "error_y": {
                    "type": "data", "array": [100 * (values[n].error or 0) if n in values else 0 for n in names],
                },
                "marker": {"color": COLOURS[number % 7]},
                "hovertemplate": "%{x}: %{y:.1f} %<extra>" + subject + "</extra>",
            }
        )  # fmt: skip
    apart = {(label(r), r.name, _data(r)): r for r in scored if r.is_difference}
    rows = []
    for record in found:
        difference = apart.get((label(record), record.name, _data(record)))
        chance = None if difference is None else difference.context.get("mcnemar_p")
        cells = ["", ""]
        if difference is not None and difference.value is not None:
            cells = [f"{100 * difference.value:+.1f} ± {100 * (difference.error or 0):.1f}", ""]
            cells[1] = "" if chance is None else f"{chance:.3g}"
        rows.append([
            title(record), label(record), f"{100 * float(record.value or 0):.1f} ± {100 * (record.error or 0):.1f}",
            str(record.context.get("items", "")), *cells,
        ])  # fmt: skip
    layout = {
        "barmode": "group", "xaxis": {"automargin": True}, "yaxis": {"title": {"text": "%"}, "rangemode": "tozero"},
    }  # fmt: skip
    figure = Figure(
        name="benchmarks-plot", caption="Accuracy in percent, with standard errors; models answered the same items.",
        data=traces, layout=layout, header=["benchmark", "model", "%", "items", "minus dense, points", "McNemar p"],
        rows=rows,
    )  # fmt: skip
    yield Section(name="benchmarks", title="Benchmarks", figures=[figure])


def _data(record: Record) -> str:
    """What a number was measured on."""
    return str(record.context.get("data") or "")


def _is_benchmark(record: Record) -> bool:
    """Whether a record is a share of items that a model got right."""
    named = record.name in ("accuracy", "choice", "next_line") or record.name.startswith("pass@")
    return named or "metric" in record.context


def chosen_plan(records: Sequence[Record], plan: Plan | None) -> Iterator[Section]:
    """The plan, and how to carry it out."""
    if plan is None:
        return
    rows = [
        [name, option.form, ", ".join(map(str, option.ranks)) or "-", f"{option.parameters / len(option.sites):,.0f}",
         "-" if option.loss is None else f"{option.loss:.5f}"]
        for option in plan.options for name in option.sites
    ]  # fmt: skip
    text = [f"{len(plan.factorized)} of {len(plan.options)} sites are decomposed, {plan.parameters:,} parameters kept."]
    if plan.predicted_loss is not None:
        text.append(f"Predicted increase in loss: {plan.predicted_loss:.4f} nat/token.")
    header = ["site", "form", "ranks", "parameters", "predicted rise"]
    yield Section(name="plan", title="The chosen plan", text=text, tables=[("", header, rows)])


def everything(records: Sequence[Record], plan: Plan | None) -> Iterator[Section]:
    """All numbers, to be filtered."""
    kept = [r for r in records if "trial" not in r.context and r.name not in ("failure sign", "break_even_rank")]
    rows = []
    for record in kept:
        error = "" if record.error is None else f" ± {written(record.error)}"
        why = str(record.context.get("unavailable", ""))
        setting = str(record.context.get("data") or record.context.get("group") or "")
        value = f"{written(record.value, record.unit)}{error}" if record.value is not None else f"unavailable: {why}"
        name = f"{record.name}, minus {record.context['minus']}" if record.is_difference else record.name
        rows.append([label(record), name, setting, value, "" if record.unit == "1" else record.unit])
    if rows:
        header = ["model", "measure", "on", "value", "unit"]
        yield Section(name="numbers", title="All numbers", tables=[("", header, rows)])


def repeat(records: Sequence[Record], plan: Plan | None) -> Iterator[Section]:
    """How to do it again."""
    versions: Mapping[str, str] = next((r.context["versions"] for r in records if "versions" in r.context), {})
    lines = ["# the versions that produced these numbers"]
    pins = " ".join(f"{name}=={value.split('+')[0]}" for name, value in versions.items() if name != "python")
    lines.append(f"pip install {pins}")
    models = list(dict.fromkeys(filter(None, map(model_name, _dense_first(records))))) or ["MODEL"]
    seeds = list(dict.fromkeys(r.context["seed"] for r in records if r.context.get("seed") is not None)) or [0]
    if any("trial" in record.context for record in records):
        names = list(dict.fromkeys(r.name for r in records if "trial" in r.context))
        wanted = " ".join(f"--objective {name}" for name in names)
        lines.append(f"rankfold explore {models[0]} {wanted} --seed {seeds[0]}")
    if plan is not None:
        lines.append(f"rankfold compress {models[0]} OUTPUT --plan plan.json")
    if any(record.name == "perplexity" for record in records):
        lines.append(f"rankfold measure OUTPUT --dense {models[0]}")
    code = ["\n".join(lines)]
    if plan is not None:
        code.append(f"# plan.json\n{plan.to_json()}")
    yield Section(name="repeat", title="How to repeat it", code=code)


def _dense_first(records: Sequence[Record]) -> list[Record]:
    """Records of dense models before the others: what is compressed again begins there."""
    return sorted(records, key=lambda record: record.subject != "dense")


SECTIONS: tuple[Make, ...] = (
    circumstances, signs, pareto, benchmarks, chosen_plan, heat, studies, spectra, roofline, everything, repeat,
)  # fmt: skip
"""In the order of the page."""
