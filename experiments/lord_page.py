"""Write docs/lord.md from the results of the experiments on LoRD: python experiments/lord_page.py."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from real_model_page import bases, megabytes, rows_of, speeds
from results import RESULTS, ROOT, read

from rankfold.record import Record


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def with_error(record: Record | None, digits: int = 3, percent: bool = False) -> str:
    """A value and its standard error; a dash where there is none."""
    if record is None or record.value is None:
        return "-"
    scale, unit = (100, "%") if percent else (1, "")
    digits = 1 if percent else digits
    error = "" if record.error is None else f" ± {scale * record.error:.{digits}f}"
    return f"{scale * record.value:.{digits}f}{error}{unit}"


def by_row(records: Sequence[Record], subject: str) -> Iterator[tuple[str, dict[str, Record]]]:
    """The values of every row of a subject, by name."""
    chosen = [record for record in records if record.subject == subject]
    for row in dict.fromkeys(record.context["row"] for record in chosen):
        yield row, {record.name: record for record in chosen if record.context["row"] == row}


def subjects(records: Sequence[Record]) -> list[str]:
    """Subjects in the order in which they were measured."""
    return list(dict.fromkeys(record.subject for record in records))


def real_model() -> Iterator[str]:
    """What was measured of LoRD and rankfold on a real code model."""
    for base in bases("code_quality"):
        rows = rows_of(base, "code_quality")
        dense = next((row for row in rows if row.name == "dense"), None)
        if dense is None:
            continue
        files = [name.removesuffix(" pass@1") for name, _ in dense.found if name.endswith(" pass@1")]
        yield f"## {base}"
        yield ""
        yield "`python benchmarks/code_quality.py MODEL --programs HumanEval.jsonl.gz --work FOLDER`"
        yield ""
        header = [base, "bytes on disk", "perplexity", "rise of the loss"]
        for file in files:
            header += [f"{file} pass@1", "minus dense, in pairs"]
        cells = []
        for row in rows:
            rise = row.rise(dense)
            cell = [row.name, megabytes(row), f"{math.exp(row.value('loss')):.2f}"]
            cell.append("" if row is dense else f"{rise.value:.3f} ± {rise.error:.3f}")
            for file in files:
                passed = row.record(f"{file} pass@1")
                if passed is None:
                    cell += ["", ""]
                    continue
                low, high = passed.context["interval"]
                cell.append(f"{passed.value:.1%} ({low:.1%} to {high:.1%})")
                cell.append("" if row is dense else str(row.beside(dense, [file])))
            cell += [speeds(row, "decode"), speeds(row, "prefill")] if row is not dense else ["", ""]
            cells.append(cell)
        yield from table([*header, "decode, times dense", "prompt, times dense"], cells)
        facts = dense.found["loss", None].context
        shown = ", ".join(
            f"{file}: {dense.found[f'{file} pass@1', None].context['tasks']} tasks, greedy, at most "
            f"{dense.found[f'{file} pass@1', None].context['new_tokens']} tokens"
            for file in files
        )
        yield (
            f"{facts['data']}, {facts['tokens']:,} tokens scored; {shown}; in brackets the 95 % interval, differences in pairs ± one standard error. "
            f"Calibrated on {facts['calibration']['tokens']:,} tokens of {facts['calibration']['corpus']}; keep is the share of the linear layers' parameters (the paper counts the whole model's and cuts down-projections alone); the file holds the head apart from the embedding. Speed on one thread of a shared "
            f'{facts["hardware"]["cpu"].split(" @")[0]} beside other work: as loaded / both with `prefer(model, "speed")`. torch {facts["versions"]["torch"]}, transformers '
            f"{facts['versions']['transformers']}, seed 0. The file's weights had 4 to 8 bits."
        )
        yield ""


def sizes() -> Iterator[str]:
    """Parameters of the published models."""
    yield "## Sizes of the published models"
    yield ""
    yield "`python experiments/lord_sizes.py`: StarCoder from its configuration, down-projections of all 40 blocks at the published ranks."
    yield ""
    rows = [
        [f"{r.context['rank'] or 'full'}", f"{r.value:,}", r.context["truncated"], r.context["published"] or "-"]
        for r in read("lord_sizes")
        if r.subject == "starcoder"
    ]
    yield from table(["rank of 6144", "parameters", "truncated", "published name"], rows)
    yield "CodeGen, one kind of layer at half of its break-even rank, parameters of the whole model:"
    yield ""
    family = [r for r in read("lord_sizes") if r.subject.startswith("codegen")]
    kinds = list(dict.fromkeys(r.context["kind"] for r in family))
    rows = [
        [
            size,
            *(f"{next(r.value for r in family if (r.subject, r.context['kind']) == (size, kind)):,}" for kind in kinds),
        ]
        for size in subjects(family)
    ]
    yield from table(["model", *kinds], rows)


def sensitivity() -> Iterator[str]:
    """One kind of layer at a time."""
    yield "## Which layers bear it"
    yield ""
    yield "`python experiments/lord_sensitivity.py`: LoRD of one kind of layer, or one block, at a time; rise of the loss in nats per token."
    yield ""
    for path in sorted(RESULTS.glob("lord_sensitivity-*-kind.jsonl")):
        records = read(path.stem)
        model = records[0].subject
        shares = sorted({r.context["share"] for r in records}, reverse=True)
        rows = []
        for group in dict.fromkeys(r.context["group"] for r in records):
            found = {r.context["share"]: r for r in records if r.context["group"] == group}
            gains = [r for r in found.values() if r.context["removed"] > 0 and r.value is not None]
            best = min((float(r.value or 0) / (100 * r.context["removed_of_model"]) for r in gains), default=None)
            cells = [with_error(found[share]) for share in shares if share in (0.75, 0.5, 0.25)]
            rows.append([group, *cells, "-" if best is None else f"{best:.4f}"])
        header = ["kind", *(f"{share:g} of full rank" for share in (0.75, 0.5, 0.25)), "least nat per % of the model"]
        yield from table([f"{model}: {header[0]}", *header[1:]], rows)
        yield f"![By kind](figures/sensitivity-{model}-kind.svg) ![By block](figures/sensitivity-{model}-block.svg)"
        yield ""


def choices() -> Iterator[str]:
    """Ranks chosen in different ways."""
    records = read("lord_sensitivity")
    yield "## Ranks chosen from it"
    yield ""
    yield "LoRD of all layers in two factors; rise of the loss in nats per token. The paper leaves the best strategy open: here the"
    yield "predicted loss of every site (docs/mathematics.md, eq. 8), which needs one pass forward and back, beats measured curves."
    yield ""
    for model in subjects(records):
        rows: dict[str, list[str]] = {}
        for row, values in by_row(records, model):
            keep, _, way = row.partition(": ")
            rows.setdefault(way, []).append(with_error(values["rise"]))
            assert keep.startswith("keep"), row
        keeps = list(dict.fromkeys(row.partition(": ")[0] for row, _ in by_row(records, model)))
        yield from table([f"{model}: ranks", *keeps], ([way, *cells] for way, cells in rows.items()))


def quantization() -> Iterator[str]:
    """Few bits on top."""
    records = read("lord_quantization")
    yield "## Few bits on top"
    yield ""
    yield "`python experiments/lord_quantization.py`: rise of the loss over the dense model in nats per token, and bytes of the blocks'"
    yield "matrices, scales, zero points, outliers and filled-up ranks counted. To nearest and GPTQ: groups of 24 with 32 bits of statistics."
    yield ""
    for model in subjects(records):
        starts = list(dict.fromkeys(r.context["start"] for r in records if r.subject == model))
        rows: dict[str, list[str]] = {}
        for _, values in by_row(records, model):
            scheme = values["rise"].context["scheme"]
            size = float(values["bytes"].value or 0) / 1000
            rows.setdefault(scheme, []).append(f"{with_error(values['rise'])} at {size:.0f} kB")
        complete = ([scheme, *cells] for scheme, cells in rows.items() if len(cells) == len(starts))
        yield from table([model, *starts], complete)
    yield "The pivoted form is the smaller one in 16 and 8 bits and the wrong one in 4: an error of a pivot row reaches every row that"
    yield 'uses it. Compress with two factors (`allocate(..., form="low_rank")`) what 4 bits or fewer are to follow. Pruning two of four'
    yield "weights on top of anything costs more than it saves on models of this size."
    yield ""


def code_quality() -> Iterator[str]:
    """What the models still write."""
    records = read("lord_quality")
    if not records:
        return
    yield "## Code that the model still writes"
    yield ""
    yield "`python experiments/lord_quality.py HumanEval.jsonl.gz`: pycode-starcoder, 10 samples of each of 164 tasks at temperature 0.6. A model of a"
    yield "million parameters solves none of them, dense or not, so the other columns tell models apart."
    yield ""
    rows = []
    for model in subjects(records):
        for row, v in by_row(records, model):
            high = v["pass@10 high"].value or 0
            share = ["choice", "next_line", "parses", "knows_names"]
            rows.append(
                [row, f"{v['parameters'].value:,}", with_error(v["perplexity"], 1), f"{v['pass@1'].value:.1%}",
                 f"{v['pass@10'].value:.1%} (below {high:.1%})", *(with_error(v[name], percent=True) for name in share)]
            )  # fmt: skip
    header = [
        "model",
        "parameters",
        "perplexity",
        "pass@1",
        "pass@10",
        "true continuation",
        "next line",
        "parses",
        "knows its names",
    ]
    yield from table(header, rows)


def qlora() -> Iterator[str]:
    """Adapters over weights in few bits."""
    records = read("lord_qlora")
    if not records:
        return
    yield "## QLoRA over the compressed model"
    yield ""
    yield "`python experiments/lord_qlora.py`: adapters of rank 16 over NF4 weights, two steps of 2 x 256 tokens in a process of its own. The weights are"
    yield "smaller, but a factorized layer takes two pairs of adapters, and activations dominate: the 21.2 % that the paper saves are not seen here."
    yield ""
    memory, loss = [], []
    for model in subjects(records):
        for row, v in by_row(records, model):
            if "peak" in v:
                parts = (v["weights"].value, v["adapters"].value, v["peak"].value)
                memory.append([row, f"{v['parameters'].value:,}", *(f"{float(p or 0) / 2**20:.0f}" for p in parts)])
            else:
                loss.append([row, f"{v['parameters'].value:,}", f"{v['before'].value:.3f}", f"{v['after'].value:.3f}"])
    header = [
        "GPTBigCode, 305 M, random",
        "parameters",
        "weights, MiB",
        "adapters, gradients, optimizer, MiB",
        "peak over imports, MiB",
    ]
    yield from table(header, memory)
    yield from table(["pycode-starcoder", "parameters", "held-out loss before", "after 200 steps"], loss)


def ratios(found: dict[str, Record], dense: dict[str, Record], names: Sequence[str]) -> list[str]:
    """Values as many times as the dense model's."""
    return [f"{float(found[name].value or 0) / float(dense[name].value or 1):.2f}" for name in names]


