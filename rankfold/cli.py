"""The command line: one verb for each step, a table for people on stderr, records for programs on stdout."""

from __future__ import annotations

import shutil
import sys
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.markup import escape

from rankfold import demo as demonstration
from rankfold.allocation import ALLOCATIONS
from rankfold.calibration import check_length, load_corpus, max_length, overlap
from rankfold.checkpoint import export_dense, load_model, load_tokenizer, save, stored_dtype, tokenizer_if_any
from rankfold.cost import parameter_count
from rankfold.factorization import METHODS
from rankfold.inspection import inspect_sites
from rankfold.measure import (
    circumstances,
    evaluation_windows,
    measure_accuracy,
    measure_latency,
    measure_quality,
    measure_size,
    table,
)
from rankfold.pipeline import Budget, Settings, compress_within, fingerprint, read_text
from rankfold.record import Record
from rankfold.recovery import GENERATED, recovery_windows
from rankfold.recovery import recover as recover_model
from rankfold.report.figures import check_figure, draw_spectra
from rankfold.shards import check_target
from rankfold.sites import Sites, find_sites
from rankfold.summary import report_plan, skipped_rows
from rankfold.terminal import check_records, console, print_table, progress, say, stages, write_records

app = typer.Typer(
    help="Make a language model smaller and faster by low-rank decomposition, and see what that costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

HELD_OUT_TEXTS = ("bundled:english-held-out", "bundled:python-held-out")
"""What quality is measured on by default: two corpora, since one flatters whoever calibrated on its like."""

MOST_WINDOWS = 4096
"""Windows that recovery trains on at most; more steps read them again."""

DECODED_TOKENS = 8
"""Tokens decoded in every round of the latency."""

Model = Annotated[str, typer.Argument(help="Model folder, or name on the Hugging Face hub.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1.")]
Dtype = Annotated[str, typer.Option(help=f"Dtype of the weights: {', '.join(DTYPES)}.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Records = Annotated[Path | None, typer.Option("--output", help="File for the records (default: stdout).")]
SiteNames = Annotated[
    list[str] | None,
    typer.Option(
        "--sites", help="Pattern or kind of site, such as 'mlp.c_proj'; repeat it (default: all in the blocks)."
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")]


@app.command()
def inspect(
    model: Model,
    sites: SiteNames = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the spectra into this .png or .svg.")] = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    output: Records = None,
) -> None:
    """List what can be factorized: shape, break-even rank, spectrum; and what cannot, with the reason."""
    if plot:
        check_figure(plot)
    check_records(output)
    loaded = load_model(model, dtype=_dtype(dtype), device=device)
    chosen = find_sites(loaded).select(sites or ())
    with progress("spectra", len(chosen)) as advance:
        inspections = inspect_sites(loaded, chosen, advance)
    rows = []
    for found in inspections:
        site, full = found.site, min(found.site.out_features, found.site.in_features)
        energies = [f"{found.energy(rank) or 0:.0%}" for rank in (full // 8, full // 4, full // 2)]
        shape = f"{site.out_features} x {site.in_features}"
        parts = " (" + "+".join(part.name for part in site.parts) + ")" if site.parts else ""
        rows.append(
            [site.name + parts, shape, f"{found.aspect:.2f}", str(found.break_even), f"{found.share:.2%}", *energies]
        )
    header = ["site", "out x in", "aspect", "break-even", "of model", "1/8", "1/4", "1/2"]
    title = f"{model}: {len(chosen)} sites; last columns: energy within 1/8, 1/4 and 1/2 of the full rank"
    print_table(title, header, rows)
    print_table("not factorized", ["weight", "shape", "reason"], skipped_rows(chosen))
    if plot:
        spectra: dict[str, dict[str, Sequence[float]]] = {}
        for found in inspections:
            spectra.setdefault(found.site.kind, {})[found.site.name] = found.spectrum
        draw_spectra(spectra, plot)
        say(f"Spectra drawn to {plot}")
    write_records([found.record() for found in inspections], output)


@app.command()
def compress(
    model: Model,
    output: Annotated[Path, typer.Argument(help="Folder of the compressed model; written whole or not at all.")],
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
    max_loss_increase: Annotated[
        float | None,
        typer.Option(
            help="Smallest model whose loss on held-out text rises by no more, in nats per token.",
            rich_help_panel="Budget",
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="An explicit rank for all sites.", rich_help_panel="Budget")] = None,
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
    sites: SiteNames = None,
    multiple: Annotated[
        int, typer.Option(help="Lower ranks to a multiple of this, for fast kernels.", rich_help_panel="Method")
    ] = 1,
    refine: Annotated[
        int,
        typer.Option(
            min=0, help="Gradient steps on each block after its factorization (0: none).", rich_help_panel="Method"
        ),
    ] = 0,
    refine_toward: Annotated[
        str,
        typer.Option(
            help="What refined blocks aim at: predictions of the model, or each block's own output (far cheaper).",
            rich_help_panel="Method",
        ),
    ] = "predictions",
    calibration: Annotated[
        str,
        typer.Option(
            help="Text to calibrate on: a text or JSONL file, or a data set name.", rich_help_panel="Calibration"
        ),
    ] = "bundled:calibration",
    sequences: Annotated[
        int, typer.Option(min=1, help="Sequences of the calibration text.", rich_help_panel="Calibration")
    ] = 128,
    length: Annotated[
        int | None,
        typer.Option(
            min=2, help="Tokens a sequence (default: 512, or what the model reads).", rich_help_panel="Calibration"
        ),
    ] = None,
    overwrite: Overwrite = False,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    seed: Seed = 0,
) -> None:
    """Factorize a model and save a checkpoint that loads in transformers."""
    start = time.perf_counter()
    check_target(output, overwrite)
    budget = Budget.of(keep=keep, bytes_=bytes_, max_loss_increase=max_loss_increase, rank=rank)
    settings = Settings(method, allocation, multiple, refine, refine_toward, seed)
    loaded = load_model(model, dtype=_dtype(dtype), device=device)
    tokenizer = load_tokenizer(model) if settings.needs_text(budget) else tokenizer_if_any(model)
    chosen = find_sites(loaded).select(sites or ())
    before = parameter_count(loaded)
    settings.check(loaded, chosen, budget)
    _check_space(output, loaded, budget.keep_of(loaded, chosen) or 1.0, chosen)
    text = None
    if settings.needs_text(budget):
        corpus = load_corpus(calibration)
        length = length or default_length(loaded.config)
        text = read_text(loaded, tokenizer, corpus, settings, budget, sequences=sequences, length=length)
        say(f"Calibrating on {sequences} x {length} tokens of {corpus.name}.")
        if calibration.startswith("bundled:"):
            say("This is the bundled sample; text like your own gives a better model: --calibration my_text.jsonl")
    work = output.with_name(f".{output.name}.refine")
    with stages() as stage:
        plan = compress_within(loaded, chosen, budget, settings, text, stage=stage, work=work)
    save(loaded, tokenizer, output, overwrite=overwrite)
    shutil.rmtree(work, ignore_errors=True)
    report_plan(output, plan, chosen, before, parameter_count(loaded), time.perf_counter() - start)


@app.command()
def recover(
    model: Annotated[str, typer.Argument(help="Folder of the compressed model.")],
    output: Annotated[Path, typer.Argument(help="Folder of the recovered model; written whole or not at all.")],
    dense: Annotated[str | None, typer.Option(help="The dense model, whose distribution is the target.")] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to train on: a file, a data set name, or 'generated' by the dense model; repeat it to mix "
            "(default: bundled:calibration)."
        ),
    ] = None,
    objective: Annotated[str, typer.Option(help="kl (to the dense model) or next-token.")] = "kl",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps at most; it stops early.")] = 500,
    batch: Annotated[int, typer.Option(min=1, help="Windows a step.")] = 16,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens a window (default: 512, or what the model reads).")
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Learning rate (default: one that suits the width).")] = None,
    lora: Annotated[int | None, typer.Option(min=1, help="Train LoRA adapters of this rank, then merge them.")] = None,
    overwrite: Overwrite = False,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    seed: Seed = 0,
) -> None:
    """Train a compressed model against its dense one; a killed run goes on where it stopped."""
    check_target(output, overwrite)
    texts = text or ["bundled:calibration"]
    if objective == "kl" and dense is None:
        raise ValueError("--objective kl needs the dense model: pass --dense, or take --objective next-token.")
    # 16-bit weights cannot take small steps: they are trained in float32 and rounded when they are saved.
    loaded, tokenizer = load_model(model, dtype=torch.float32, device=device), load_tokenizer(model)
    stored = _dtype(dtype) or stored_dtype(model)
    _check_decoder(loaded)
    teacher = load_model(dense, dtype=_dtype(dtype), device=device) if dense is not None else None
    length = length or default_length(loaded.config)
    check_length(loaded, length)
    count = min(steps * batch, MOST_WINDOWS)
    with stages() as stage:
        windows, held_out = recovery_windows(
            loaded, teacher, tokenizer, texts, count=count, length=length, seed=seed, stage=stage
        )
        advance = stage("training", steps)
        folder = output.with_name(f".{output.name}.recovery")
        work = folder / fingerprint(loaded, teacher, windows, objective, steps, batch, rate, lora, seed)
        result = recover_model(
            loaded,
            teacher,
            windows,
            held_out,
            work=work,
            objective=objective,
            steps=steps,
            batch_size=batch,
            rate=rate,
            lora_rank=lora,
            seed=seed,
            on_step=advance,
        )
    given = [name for name in texts if name != GENERATED]
    if hasattr(loaded.config, "rankfold") and given:
        facts = {**loaded.config.rankfold["calibration"], "recovery_text": given}
        loaded.config.rankfold = {**loaded.config.rankfold, "calibration": facts}
    save(loaded.to(stored), tokenizer, output, overwrite=overwrite)
    shutil.rmtree(folder, ignore_errors=True)
    what = "divergence from the dense model" if objective == "kl" else "loss"
    say(f"Held-out {what}: {result.before:.4f} -> {result.after:.4f} nat/token in {result.steps} steps.")
    say(f"Checkpoint: {output}")
    context = circumstances(text=texts, objective=objective, lora_rank=lora, seed=seed)
    values = [("held_out_before", result.before, "nat/token"), ("held_out_after", result.after, "nat/token")]
    values += [("steps", result.steps, "1")]
    write_records(
        [Record(subject=str(output), name=n, value=v, unit=u, context=context) for n, v, u in values], output=None
    )


@app.command()
def measure(
    model: Model,
    dense: Annotated[str | None, typer.Option(help="The dense model, measured beside it.")] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Evaluation text: a file or data set name; repeat it (default: the two bundled ones)."),
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="JSONL with sentence and label, for a classifier.")] = None,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens a window (default: 512, or what the model reads).")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows to score at most.")] = 256,
    latency: Annotated[bool, typer.Option(help="Time prefill and decoding, models interleaved.")] = True,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the timed prompt.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Prompts timed at once.")] = 1,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    output: Records = None,
) -> None:
    """Measure quality, size and speed, beside the dense model where it is given."""
    names = {"dense": dense, "compressed": model} if dense else {"model": model}
    folders = {name: source for name, source in names.items() if Path(str(source)).is_dir()}
    check_records(output)
    models = {name: load_model(str(source), dtype=_dtype(dtype), device=device) for name, source in names.items()}
    _check_comparable(models)
    for measured in models.values():
        check_length(measured, max(length or 0, prompt + DECODED_TOKENS if latency else 0))
    tokenizer = load_tokenizer(model)
    records = measure_size(models, folders, circumstances())
    if labels is not None:
        records += measure_accuracy(models, tokenizer, labels, circumstances(data=labels.name))
    elif _is_decoder(models.values()):
        length = length or min(default_length(measured.config) for measured in models.values())
        seen = calibration_texts(models)
        for corpus in map(load_corpus, text or HELD_OUT_TEXTS):
            shared = None if seen is None else overlap(seen, corpus.texts)
            if shared:
                say(f"Beware: {shared:.1%} of {corpus.name} also stands in the text that the model was calibrated on.")
            tokens = evaluation_windows(tokenizer, corpus, length, windows)
            context = circumstances(data=corpus.name, sha256=corpus.sha256, overlap_with_calibration=shared)
            with progress(f"windows of {corpus.name}", len(models) * -(-len(tokens) // 8)) as advance:
                records += measure_quality(models, tokens, context, advance)
    else:
        say("Quality not measured: perplexity is for decoders; give a classifier labelled rows with --labels.")
    if latency:
        with progress("latency rounds", 16) as advance:
            settings = {"prompt_tokens": prompt, "decoded_tokens": DECODED_TOKENS, "batch_size": batch}
            records += measure_latency(models, circumstances(), advance, **settings)
    header = ["", *names, "ratio"] if dense else ["", *names, ""]
    print_table(str(model), header, table(records, names))
    if any(record.context.get("contended") for record in records):
        say("Other work slowed this machine down while it was timed: repeat the latency when it is quiet.")
    write_records(records, output)


@app.command()
def export(
    model: Model,
    output: Annotated[Path, typer.Argument(help="Folder of the exported model.")],
    dense: Annotated[bool, typer.Option("--dense", help="Multiply the factors out: an ordinary checkpoint.")] = False,
    overwrite: Overwrite = False,
    dtype: Dtype = "auto",
) -> None:
    """Write a compressed model in another form; --dense gives a checkpoint that anything loads."""
    if not dense:
        raise ValueError("export knows one form so far: pass --dense to multiply the factors out.")
    check_target(output, overwrite)
    export_dense(load_model(model, dtype=_dtype(dtype)), tokenizer_if_any(model), output, overwrite=overwrite)
    say(f"Dense checkpoint: {output}")


@app.command()
def demo(
    output: Annotated[Path, typer.Argument(help="Folder of the compressed model.")] = Path("demo-checkpoint"),
    keep: Annotated[float, typer.Option(help="Fraction of the sites' parameters to keep.")] = 0.8,
) -> None:
    """Run the main job on the bundled model, offline: compress, save, load, measure side by side, generate."""
    demonstration.run(output, keep)


def default_length(config: Any) -> int:
    """Tokens of a window: 512, or fewer where the model reads fewer."""
    return min(512, max_length(config) or 512)


def main() -> None:
    """Run a verb; a user's mistake ends with one message and exit code 2."""
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    warnings.filterwarnings("ignore", module="transformers|torch")
    try:
        app()
    except ValueError as error:
        # Escaped: the message may hold brackets, such as rankfold[datasets], that are no markup.
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        say("stopped; nothing was written")
        sys.exit(130)


def calibration_texts(models: Mapping[str, Any]) -> Sequence[str] | None:
    """The text that a compressed model was calibrated and trained on, where it can still be read here."""
    for measured in models.values():
        plan = getattr(measured.config, "rankfold", None) or {}
        facts = plan.get("calibration", {})
        texts: list[str] = []
        trained = [(name, None) for name in facts.get("recovery_text", ())]
        for name, digest in [(facts.get("corpus"), facts.get("sha256")), *trained]:
            if name is None:
                continue
            try:
                corpus = load_corpus(name)
            except ValueError:
                corpus = None
            if corpus is None or digest not in (None, corpus.sha256):
                say(f"The text {name} that the model saw cannot be read here: overlap with it is not checked.")
            else:
                texts += corpus.texts
        if texts:
            return texts
    return None


def _check_decoder(model: Any) -> None:
    if not _is_decoder([model]):
        raise ValueError(f"Recovery trains on next-token distributions, which a {type(model).__name__} has not.")


def _check_comparable(models: Mapping[str, Any]) -> None:
    sizes = {name: model.config.vocab_size for name, model in models.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"Models are compared token by token and must share a vocabulary, but have {sizes} tokens.")


def _is_decoder(models: Iterable[Any]) -> bool:
    return all(model.can_generate() and not model.config.is_encoder_decoder for model in models)


def _dtype(name: str) -> torch.dtype | None:
    if name not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, but got {name!r}.")
    return DTYPES[name]


def _check_space(output: Path, model: Any, keep: float, sites: Sites) -> None:
    """Say before the work that the disk is too small for the checkpoint."""
    parent = next(path for path in [output.absolute().parent, *output.absolute().parents] if path.exists())
    dense = sum(site.parameters * site.bytes_per_parameter for site in sites)
    rest = sum(p.numel() * p.element_size() for p in model.parameters()) - dense
    free = shutil.disk_usage(parent).free
    needed = int(keep * dense) + rest
    if needed > free:
        raise ValueError(f"{output}: the checkpoint needs {needed:,} bytes, but {parent} has {free:,} free.")


if __name__ == "__main__":
    main()
