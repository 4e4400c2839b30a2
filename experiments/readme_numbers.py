"""Write the table of the README, docs/quality.md and its figure from the results: python experiments/readme_numbers.py."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from real_model_page import draw_front, readme_table, section
from results import RESULTS, ROOT, read

from rankfold.record import Record
from rankfold.reports.figures import draw_points

PLAIN = {"dense": "dense, 16 bits", "int8": "INT8, weights only (torchao)", "nf4": "NF4, weights only (bitsandbytes)"}


def write_value(record: Record) -> str:
    """A value for people: percent for accuracy, three digits for perplexity."""
    assert record.value is not None
    if record.name == "accuracy":
        return f"{record.value:.1%}"
    return f"{record.value:,.0f}" if record.value >= 100 else f"{record.value:.3g}"


def write_error(record: Record) -> str:
    """Its standard error over evaluation windows or rows."""
    if record.error is None:
        return ""
    return f" ± {record.error:.1%}" if record.name == "accuracy" else f" ± {record.error:.2g}"


def mean_over_seeds(records: Sequence[Record]) -> Record:
    """The mean of several seeds, with the larger of the error over windows and the spread over seeds."""
    values = [float(record.value or 0) for record in records]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    first = records[0]
    error = max(first.error or 0.0, spread)
    return Record(
        subject=first.subject,
        name=first.name,
        value=statistics.fmean(values),
        unit="1",
        error=error,
        context=first.context,
    )


def chosen(records: Iterable[Record], subject: str, part: str) -> list[Record]:
    """The records of one part of one model."""
    return [record for record in records if record.subject == subject and record.context["part"] == part]


def table(records: Sequence[Record], title: str) -> list[str]:
    """Rows down, keep across; the best value of each column in bold, block removal at what it really stores."""
    keeps = sorted({record.context["keep"] for record in records}, reverse=True)
    names = list(dict.fromkeys(record.context["row"] for record in records))
    pick: Callable[[Iterable[float]], float] = max if records[0].name == "accuracy" else min
    cells: dict[tuple[str, float], Record] = {}
    for name in names:
        for keep in keeps:
            found = [r for r in records if r.context["row"] == name and r.context["keep"] == keep]
            if found:
                cells[name, keep] = mean_over_seeds(found)
    # What stores more than was asked does not compete.
    within = [
        (keep, float(cell.value or 0)) for (_, keep), cell in cells.items() if cell.context["stored"] < keep + 0.03
    ]
    best = {keep: pick(value for other, value in within if other == keep) for keep in keeps}
    lines = [f"| {title} | " + " | ".join(f"keep {keep:g}" for keep in keeps) + " |", "|---" * (len(keeps) + 1) + "|"]
    for name in names:
        written = []
        for keep in keeps:
            cell = cells.get((name, keep))
            text = "" if cell is None else write_value(cell) + write_error(cell)
            if cell is not None and cell.value == best[keep] and cell.context["stored"] < keep + 0.03:
                text = f"**{text}**"
            if cell is not None and abs(cell.context["stored"] - keep) > 0.03:
                text += f" (keeps {cell.context['stored']:.2f})"
            written.append(text)
        lines.append(f"| {name} | " + " | ".join(written) + " |")
    return [*lines, ""]


def plain_line(records: Sequence[Record], subject: str) -> list[str]:
    """What plain quantization of the dense model gives, by its share of 16-bit bytes."""
    parts = [
        f"{PLAIN[record.context['row']]}: {write_value(record)}{write_error(record)}"
        + ("" if record.context["row"] == "dense" else f" at {record.context['stored']:.2f} of the bytes")
        for record in chosen(records, subject, "plain")
    ]
    return ["; ".join(parts) + ".", ""]


def made_with(records: Sequence[Record]) -> str:
    """Versions and processors that rows were measured with, all of them where they differ."""
    found: dict[str, set[str]] = {}
    for record in records:
        versions = record.context["versions"]
        found.setdefault("torch", set()).add(versions["torch"])
        found.setdefault("transformers", set()).add(versions["transformers"])
    return ", ".join(f"{name} {' and '.join(sorted(values))}" for name, values in found.items())


def grids() -> list[str]:
    """Quality per byte: every method of every model."""
    records = read("quality")
    lines = [
        "# Quality per byte",
        "",
        "Written by `python experiments/readme_numbers.py` from `benchmarks/results/quality.jsonl` (`python benchmarks/quality.py`). One shot, no",
        "training, the same calibration tokens for every row; sites' parameters kept, equal to the sites' 16-bit bytes. stories260K: mean of three",
        "seeds; ± is the standard error over evaluation windows, or the spread over seeds where that is larger. Rows named rankfold are",
        f'`rankfold.compress` as users call it, with `effort="best"`. {made_with(records)}, CPU.',
        "",
        "**INT8 stores half the bytes and costs less quality than any low-rank row here; NF4 stores a quarter and costs less than most rows at keep",
        "0.8 and below, with the same training too.**",
        "",
        "![Quality against bytes](figures/frontier.svg)",
        "",
    ]
    for subject in dict.fromkeys(record.subject for record in records):
        grid = chosen(records, subject, "grid")
        lines += table(grid, f"{subject}: {grid[0].name}") + plain_line(records, subject)
    trained = chosen(records, "stories260K", "trained")
    if trained:
        lines += [
            "With training (block refinement: 300 steps a block; KL: at most 1,200 steps of 16 windows), seed 0:",
            "",
        ]
        lines += table([r for r in trained if r.context["keep"] < 1], "stories260K: perplexity")
        few = [
            f"{PLAIN[record.context['row'].partition(' ')[0]]}: {write_value(record)}{write_error(record)} at "
            f"{record.context['stored']:.2f} of the bytes"
            for record in trained
            if record.context["keep"] == 1
        ]
        if few:
            lines += [f"Quantizers with the same KL, rounding seen in training: {'; '.join(few)}.", ""]
    cost = {record.name: record.value for record in read("compress_cost") if record.subject == "naive / rankfold"}
    beside = {(r.subject, r.name): r.value for r in read("svd_llm")}
    parts = [
        f"`{name}` {beside[f'{name} / svd-llm', 'total']:.1f} times the seconds and {beside[f'{name} / svd-llm', 'peak_memory']:.1f} times the memory"
        for name in ("whitened", "kfac", "rankfold")
    ]
    return [
        *lines,
        "## Cost of a compression",
        "",
        f"Compressing a Llama of 303 M parameters with `whitened`: the same work done naively takes {cost['time']:.1f} times the time and",
        f"{cost['peak_memory']:.1f} times the memory of `rankfold compress` (`python benchmarks/compress_cost.py`, alternating runs, one thread). Beside",
        f"SVD-LLM's own functions (`python benchmarks/svd_llm.py`, 29 M parameters): {', '.join(parts)}.",
        "",
        *efforts(),
        *memory(),
    ]


def efforts() -> list[str]:
    """What each effort takes and gives."""
    found = {(r.subject, r.context["row"], r.name): r for r in read("effort")}
    if not found:
        return []
    lines = [
        "What each effort takes and what it gives (`python benchmarks/effort.py MODEL`, whole commands on one thread, other work beside them; the",
        "rise of the loss over the dense model's in pairs of windows, ± one standard error):",
        "",
        "| | rise of the loss, nat/token | divergence | processor seconds | peak memory, GB | seconds over default's |",
        "|---|---|---|---|---|---|",
    ]
    for subject, row in dict.fromkeys((subject, row) for subject, row, _ in found):
        rise, divergence, seconds = (found[subject, row, name] for name in ("rise", "divergence", "processor_time"))
        peak = found.get((subject, row, "peak_memory"))
        memory = "" if peak is None else f"{float(peak.value or 0) / 1e9:.1f}"
        default = found.get((subject, f"default,{row.partition(',')[2]}", "processor_time"))
        ratio = "" if default is None else f"{float(seconds.value or 0) / float(default.value or 1):.2f}"
        lines.append(
            f"| {subject}, {row} | {rise.value:.4f} ± {rise.error:.4f} | {divergence.value:.4f} ± {divergence.error:.4f} | "
            f"{seconds.value:,.0f} | {memory} | {ratio} |"
        )
    return [*lines, ""]


def memory() -> list[str]:
    """Checkpoints compressed under a limit of memory."""
    found = {(record.subject, record.name): record for record in read("larger_than_memory")}
    subjects = dict.fromkeys(subject for subject, _ in found)
    lines = [
        "Under a limit that the system enforces (`python benchmarks/larger_than_memory.py`: Llamas of random weights, keep 0.8, no swap, one thread",
        "beside other work; memory of its own is what is not mapped from files):",
        "",
        "| | checkpoint, MB | limit, MB | own memory, MB | seconds | killed and gone on with |",
        "|---|---|---|---|---|---|",
    ]
    for subject in subjects:
        facts = found[subject, "time"].context
        megabytes = [facts["bytes"], facts["limit"], float(found[subject, "peak_anonymous_memory"].value or 0)]
        same = found.get((subject, "same_bytes"))
        kills = ""
        if same is not None:
            spent = float(found[subject, "time_killed"].value or 0)
            equal = "the same bytes" if same.value else "other bytes"
            kills = f"{same.context['kills']} times: {equal}, {spent:.0f} s in all"
        cells = [subject, *(f"{value / 1e6:,.0f}" for value in megabytes)]
        lines.append(f"| {' | '.join(cells)} | {float(found[subject, 'time'].value or 0):.0f} | {kills} |")
    return [*lines, ""] if subjects else []


def budget_table(base: str) -> list[str]:
    """Rows down, bits a weight across: the rise of the loss over the dense model's, on the same windows."""
    records = [record for record in read("one_budget") if record.context.get("base") == base]
    averages = sorted({record.context["average"] for record in records if "average" in record.context})
    dense = next(float(r.value or 0) for r in records if r.subject == "dense" and r.name == "loss")
    rises: dict[str, dict[float, str]] = {}
    values: dict[float, dict[str, float]] = {}
    for record in records:
        if record.name != "loss" or "row" not in record.context or "average" not in record.context:
            continue
        average, row = record.context["average"], record.context["row"]
        rise = float(record.value or 0) - dense
        divergence = next(r for r in records if r.subject == record.subject and r.name == "kl_to_dense")
        row = re.sub(r" in \d bits", " in a bit less", row)
        values.setdefault(average, {})[row] = rise
        rises.setdefault(row, {})[average] = (
            f"{rise:.3f} ({divergence.value:.3f} ± {divergence.error or 0:.3f}; {record.context['bits']:.2f} bits)"
        )
    lines = [f"| {base} | " + " | ".join(f"{average:g} bits" for average in averages) + " |"]
    lines.append("|---" * (len(averages) + 1) + "|")
    for row, cells in sorted(rises.items(), key=lambda item: (item[0] != "nearest", "llm-compressor" not in item[0])):
        shown = [cells.get(average, "") for average in averages]
        best = [values[average].get(row) == min(values[average].values()) for average in averages]
        lines.append(
            f"| {row} | " + " | ".join(f"**{c}**" if b and c else c for c, b in zip(shown, best, strict=True)) + " |"
        )
    return [*lines, *peer_table(records, base, dense)]


