"""Write docs/characterization.md from the results: python experiments/characterization_page.py."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping

from lord_page import by_row, subjects, table, with_error
from observations import observations
from results import ROOT, read
from studies import ARCHITECTURES, REAL, apart, depth_of, per_parameter, study

from rankfold.record import Record

MODELS = (REAL, "MiniLM", "pycode-llama", "stories260K")
"""The real models first."""


def number(record: Record | None, digits: int = 3) -> str:
    """A rise with its error; of a classifier in points of accuracy lost."""
    if record is None or record.value is None:
        return "-"
    if record.unit == "1":
        return f"{100 * record.value:.1f} ± {100 * (record.error or 0):.1f} points"
    return f"{record.value:.{digits}f} ± {record.error or 0:.{digits}f}"


def depth() -> Iterator[str]:
    """Blocks, kinds and ranks."""
    yield "## One block at a time"
    yield ""
    for model in MODELS:
        found = study(model, "block")
        blocks = list(dict.fromkeys(group for group, _ in found))
        if not blocks:
            continue
        rows = []
        for block in blocks:
            if (block, 0.0) not in found:
                continue
            pair = found.get((block, 0.25)), found[block, 0.0]
            per = ["-" if record is None else f"{per_parameter(record) / 100:.4f}" for record in pair]
            rows.append([block.rpartition(".")[2], *map(number, pair), *per])
        header = [f"{model}: block", "quarter of the full rank", "rank 1", "per % removed at a quarter", "at rank 1"]
        yield from table(header, rows)
        yield from _depth_says(model, found)
    yield "## One tensor kind at a time"
    yield ""
    for model in MODELS:
        found = study(model, "kind")
        kinds = list(dict.fromkeys(group for group, _ in found))
        rows = [[kind, number(found.get((kind, 0.25))), number(found.get((kind, 0.0)))] for kind in kinds]
        if rows:
            yield from table([f"{model}: kind, in all blocks", "quarter of the full rank", "rank 1"], rows)


def _depth_says(model: str, found: Mapping[tuple[str, float], Record]) -> Iterator[str]:
    """What the paper's observations on depth are worth here."""
    depth = depth_of(found)
    early = "holds" if depth.first_is_worst else "does not hold"
    late = "holds" if depth.last_three <= 1 else "does not hold"
    yield (
        f"- *Early blocks matter most* {early} on {model}: at rank 1 the first block costs {depth.first:.1f} times the "
        f"median block. *The last three matter little* {late}: they cost {depth.last_three:.1f} times "
        f"the median on average, the last one {depth.last:.1f} times."
    )
    if depth.blocks:
        yield (
            f"- *Rank 1 is the best trade*: per parameter removed it is cheaper than a quarter of the rank in {depth.better} "
            f"of {depth.blocks} blocks."
        )
    yield ""


def distance() -> Iterator[str]:
    """Blocks apart: what they cost together against alone."""
    yield "## Three blocks at rank 1, near and far"
    yield ""
    yield "Blocks differ, so the rise of three together is set against the sum of what each costs alone: above 1 they make each other worse."
    yield ""
    for model in MODELS:
        ratios, rises = apart(model)
        if not ratios:
            continue
        rows = [
            [apart, str(len(values)), f"{min(rises[apart]):.3f}", f"{statistics.median(rises[apart]):.3f}",
             f"{statistics.median(values):.2f}"]
            for apart, values in ratios.items()
        ]  # fmt: skip
        header = [f"{model}: distance", "places", "least rise", "median rise", "median ratio to the sum"]
        yield from table(header, rows)
        near, far = statistics.median(ratios["1"]), statistics.median(list(ratios.values())[-1])
        verdict = "holds" if far < 0.95 * near else "does not show"
        yield f"*Spread the blocks* {verdict} on {model}: the ratio goes from {near:.2f} for neighbours to {far:.2f} for the furthest."
        yield ""


