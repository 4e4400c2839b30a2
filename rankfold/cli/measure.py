"""`rankfold measure`: quality, size and speed, beside the dense model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rankfold.calibration import check_length, load_corpus, overlap
from rankfold.checkpoint import load_model, load_tokenizer
from rankfold.cli.options import (
    HELD_OUT_TEXTS,
    Device,
    Dtype,
    Model,
    Records,
    check_comparable,
    is_decoder,
    to_dtype,
)
from rankfold.measure import (
    circumstances,
    default_length,
    evaluation_windows,
    measure_accuracy,
    measure_latency,
    measure_limits,
    measure_quality,
    measure_size,
    table,
)
from rankfold.terminal import check_records, print_table, progress, say, write_records

DECODED_TOKENS = 8
"""Tokens decoded in every round of the latency."""


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
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Prompts timed at once; repeat it, as from 1 to 64 (default: 1).")
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    output: Records = None,
) -> None:
    """Measure quality, size and speed, beside the dense model where it is given."""
    names = {"dense": dense, "compressed": model} if dense else {"model": model}
    # A folder of adapters holds no model of its own.
    folders = {name: source for name, source in names.items() if (Path(str(source)) / "config.json").is_file()}
    check_records(output)
    batches = sorted(set(batch or [1]))
    models = {name: load_model(str(source), dtype=to_dtype(dtype), device=device) for name, source in names.items()}
    check_comparable(models)
    for measured in models.values():
        check_length(measured, max(length or 0, prompt + DECODED_TOKENS if latency else 0))
    tokenizer = load_tokenizer(model)
    records = measure_size(models, folders, circumstances())
    if labels is not None:
        records += measure_accuracy(models, tokenizer, labels, circumstances(data=labels.name))
    elif is_decoder(models.values()):
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
        with progress("latency rounds", 16 * len(batches)) as advance:
            for size in batches:
                settings = {"prompt_tokens": prompt, "decoded_tokens": DECODED_TOKENS, "batch_size": size}
                records += measure_latency(models, circumstances(), advance, **settings)
        records += measure_limits(models, circumstances())
    header = ["", *names, "ratio"] if dense else ["", *names, ""]
    print_table(str(model), header, table(records, names))
    if any(record.context.get("contended") for record in records):
        say("Other work slowed this machine down while it was timed: repeat the latency when it is quiet.")
    write_records(records, output)


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