def peer_table(records: Sequence[Record], base: str, dense: float) -> list[str]:
    """Quantizers at bytes of their own, and one budget at theirs."""
    found = {(record.context["row"], record.name): record for record in records if "peer" in record.context}
    names = [row for row, name in found if name == "loss" and not row.startswith("rankfold")]
    lines = [f"| {base}, at the bytes of | bits | its rise | rankfold's | rankfold's over its |", "|---" * 5 + "|"]
    for name in names:
        cells, rises = [], []
        for row in (name, f"rankfold, bits and ranks, at the bytes of {name}"):
            if (row, "loss") not in found:
                cells.append("")
                continue
            divergence = found[row, "kl_to_dense"]
            rises.append(float(found[row, "loss"].value or 0) - dense)
            cells.append(f"{rises[-1]:.4f} ({divergence.value:.4f} ± {divergence.error or 0:.4f})")
        ratio = f"{rises[1] / rises[0]:.2f}" if len(rises) == 2 else ""
        bits = found[name, "loss"].context["bits"]
        lines.append(f"| {name} | {bits:.2f} | {cells[0]} | {cells[1]} | {ratio} |")
    return ["", *lines, ""] if names else [""]


def one_budget() -> list[str]:
    """One budget over bits and ranks beside the same bits everywhere."""
    records = read("one_budget")
    if not records:
        return []
    loss = next(record for record in records if record.name == "loss" and record.subject == "dense")
    used = loss.context["calibration"]
    lines = [
        "# One budget over bits and ranks",
        "",
        "`python benchmarks/one_budget.py MODEL --calibration TEXT --text TEXT`; rotated models: `python experiments/rotate.py MODEL OUT`. Rise of the loss over",
        f"the dense model's in nats per token (in brackets the divergence from its predictions, and the bits a weight of the sites, everything counted), on "
        f"{loss.context['tokens']:,} tokens of {loss.context['data']},",
        f"calibrated on {used['tokens']:,} tokens of {used['corpus']}, seed 0. One thread of a shared {loss.context['hardware']['cpu'].split(' @')[0]}, "
        f"{made_with(records)}. These weights once had 4 bits: rotation takes them off that grid.",
        "",
    ]
    for base in dict.fromkeys(record.context["base"] for record in records):
        lines += budget_table(base)
    return lines


