"""What both papers observed, beside what was measured here: a section of docs/characterization.md."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping

from lord_page import by_row, table
from real_model_page import NAMES, Row, rows_of
from results import RESULTS, read
from studies import ARCHITECTURES, MADE_SMALL, REAL, apart, depth_of, study

LANGUAGE = "SmolLM2-135M-Instruct"
CODE = "Qwen2.5-Coder-0.5B-Instruct"
POINT = "Tucker, 3 blocks at rank 1"


def verdict(holds: Mapping[str, bool]) -> str:
    """One word for all models."""
    if not holds:
        return "not measured"
    return "confirmed" if all(holds.values()) else "contradicted" if not any(holds.values()) else "depends"


def over_models(values: Mapping[str, str], holds: Mapping[str, bool]) -> list[str]:
    """Verdict, figures of real models, and those of the small ones with how many agree."""
    real = ", ".join(f"{model.partition('-')[0]} {value}" for model, value in values.items() if model not in MADE_SMALL)
    small = [model for model in values if model in MADE_SMALL]
    agree = sum(holds[model] for model in small)
    return [verdict(holds), real or "-", f"holds on {agree} of {len(small)}" if small else "-"]


def in_depth() -> Iterator[list[str]]:
    """Blocks alone and together."""
    depths = {model: depth_of(study(model, "block")) for model in ARCHITECTURES if study(model, "block")}
    yield [
        "Early blocks are the most sensitive (Tucker)",
        *over_models(
            {model: f"{depth.first:.1f} times the median block" for model, depth in depths.items()},
            {model: depth.first_is_worst for model, depth in depths.items()},
        ),
    ]
    yield [
        "One of the last three costs little (Tucker)",
        *over_models(
            {model: f"{depth.last_three:.1f} times the median" for model, depth in depths.items()},
            {model: depth.last_three <= 1 for model, depth in depths.items()},
        ),
    ]
    both = {model: depth for model, depth in depths.items() if depth.blocks}
    yield [
        "Rank 1 is the best trade (Tucker)",
        *over_models(
            {model: f"in {depth.better} of {depth.blocks} blocks" for model, depth in both.items()},
            {model: 2 * depth.better > depth.blocks for model, depth in both.items()},
        ),
    ]
    ratios = {model: [statistics.median(found) for found in apart(model)[0].values()] for model in ARCHITECTURES}
    ratios = {model: found for model, found in ratios.items() if found[1:]}
    yield [
        "Blocks far apart disturb each other less (Tucker)",
        *over_models(
            {model: f"{found[0]:.2f} near, {found[-1]:.2f} far" for model, found in ratios.items()},
            {model: found[-1] < 0.95 * found[0] for model, found in ratios.items()},
        ),
    ]


def at_nine_percent() -> Iterator[list[str]]:
    """The point of 9 % fewer parameters, and tasks."""
    rows = {row.name: row for row in rows_of(LANGUAGE)}
    dense, point = rows.get("dense"), rows.get(POINT)
    if dense is None:
        return
    if point is not None:
        tasks = [task for task in dense.above_chance if task in point.tasks]
        lost = {task: point.beside(dense, [task]) for task in tasks}
        shown = ", ".join(f"{NAMES[task]} {found}" for task, found in lost.items())
        rise = point.rise(dense)
        within = bool(lost) and all(-0.10 <= found.value <= -0.04 for found in lost.values())
        figures = f"SmolLM2, 3 of 30 blocks, 7.9 % fewer: {shown}; loss {rise.value:+.2f} ± {rise.error:.2f} nat"
        worse = bool(lost) and all(found.value < -0.10 for found in lost.values())
        yield [
            "9 % fewer parameters cost 4 to 10 points, untrained (Tucker)",
            "confirmed" if within else "contradicted" if worse else "depends",
            figures if lost else "-",
            "-",
        ]
        speed = [point.record(f"{what} over dense", "balance") for what in ("prefill", "decode")]
        if all(speed):
            times = [1 - 1 / float(one.value or 1) for one in speed if one is not None]
            yield [
                "and save 4 % of the latency (Tucker)",
                "confirmed" if min(times) >= 0.03 else "depends",
                f"SmolLM2: prompt {times[0]:.0%} less time, decoding {times[1]:.0%}",
                "-",
            ]
    ours = rows.get("rankfold, keep 0.8")
    if ours is not None:
        told = [task for task in dense.above_chance if task in ours.tasks]
        lost = {task: ours.beside(dense, [task]) for task in told}
        order = sorted(lost, key=lambda task: lost[task].value)
        shown = ", ".join(f"{NAMES[task]} {lost[task]}" for task in order)
        guessed = "" if "winogrande" in told else "; WinoGrande is answered by guessing, dense too, which looks robust"
        yield [
            "ARC Easy is very sensitive, WinoGrande robust (Tucker)",
            "confirmed" if order[:1] == ["arc_easy"] and order[-1:] == ["winogrande"] else "depends",
            f"SmolLM2, keep 0.8: {shown}{guessed}",
            "-",
        ]


def in_cost() -> Iterator[list[str]]:
    """Roofline and training."""
    shapes = read("roofline")
    dense, low = (
        [float(r.value or 0) for r in shapes if r.name == "intensity" and str(r.context["row"]).endswith(end)]
        for end in ("dense", "rank 1024")
    )
    if dense:
        yield [
            "Memory-bound products gain by low rank, since it takes bytes away (Tucker)",
            "confirmed" if max(low) <= 1.01 * max(dense) else "depends",
            f"Llama-2-7B's shapes: {max(dense):.2f} operations a byte, at rank 1024 {max(low):.2f}: bytes and operations fall alike, and time with them; intensity does not rise",
            "-",
        ]
    rows = {row: v for row, v in by_row(read("recovery"), "pycode-starcoder")}
    if "centre" in rows:
        found = rows["centre"]
        regained = 1 - float(found["after"].value or 0) / float(found["before"].value or 1)
        says = "confirmed" if regained > 0.1 else "contradicted"
        yield ["Fine-tuning gives back what was lost (Tucker)", says, "-", f"{regained:.0%} of the loss at keep 0.6"]


def in_code() -> Iterator[list[str]]:
    """LoRD's claims."""
    rows = {row.name: row for row in rows_of(CODE, "code_quality")}
    dense = rows.get("dense")
    tested = {
        name: row for name, row in rows.items() if name.endswith("keep 0.85") and row.record("HumanEval pass@1")
    }  # fmt: skip
    if dense is not None and tested:
        shown = "; ".join(_pass_at_one(row, dense) for row in tested.values())
        yield [
            "15 % fewer parameters cost no pass@1 and under 1 % of perplexity (LoRD)",
            "contradicted" if all(row.rise(dense).value > 0.01 for row in tested.values()) else "depends",
            f"Qwen2.5-Coder-0.5B, all linear layers: {shown}",
            "-",
        ]
    if dense is not None and "LoRD, keep 0.85" in rows:
        times = [rows["LoRD, keep 0.85"].record(f"{what} over dense", "speed") for what in ("decode", "prefill")]
        if all(times):
            shown = ", ".join(f"{float(one.value or 0):.2f}" for one in times if one is not None)
            fastest = max(float(one.value or 0) for one in times if one is not None)
            yield [
                "Up to 22 % faster (LoRD)",
                "confirmed" if fastest >= 1.2 else "depends" if fastest > 1.1 else "contradicted",
                f"Qwen2.5-Coder-0.5B, keep 0.85 on one thread: decoding and a prompt at {shown} of dense's speed",
                "-",
            ]
    peaks = [float(v["peak"].value or 0) for _, v in by_row(read("lord_qlora"), "GPTBigCode, 305 M") if "peak" in v]
    if len(peaks) > 1:
        yield [
            "QLoRA over the compressed model takes 21.2 % less memory (LoRD)",
            "contradicted" if peaks[1] >= peaks[0] else "depends",
            "-",
            f"305 M random parameters: peak {peaks[1] / peaks[0] - 1:+.1%}, of which most is activations",
        ]
    bearers = {}
    for path in sorted(RESULTS.glob("lord_sensitivity-*-kind.jsonl")):
        records = [r for r in read(path.stem) if r.context["removed"] > 0 and r.value is not None]
        costs: dict[str, float] = {}
        for record in records:
            per = float(record.value or 0) / float(record.context["removed_of_model"])
            kind = str(record.context["group"])
            costs[kind] = min(per, costs.get(kind, per))
        bearers[records[0].subject] = min(costs, key=lambda kind: costs[kind])
    if bearers:
        starcoder, codegen = bearers.get("pycode-starcoder", "-"), bearers.get("pycode-codegen", "-")
        holds = {"starcoder": starcoder == "mlp.c_proj", "codegen": "attn" in codegen}
        yield [
            "StarCoder's down-projections bear most, CodeGen's attention (LoRD)",
            verdict(holds),
            "-",
            f"least loss per parameter: {starcoder} of StarCoder's kind, {codegen} of CodeGen's",
        ]