def architectures() -> Iterator[str]:
    """The same studies on every architecture, a line each."""
    yield "## Architectures side by side"
    yield ""
    yield "One block, one kind, three blocks at rank 1 in models of other architectures, four to twelve blocks, trained on the same text but for the last two. Depth: the"
    yield "first block, the mean of the last three, and the last one as multiples of the median block. Kinds: the least and the most sensitive one for each parameter removed."
    yield "Together: median rise of three blocks over the sum of what each costs alone, neighbours and furthest apart."
    yield ""
    rows, depths, spreads = [], [], []
    for model, kind in ARCHITECTURES.items():
        blocks, kinds = study(model, "block"), study(model, "kind")
        if not blocks:
            continue
        depth = depth_of(blocks)
        at_one = {group: per_parameter(record) for (group, share), record in kinds.items() if share == 0}
        order = sorted(at_one, key=lambda group: at_one[group])
        ratios = [statistics.median(values) for values in apart(model)[0].values()]
        together = f"{ratios[0]:.2f}, {ratios[-1]:.2f}" if ratios[1:] else "-"
        spreads += [ratios] if ratios[1:] else []
        depths.append(depth)
        shown = [f"{value:.1f}" for value in (depth.first, depth.last_three, depth.last)]
        better = f"{depth.better} of {depth.blocks}" if depth.blocks else "-"
        rows.append([f"{kind} ({model})", *shown, order[0], order[-1], better, together])
    header = ["model", "first", "last three", "last", "least sensitive", "most sensitive", "rank 1 is the better trade"]
    yield from table([*header, "together"], rows)
    yield (
        f"*Early blocks matter most*: the first block costs more than twice the median in {sum(d.first > 2 for d in depths)} of {len(depths)} models. *The last three matter "
        f"little*: they cost no more than the median in {sum(d.last_three <= 1 for d in depths)}. *Spread the blocks*: far ones disturb each other less than neighbours in "
        f"{sum(far < 0.95 * near for near, *_, far in spreads)} of {len(spreads)}. *Rank 1 is the best trade* in most blocks of {sum(2 * d.better > d.blocks for d in depths)}."
    )
    yield ""


def nine_percent() -> Iterator[str]:
    """The paper's point, and dropping the blocks instead."""
    records = read("characterization")
    point = {record.name: record for record in records if record.subject == "Llama-2-7B"}
    yield "## The paper's 9 % point, and dropping the blocks instead"
    yield ""
    if point:
        yield (
            f"Llama-2-7B from its configuration: three of 32 blocks at rank 1 in all seven tensors remove "
            f"{100 * float(point['removed'].value or 0):.2f} % of {point['parameters'].value:,} parameters; "
            f"{point['left'].value:,} of theirs are left."
        )
        yield ""
    for model in subjects(records):
        pairs = [(row, v) for row, v in by_row(records, model) if "removed" in v and "rank 1" in v]
        if not pairs:
            continue
        better = sum(float(v["rank 1"].value or 0) < float(v["removed"].value or 0) for _, v in pairs)
        best = sorted(pairs, key=lambda pair: float(pair[1]["rank 1"].value or 0))[:4]
        rows = [[row, with_error(v["rank 1"]), with_error(v["removed"])] for row, v in best]
        yield from table([f"{model}: the four cheapest of {len(pairs)} choices", "rank 1", "blocks removed"], rows)
        yield f"Rank 1 costs less than removing the same blocks in {better} of {len(pairs)} choices of three blocks: it is close to depth pruning."
        yield ""


def tasks() -> Iterator[str]:
    """Tasks side by side."""
    records = read("characterization")
    yield "## Some tasks are more sensitive than others"
    yield ""
    for model in ("pycode-llama", "stories260K"):
        found = [(row, v) for row, v in by_row(records, model) if any(name.startswith("loss ") for name in v)]
        if not found:
            continue
        names = list(found[0][1])
        rows = [[row, *(with_error(v[name], percent=name.startswith("choice")) for name in names)] for row, v in found]
        yield from table([model, *names], rows)
    yield "Choice: the true continuation found among four, likelihood without the context taken off, 25 % by chance; Tucker without data, all sites."
    yield ""


def benchmarks() -> Iterator[str]:
    """The benchmarks, dense beside compressed."""
    records = read("benchmarks")
    if not records:
        return
    yield "## Benchmarks from local files"
    yield ""
    yield "`python experiments/benchmarks.py ASSETS`: stories260K dense and at keep 0.8 through lm-evaluation-harness, 200 questions each (MMLU 5 of each of 57 subjects,"
    yield "GSM8K 20). A model of 260,000 parameters is at chance on these: the rows show how dense and compressed are compared, not what low rank costs on them."
    yield ""
    by_name = {(record.subject, record.name): record for record in records if not record.is_difference}
    differences = {record.name: record for record in records if record.is_difference}
    rows = []
    for (subject, name), record in by_name.items():
        if subject != "dense":
            continue
        small = by_name["rankfold, keep 0.8", name]
        apart = differences[name]
        chance = apart.context.get("mcnemar_p")
        facts = record.context
        rows.append(
            [name, f"{facts['items']}", f"{'mixed' if facts['shots'] is None else facts['shots']}",
             *(with_error(value, percent=True) for value in (record, small, apart)),
             "-" if chance is None else f"{chance:.2f}"]
        )  # fmt: skip
    header = ["benchmark", "questions", "examples", "dense", "keep 0.8", "difference", "p (McNemar)"]
    yield from table(header, rows)
    yield "Factual consistency is TruthfulQA and LAMBADA of these: `rankfold benchmark MODEL --dense DENSE --task truthfulqa_mc1 --task lambada_openai`, for models that can do them."
    yield ""