def few_bits_cost() -> list[str]:
    """What one budget costs to make, beside the same bits everywhere."""
    found = {(record.context["row"], record.name): record for record in read("few_bits_cost")}
    if not found:
        return []
    rows = dict.fromkeys(row for row, _ in found)
    base = {name: float(found["GPTQ", name].value or 1) for name in ("processor_time", "peak_memory")}
    facts = found["GPTQ", "processor_time"].context
    lines = [
        f"What it takes ({found['GPTQ', 'processor_time'].subject}, {facts['sequences']} x {facts['length']} tokens, whole commands, one thread; `python "
        "benchmarks/few_bits_cost.py MODEL --calibration TEXT`):",
        "",
        "| | processor seconds | peak memory, GB | times GPTQ's seconds | times its memory |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        seconds, memory = (float(found[row, name].value or 0) for name in base)
        ratios = seconds / base["processor_time"], memory / base["peak_memory"]
        lines.append(f"| {row} | {seconds:,.0f} | {memory / 1e9:.1f} | {ratios[0]:.1f} | {ratios[1]:.1f} |")
    return [*lines, ""]


def adapters() -> list[str]:
    """`rankfold adapt` beside other ways to an adapter at equal bytes."""
    records = read("adapters")
    if not records:
        return []
    lines = [
        "# Adapters of a difference",
        "",
        "`python benchmarks/adapters.py MODEL --calibration TEXT --text TEXT --tune TEXT`: rise of the loss over the target's, nat/token (in brackets the",
        f"divergence from its predictions), at equal bytes. {records[0].context['base']}; NF4 (bitsandbytes) and GPTQ in 3 bits calibrated and compensated on",
        "WikiText-2, a fine-tune of all weights on TinyStories. mergekit extracts by the truncated SVD, EoRA weighs the inputs alone; both at one rank.",
        "",
    ]
    for pair in dict.fromkeys(record.context["pair"] for record in records):
        own = {(r.subject, r.name): r for r in records if r.context["pair"] == pair}
        dense = float(own["target", "loss"].value or 0)

        def cell(subject: str, own: Mapping[tuple[str, str], Record] = own, dense: float = dense) -> str:
            divergence = own[subject, "kl_to_dense"]
            rise = float(own[subject, "loss"].value or 0) - dense
            return f"{rise:.4f} ({divergence.value:.4f} ± {divergence.error or 0:.4f})"

        made = [r for r in own.values() if r.name == "loss" and "rank" in r.context]
        ranks = sorted({r.context["rank"] for r in made})
        sizes = {rank: min(r.context["bytes"] for r in made if r.context["rank"] == rank) for rank in ranks}
        tokens = own["target", "loss"].context["tokens"]
        lines += [
            f"| {pair}: without an adapter {cell('without')}; {tokens:,} tokens | "
            + " | ".join(f"{sizes[rank] / 1e6:.1f} MB (rank {rank})" for rank in ranks)
            + " |",
            "|---" * (len(ranks) + 1) + "|",
        ]
        for way in dict.fromkeys(r.context["row"] for r in made):
            cells = [cell(f"{way}, the bytes of rank {rank}") for rank in ranks]
            lines.append(f"| {way} | " + " | ".join(cells) + " |")
        lines.append("")
    if not any("judged" in r.context for r in records):
        lines += [
            "`rankfold adapt` chose its one rank by predicted losses when these rows were made; it measures a few ranks now.",
            "",
        ]
    shown = [r for r in records if r.name == "loss" and "llama_cpp_distance" in r.context]
    if shown:
        listed = ", ".join(f"{r.context['pair']} {r.context['llama_cpp_distance']:.1e}" for r in shown)
        lines += [
            "The adapter of rank 8 in llama.cpp (converted by its own scripts, float32): distance of the logits from PEFT's, over what the adapter changes: "
            f"{listed}.",
            "",
        ]
    return lines


def claim() -> str:
    """What one budget loses at the bytes of other people's quantizers, as a share of what these lose."""
    records = read("one_budget")
    dense = {r.context["base"]: float(r.value or 0) for r in records if r.name == "loss" and r.subject == "dense"}
    rises: dict[tuple[str, str], dict[str, float]] = {}
    for record in records:
        if "peer" not in record.context or "rotated" not in record.context["base"]:
            continue
        *_, name = record.context["row"].rsplit(" of ", 1)
        lost = float(record.value or 0) - (dense[record.context["base"]] if record.name == "loss" else 0)
        side = "own" if record.context["row"].startswith("rankfold") else "theirs"
        rises.setdefault((name, record.name), {})[side] = lost

    def ratio(name: str, what: str) -> float:
        return rises[name, what]["own"] / rises[name, what]["theirs"]

    whole = sorted(
        (ratio(name, what), name) for (name, what), rise in rises.items() if what == "loss" and len(rise) == 2
    )
    if not whole:
        return ""
    bits = {r.context["row"]: r.context["bits"] for r in records if "peer" in r.context and r.name == "loss"}
    listed = ", ".join(
        f"{share:.2f} ({ratio(name, 'kl_to_dense'):.2f}) of {name} at {bits[name]:.1f} bits a weight"
        for share, name in whole
    )
    facts = next(r.context for r in records if r.name == "loss" and r.subject == "dense")
    base = next(base for base in dense if "rotated" in base).partition(",")[0]
    return (
        f"**At equal bytes, one budget over bits and ranks loses less than the other quantizers measured on {base}**: its rise of the loss "
        f"is, as a share of theirs, {listed} (in brackets: the divergence from dense's predictions). One model, one seed, calibrated on its validation text. WikiText-2 test, {facts['tokens']:,} tokens; K-quants by llama.cpp with an "
        "importance matrix, NF4 and INT8 by bitsandbytes, SpQR ours; weights rotated off the 4-bit grid of their file. More: [docs/quality.md](docs/quality.md)."
    )


def own_labels(records: Sequence[Record]) -> list[Record]:
    """The default's rows of the grid, at the keeps at which labels were drawn from the model too."""
    return [
        replace(record, context={**record.context, "row": "labels of the text"})
        for record in chosen(records, "stories260K", "grid")
        if record.context["row"] == "rankfold" and record.context["keep"] in (0.8, 0.6)
    ]


def quality_page() -> str:
    """docs/quality.md: quality per byte, ablation, calibration size, labels, predictions."""
    records = read("quality")
    lines = [
        *section(),
        *grids(),
        *one_budget(),
        *few_bits_cost(),
        *adapters(),
        "# What each part is worth",
        "",
        "Perplexity on the last 30 % of the TinyStories sample, stories260K; ± as above.",
        "",
    ]
    titles = {
        "ablation": "Each part on top of the others, and the whole without it",
        "tokens": "Calibration size (256 tokens a sequence)",
        "labels": "Labels of the text or drawn from the model (three seeds)",
    }
    for part, title in titles.items():
        found = chosen(records, "stories260K", part)
        if part == "labels":
            found = [*own_labels(records), *found]
        if found:
            lines += [f"## {title}", "", *table(found, "row")]
    lines += ["## Predicted against measured loss", "", "`python experiments/predicted_loss.py MODEL`", ""]
    for path in sorted(RESULTS.glob("predicted_loss-*.jsonl")):
        found = {r.name: r.value for r in read(path.stem) if r.name != "measured_rise"}
        across, within = found["rank_correlation_across_sites"], found["mean_rank_correlation_within_sites"]
        ratio = found["median_measured_over_predicted"]
        lines += [
            f"{path.stem.removeprefix('predicted_loss-')}: rank correlation {across:.3f} across sites and ranks, {within:.3f} within a "
            f"site; measured over predicted, median {ratio:.2f}.",
            "",
            f"![Predicted and measured](figures/{path.stem}.svg)",
            "",
        ]
    return "\n".join(lines)


def frontier() -> dict[str, list[tuple[float, float]]]:
    """Perplexity of stories260K against the share of 16-bit bytes, by method."""
    records = read("quality")
    series: dict[str, list[tuple[float, float]]] = {}
    for record in chosen(records, "stories260K", "grid"):
        if record.context["seed"] == 0 and float(record.value or 0) < 130:
            series.setdefault(record.context["row"], []).append((record.context["stored"], float(record.value or 0)))
    for record in chosen(records, "stories260K", "trained"):
        row = record.context["row"]
        if row.startswith("rankfold +"):
            series.setdefault(row, []).append((record.context["stored"], float(record.value or 0)))
    for record in chosen(records, "stories260K", "plain"):
        series[PLAIN[record.context["row"]]] = [(record.context["stored"], float(record.value or 0))]
    return series


def with_numbers(readme: str) -> str:
    """The README with its numbers replaced."""
    block = re.compile(r"(<!-- numbers:begin -->\n).*?(<!-- numbers:end -->)", re.S)
    numbers = "\n\n".join(filter(None, (claim(), readme_table())))
    return block.sub(lambda match: f"{match[1]}{numbers}\n{match[2]}", readme)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_numbers(path.read_text()))
    (ROOT / "docs" / "quality.md").write_text(quality_page())
    (ROOT / "docs" / "figures").mkdir(exist_ok=True)
    draw_front(ROOT / "docs" / "figures")
    draw_points(
        frontier(),
        ROOT / "docs" / "figures" / "frontier.svg",
        title="stories260K: what a byte buys",
        axes=("share of the sites' 16-bit bytes", "perplexity on held-out stories"),
        lines=True,
    )
