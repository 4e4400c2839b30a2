"""`rankfold compress`: a budget in the user's words becomes a checkpoint."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from rankfold.allocation import ALLOCATIONS
from rankfold.calibration import default_length
from rankfold.checkpoint import load_model, load_tokenizer, save, tokenizer_if_any
from rankfold.cli.options import Device, Dtype, Model, Overwrite, Seed, SiteNames, read_plan, to_dtype
from rankfold.cli.summary import report_plan
from rankfold.cli.terminal import keeps, print_table, progress, say, stages
from rankfold.cost import SPEED_OF, fast_multiple, neighbouring_ranks, parameter_count, rank_seconds
from rankfold.errors import InputError
from rankfold.factorization import METHODS
from rankfold.modules import FORMS
from rankfold.pipeline import EFFORTS, Budget, Settings, as_corpus, note, parse_bytes
from rankfold.pipeline import compress as compress_model
from rankfold.shards import check_target
from rankfold.sites import Sites, find_sites


def compress(
    model: Model,
    output: Annotated[Path, typer.Argument(help="Folder of the compressed model; written completely or not at all.")],
    keep: Annotated[
        float | None,
        typer.Option(
            help="Fraction of the sites' parameters to keep, in (0, 1] (default: 0.8).", rich_help_panel="Budget"
        ),
    ] = None,
    bytes_: Annotated[
        str | None,
        typer.Option("--bytes", help="Bytes of the whole model, such as 9GB or 700MiB.", rich_help_panel="Budget"),
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option(
            help="Average bits of a weight of the sites, such as 3.5, counting everything that is stored for them.",
            rich_help_panel="Budget",
        ),
    ] = None,
    max_loss_increase: Annotated[
        float | None,
        typer.Option(
            help="Make the smallest model whose held-out loss increases by at most this, in nats per token.",
            rich_help_panel="Budget",
        ),
    ] = None,
    speedup: Annotated[
        float | None,
        typer.Option(
            help="Make the whole model so many times as fast on this machine, such as 1.5, by the seconds of its "
            "layers, which are timed here first.",
            rich_help_panel="Budget",
        ),
    ] = None,
    speed_of: Annotated[
        str,
        typer.Option(
            help=f"What --speedup is of: {' or '.join(SPEED_OF)} (128 tokens at once).", rich_help_panel="Budget"
        ),
    ] = "decode",
    rank: Annotated[int | None, typer.Option(help="An explicit rank for all sites.", rich_help_panel="Budget")] = None,
    plan: Annotated[
        Path | None, typer.Option(help="A plan from rankfold explore: forms and ranks.", rich_help_panel="Budget")
    ] = None,
    allow: Annotated[
        str | None,
        typer.Option(
            help="What to spend the budget on: rank, bits, or rank,bits (default: rank for --keep, otherwise both).",
            rich_help_panel="Budget",
        ),
    ] = None,
    embeddings: Annotated[
        int | None,
        typer.Option(
            help="Bits of the embeddings and the head, 2 to 8, or 16 to leave them (default: --bytes and "
            "--max-loss-increase choose, where they may be spent on bits; otherwise 16).",
            rich_help_panel="Budget",
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help=f"How to factorize: {', '.join(METHODS)}.", rich_help_panel="Method")
    ] = "kfac",
    allocation: Annotated[
        str | None,
        typer.Option(
            help=f"How to choose ranks: {', '.join(ALLOCATIONS)} (default: knapsack for kfac, otherwise uniform).",
            rich_help_panel="Method",
        ),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            help=f"How to store: {', '.join(n for n, f in FORMS.loadable().items() if f.make)}; pivoted is smallest at "
            "16 and 8 bits, low_rank tolerates 4 bits or fewer (default: the method's own).",
            rich_help_panel="Method",
        ),
    ] = None,
    sites: SiteNames = None,
    multiple: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Round ranks down to a multiple of this, for fast kernels (default: with --keep about a 32nd of the "
            "full rank; 0: find a fast one by timing).",
            rich_help_panel="Method",
        ),
    ] = None,
    refine: Annotated[
        int,
        typer.Option(
            min=0, help="Gradient steps on each block after its factorization (0: none).", rich_help_panel="Method"
        ),
    ] = 0,
    refine_toward: Annotated[
        str,
        typer.Option(
            help="What refined blocks match: predictions (of the model), or block (their own output, far cheaper).",
            rich_help_panel="Method",
        ),
    ] = "predictions",
    effort: Annotated[
        str,
        typer.Option(
            help="quick (32 sequences, measured once), default (128), or best (measured twice again on the compressed "
            "model, whose drift is corrected).",
            rich_help_panel="Method",
        ),
    ] = "default",
    nested: Annotated[
        bool,
        typer.Option(
            help="One larger checkpoint that rankfold export --keep cuts to any budget.", rich_help_panel="Method"
        ),
    ] = False,
    calibration: Annotated[
        str,
        typer.Option(
            help="Text to calibrate on: a text or JSONL file, or a data set name.", rich_help_panel="Calibration"
        ),
    ] = "bundled:calibration",
    sequences: Annotated[
        int | None,
        typer.Option(
            min=1, help="Sequences of the calibration text (default: that of --effort).", rich_help_panel="Calibration"
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Tokens per sequence (default: 512, or the model's limit if lower).",
            rich_help_panel="Calibration",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Keep intermediate results beyond this, such as 8GB, in a temporary folder (default: 3 % of the "
            "free memory).",
            rich_help_panel="Calibration",
        ),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(
            min=0,
            help="Workers on a Ray cluster that share the measuring (0: all in this process); every machine must find "
            "the model under the same name.",
            rich_help_panel="Calibration",
        ),
    ] = 0,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Address of the cluster, auto for this machine's (default: start one).", rich_help_panel="Calibration"
        ),
    ] = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
) -> None:
    """Factorize a model and save a checkpoint that loads in transformers."""
    start = time.perf_counter()
    check_target(output, overwrite)
    stored = None if plan is None else read_plan(plan)
    # Made here as well as in the call, so that a contradiction is told before the model is loaded.
    budget = Budget(
        keep=keep, bytes=bytes_, bits=bits, max_loss_increase=max_loss_increase, speedup=speedup, rank=rank, plan=stored
    )
    if stored is not None:
        method = next(iter({option.method for option in stored.factorized}), method)
        sites = [name for option in stored.options for name in option.sites]
    ways = None if allow is None else tuple(part.strip() for part in allow.split(","))
    settings = Settings(
        method=method,
        allocation=allocation,
        form=form,
        allow=ways,
        refine=refine,
        refine_toward=refine_toward,
        embeddings=embeddings,
        speed_of=speed_of,
        effort=effort,
        memory=None if memory is None else parse_bytes(memory),
    )
    loaded = load_model(model, dtype=to_dtype(dtype), device=device, dense=True)
    origin = getattr(loaded, "few_bits", None)
    if origin:
        say(f"The weights were quantized ({origin}) and have been dequantized: their lost precision is not restored.")
    reads = nested or settings.needs_text(budget)
    tokenizer = load_tokenizer(model) if reads else tokenizer_if_any(model)
    chosen = find_sites(loaded).select(sites or ())
    if multiple == 0:
        multiple = _fast_here(loaded, chosen)
    before = parameter_count(loaded)
    settings.check(loaded, chosen, budget)
    saved = settings.most_saved(loaded, budget)
    _check_space(output, loaded, budget.keep_of(loaded, chosen, saved) or 1.0, chosen, saved)
    corpus = as_corpus(calibration, tokenizer) if reads else None
    if corpus is not None:
        count = sequences or EFFORTS[effort].sequences
        say(f"Calibrating on {count} x {length or default_length(loaded.config)} tokens of {corpus.name}.")
        if calibration.startswith("bundled:"):
            say("This is the bundled sample; text like yours gives a better model: --calibration my_text.jsonl")
    work = output.with_name(f".{output.name}.work")
    keeps(f"nothing was written to {output}; the same command resumes with what was worked out, which lies in {work}.")
    with stages() as stage:
        done = compress_model(
            loaded, tokenizer, keep=keep, bytes=bytes_, bits=bits, max_loss_increase=max_loss_increase,
            speedup=speedup, speed_of=speed_of, rank=rank, plan=stored, text=corpus or calibration,
            sequences=sequences, length=length, sites=chosen, method=method, allocation=allocation, form=form,
            allow=ways, multiple=multiple, refine=refine, refine_toward=refine_toward, embeddings=embeddings,
            effort=effort, memory=memory, nested=nested, workers=workers, ray=ray, seed=seed, stage=stage, work=work,
        )  # fmt: skip
    if origin:
        done = note(loaded, done, {"origin": origin})
    save(loaded, tokenizer, output, source=model, overwrite=overwrite)
    shutil.rmtree(work, ignore_errors=True)
    report_plan(output, loaded, done, chosen, before, time.perf_counter() - start)


def _fast_here(model: Any, sites: Sites) -> int:
    """The multiple of ranks that is fast on this machine for the largest matrix of the model."""
    site = max(sites, key=lambda site: site.out_features * site.in_features)
    ranks = neighbouring_ranks(min(site.out_features, site.in_features))
    weight = next(model.parameters())
    with progress("timing ranks", 16) as advance:
        seconds = rank_seconds(
            site.out_features, site.in_features, list(ranks.values()), device=str(weight.device), dtype=weight.dtype,
            on_step=advance,
        )  # fmt: skip
    found = fast_multiple(seconds, ranks)
    rows = []
    for step, rank in ranks.items():
        each = seconds[rank] / rank
        rows.append([str(step), str(rank), f"{seconds[rank] * 1e6:.1f}", f"{each * 1e9:.1f}"])
    shape = f"{site.out_features} x {site.in_features}, 128 tokens"
    print_table(shape, ["multiple of", "rank", "microseconds", "nanoseconds per rank"], rows)
    say(f"Ranks are rounded down to multiples of {found}.")
    return found


def _check_space(output: Path, model: Any, keep: float, sites: Sites, saved: int) -> None:
    """Say before the work that the disk is too small for the checkpoint."""
    parent = next(path for path in [output.absolute().parent, *output.absolute().parents] if path.exists())
    dense = sum(site.parameters * site.bytes_per_parameter for site in sites)
    rest = sum(p.numel() * p.element_size() for p in model.parameters()) - dense
    free = shutil.disk_usage(parent).free
    needed = int(keep * dense) + rest - saved
    if needed > free:
        raise InputError(f"{output}: the checkpoint needs {needed:,} bytes, but {parent} has {free:,} free.")