def counts() -> Iterator[str]:
    """Number of blocks, and what it costs beside the dense model."""
    yield "## Ever more blocks at rank 1"
    yield ""
    for model in MODELS:
        found = study(model, "count")
        rows = []
        for (group, _), record in found.items():
            cost = record.context.get("cost", {})
            ratios = [cost.get("prefill_ratio"), cost.get("decode_ratio")]
            shown = ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
            contended = "yes" if cost.get("contended") else "no"
            removed = f"{100 * record.context['removed_of_model']:.1f} %"
            rows.append([group, removed, number(record), *shown, contended])
        if rows:
            header = [model, "removed", "rise", "prefill / dense", "decode / dense", "machine contended"]
            yield from table(header, rows)
    yield "Models of a million parameters are so small that calls cost more than products: fewer parameters do not make them faster. Energy: this machine shows no counter."
    yield ""


def roofline() -> Iterator[str]:
    """Predicted against measured time."""
    records = read("roofline")
    if not records:
        return
    facts = records[0].context
    yield "## Roofline"
    yield ""
    yield (
        f"`python experiments/roofline.py`: Llama-2-7B's shapes, one token, float32, one thread: {facts['bytes_per_second'] / 1e9:.1f} GB/s and "
        f"{facts['flops_per_second'] / 1e9:.0f} GFLOP/s measured. Low rank takes bytes and multiplications away alike, so the intensity stays: *intensity rises* does not hold for one token."
    )
    yield ""
    rows = [
        [row, f"{v['intensity'].value:.2f}", f"{1e3 * float(v['predicted'].value or 0):.2f}",
         f"{1e3 * float(v['measured'].value or 0):.2f}", f"{v['ratio'].value:.2f}",
         "yes" if v["ratio"].context["contended"] else "no"]
        for row, v in by_row(records, records[0].subject)
    ]  # fmt: skip
    yield from table(["layer", "FLOPs a byte", "predicted, ms", "measured, ms", "ratio", "machine contended"], rows)


def searches() -> Iterator[str]:
    """The design space searched."""
    records = read("explore")
    if not records:
        return
    yield "## The design space searched"
    yield ""
    yield "`python experiments/explore.py`: pycode-llama, kfac at eighths of the full rank on 84 sites, 200 trials, quality and bytes. Hypervolume up to 2 nat and the"
    yield "dense bytes, as a share of that box; the other columns are the least rise of the loss within a share of the bytes."
    yield ""
    rows = []
    volumes: dict[str, list[float]] = {}
    for row, v in by_row(records, "pycode-llama"):
        volumes.setdefault(row.partition(", seed")[0], []).append(float(v["hypervolume"].value or 0))
        best = [v[f"within {budget}%"].value for budget in (90, 80, 70, 60)]
        rows.append([row, f"{v['hypervolume'].value:.4f}", *("-" if b and b > 90 else f"{b:.3f}" for b in best)])
    yield from table(["search", "hypervolume", "within 90 %", "within 80 %", "within 70 %", "within 60 %"], rows)
    if "tpe" in volumes and "random" in volumes:
        ratios = [a / b if b else float("inf") for a, b in zip(volumes["tpe"], volumes["random"], strict=False)]
        policies = [a / b for a, b in zip(volumes["tpe"], volumes["random-policies"], strict=False)]
        yield (
            f"TPE reaches {min(ratios):.2f} to {max(ratios):.2f} times the hypervolume of points drawn at random, and "
            f"{min(policies):.2f} to {max(policies):.2f} times that of policies drawn at random, which know the predicted losses too."
        )
        yield ""