def steps() -> Iterator[str]:
    """One compressor after the other."""
    records = read("lord_steps")
    if not records:
        return
    yield "## Other compressors on top"
    yield ""
    yield "`python experiments/lord_steps.py`: each row is the one before and one step more; 200 steps of distillation. Bytes are those of the blocks' matrices. Speeds"
    yield "are times as fast as the dense model, taking turns on one thread. PyTorch has 2:4 kernels for CUDA only, so zeros are multiplied here, and models of a"
    yield "million parameters are bound by the overhead of calls, not by what a step saves."
    yield ""
    for model in subjects(records):
        found = list(by_row(records, model))
        dense = found[0][1]
        rows = []
        for name, v in found:
            speeds = ratios(v, dense, ("prefill_1", "decode_1", "prefill_16", "decode_16"))
            rows.append([name, with_error(v["rise"]), f"{v['bits'].value:.2f}", f"{v['bytes'].value:,.0f}", *speeds])
        header = ["rise, nat/token", "bits a weight", "bytes", "prefill, batch 1", "decode, batch 1"]
        yield from table([model, *header, "prefill, batch 16", "decode, batch 16"], rows)


def speed() -> Iterator[str]:
    """Speed against parameters."""
    records = read("lord_speed")
    if not records:
        return
    yield "## Speed against parameters"
    yield ""
    yield "`python experiments/lord_speed.py`: down-projections at the shares of the full rank of the released StarCoders, dense and compressed taking turns on one"
    yield "thread, float32. Speeds are times as fast as the dense model; at most: what bytes (decoding) and multiplications (prefill) allow. The paper's best is"
    yield "22.35 % on an A100."
    yield ""
    for model in subjects(records):
        found = list(by_row(records, model))
        dense = found[0][1]
        rows = []
        for name, v in found:
            speeds = ratios(v, dense, ("decode_1", "decode_8", "prefill_1", "prefill_8"))
            limits = [f"{v['decode_limit'].value:.2f}", f"{v['prefill_limit'].value:.2f}"]
            share = float(v["parameters"].value or 0) / float(dense["parameters"].value or 1)
            contended = "yes" if v["parameters"].context["contended"] else "no"
            rows.append([name, f"{share:.1%}", *speeds[:2], limits[0], *speeds[2:], limits[1], contended])
        header = [
            model,
            "parameters",
            "decode, batch 1",
            "decode, batch 8",
            "at most",
            "prefill, batch 1",
            "prefill, batch 8",
            "at most",
            "machine contended",
        ]
        yield from table(header, rows)


def page() -> str:
    """The whole page."""
    lines = [
        "# LoRD on models of code",
        "",
        "The questions of arXiv:2309.14021 on a real code model, and its tables on the bundled models, written by `python experiments/lord_page.py` from `benchmarks/results`.",
        "On the bundled models: calibration on 128 x 256 tokens of the bundled sample; loss: held-out Python, ± the standard error over windows; seed 0, two shared x86-64 cores.",
        "",
    ]
    for part in (real_model, sizes, sensitivity, choices, quantization, steps, code_quality, qlora, speed):
        lines += part()
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "lord.md").write_text(page())