def _pass_at_one(row: Row, dense: Row) -> str:
    rise = row.rise(dense)
    return (
        f"{row.name.partition(',')[0]} {row.beside(dense, ['HumanEval'])} of {dense.value('HumanEval pass@1'):.1%}, loss "
        f"{rise.value:+.2f} ± {rise.error:.2f} nat"
    )


def observations() -> Iterator[str]:
    """The section."""
    yield "## What the papers observed, and what is seen here"
    yield ""
    yield "Tucker: arXiv:2405.06626; LoRD: arXiv:2309.14021. Real models are SmolLM2-135M-Instruct, MiniLM with its SST-2 head, and where it is named"
    yield "Qwen2.5-Coder-0.5B-Instruct; the other column counts models of under a million parameters, trained for this project or its like. Accuracy and pass@1 are"
    yield "differences from the dense model in pairs of questions, ± one standard error."
    yield ""
    rows = [*in_depth(), *at_nine_percent(), *in_cost(), *in_code()]
    yield from table(["observation", "verdict", "real models", "small models"], rows)
    if study(REAL, "block"):
        first = depth_of(study(REAL, "block")).first
        yield (
            f"Where the small models had misled: not in depth, where SmolLM2's first block costs {first:.0f} times the median one, but in what they cannot do: their benchmarks are at "
            "chance, their pass@1 is zero and their speed is that of calls, so what was read from those says nothing of real models."
        )
        yield ""