def stacks() -> Iterator[str]:
    """CP and tensor train."""
    records = read("joint_decompositions")
    if not records:
        return
    yield "## CP and tensor train beside Tucker"
    yield ""
    yield "`python experiments/joint_decompositions.py`: stacks of pycode-llama decomposed together without data, saved and run as they are. Errors are shares of the"
    yield "squared norm; of CP the mean and the spread over five seeds."
    yield ""
    rows = []
    for row, v in by_row(records, "pycode-llama"):
        rise = with_error(v["rise"])
        error = with_error(v["error"])
        rows.append([row, f"{100 * float(v['stored'].value or 0):.1f} %", error, rise, f"{v['seconds'].value:.1f}"])
    yield from table(["stack and form", "stored", "error", "rise, nat/token", "CPU seconds"], rows)


def late() -> Iterator[str]:
    """Adaptive ranks."""
    records = read("adaptive_rank")
    if not records:
        return
    yield "## Ranks chosen late"
    yield ""
    yield "`python experiments/adaptive_rank.py`: one nested checkpoint cut to a budget beside a static model of that budget; and a rank for every token beside the static"
    yield "rank of the same average cost, times as ratios to that static model."
    yield ""
    nested, token = [], []
    for row, v in by_row(records, "pycode-llama"):
        if "nested" in v:
            nested.append([row, f"{v['parameters'].value:,}", with_error(v["nested"]), with_error(v["static"])])
        else:
            ratios = [f"{v[name].value:.2f}" for name in ("prefill", "decode")]
            token.append([row, f"{v['average'].value:,}", with_error(v["adaptive"]), with_error(v["static"]), *ratios])
    yield from table(["nested", "parameters", "nested, rise", "static, rise"], nested)
    yield from table(["per token", "numbers a token", "adaptive, rise", "static, rise", "prefill", "decode"], token)


def runs() -> Iterator[str]:
    """Long generation."""
    records = read("long_run")
    if not records:
        return
    yield "## Over 20,000 tokens"
    yield ""
    yield "`python experiments/long_run.py`: pycode-llama writes at temperature 0.8, reading at most 256 tokens. Perplexity is the dense model's of the text. Milliseconds"
    yield "depend on what else the shared machine did: they do not grow with the position, and say nothing about one model beside the other."
    yield ""
    rows = []
    for row, v in by_row(records, "pycode-llama"):
        shares = [f"{100 * float(v[name].value or 0):.1f} %" for name in ("repeated", "distinct")]
        rows.append(
            [row, f"{v['perplexity'].value:.1f}", f"{v['kl'].value:.3f}", *shares,
             f"{1e3 * float(v['seconds'].value or 0):.1f}", f"{v['cache_bytes'].value:,}"]
        )  # fmt: skip
    header = ["model and position", "perplexity", "KL to dense", "4-grams repeated", "bigrams distinct", "ms a token"]
    yield from table([*header, "bytes kept"], rows)


def recoveries() -> Iterator[str]:
    """What recovery gives back."""
    records = read("recovery")
    if not records:
        return
    yield "## Recovery"
    yield ""
    yield "`python experiments/recovery.py`: pycode-starcoder at keep 0.6 drawn to the dense model's predictions; one setting at a time around a centre of 150 steps of"
    yield "16 x 256 tokens, all factors, the default rate, all of the sample. Rise of the loss on held-out Python; NF4 is the dense model in 4 bits with adapters trained alike."
    yield ""
    rows = [
        [row, with_error(v["before"]), with_error(v["after"]),
         f"{100 * (1 - float(v['after'].value or 0) / float(v['before'].value or 1)):.0f} %", f"{v['steps'].value}",
         f"{v['seconds'].value:.0f}"]
        for row, v in by_row(records, "pycode-starcoder")
    ]  # fmt: skip
    yield from table(["changed", "before", "after", "regained", "steps", "CPU seconds"], rows)


def page() -> str:
    """The whole page."""
    lines = [
        "# What low rank costs where",
        "",
        "The studies of arXiv:2405.06626 on models at hand, written by `python experiments/characterization_page.py`. Tucker without data, as in the paper, unless said",
        "otherwise: `python experiments/characterization.py ASSETS`. Rises are of the loss on held-out text in nats per token, for the classifier points of accuracy lost;",
        "± is the standard error over windows or rows. Two shared x86-64 cores, one thread; the models named pycode and stories have under a million parameters.",
        "",
    ]
    for part in (
        observations,
        depth,
        distance,
        architectures,
        nine_percent,
        counts,
        tasks,
        benchmarks,
        roofline,
        searches,
        stacks,
        late,
        runs,
        recoveries,
    ):
        lines += part()
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "characterization.md").write_text(page())
