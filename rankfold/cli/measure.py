"""`rankfold measure`: quality, size and speed, beside the dense model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rankfold.calibration import check_length, load_corpus, overlap
from rankfold.checkpoint import chosen_device, load_model, load_tokenizer
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
from rankfold.cost import Meter, open_meter
from rankfold.failures import failure_signs
from rankfold.measure import (
    circumstances,
    default_length,
    evaluation_windows,
    measure_accuracy,
    measure_energy,
    measure_latency,
    measure_limits,
    measure_memory,
    measure_quality,
    measure_repetition,
    measure_score,
    measure_size,
    table,
)
from rankfold.record import Record
from rankfold.recovery import is_quantized
from rankfold.sites import listens
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
    latency: Annotated[
        bool, typer.Option(help="Time prefill and decoding, models interleaved.", rich_help_panel="Cost")
    ] = True,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the timed prompt.", rich_help_panel="Cost")] = 128,
    batch: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="Prompts timed at once; repeat it, as from 1 to 64 (default: 1).", rich_help_panel="Cost"
        ),
    ] = None,
    watts: Annotated[
        float | None,
        typer.Option(min=0, help="Power to assume where no counter shows energy: an estimate.", rich_help_panel="Cost"),
    ] = None,
    device: Device = "auto",
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
    else:
        size = length or min(default_length(measured.config) for measured in models.values())
        records += _quality(models, tokenizer, text or HELD_OUT_TEXTS, size, windows)
    if latency:
        records += _cost(models, batches, prompt, open_meter(str(chosen_device(device)), watts=watts))
    header = ["", *names, "ratio"] if dense else ["", *names, ""]
    print_table(str(model), header, table(records, names))
    if any(record.context.get("contended") for record in records):
        say("Other work slowed this machine down while it was timed: repeat the latency when it is quiet.")
    quantized = [name for name, measured in models.items() if is_quantized(measured)]
    for sign in failure_signs(records, quantized=quantized):
        say(f"Look here: {sign.subject}, {sign.text}.")
        facts = circumstances(sign=sign.name, text=sign.text)
        records.append(Record(subject=sign.subject, name="failure sign", value=None, unit="1", context=facts))
    write_records(records, output)


def _quality(
    models: Mapping[str, Any], tokenizer: Any, texts: Sequence[str], length: int, windows: int
) -> list[Record]:
    """What models lose on held-out texts, each by its own objective."""
    records: list[Record] = []
    if all("MaskedLM" in type(measured).__name__ for measured in models.values()):
        for name in texts:
            records += measure_score(models, tokenizer, name, length=length, windows=windows, context=circumstances())
        return records
    hearing = all(listens(measured) for measured in models.values())
    if not hearing and not is_decoder(models.values()):
        say("Quality not measured: perplexity is for decoders; give a classifier labelled rows with --labels.")
        return records
    if hearing:
        say("These models listen: their decoders are scored on text alone, after silence.")
    seen = calibration_texts(models)
    for corpus in map(load_corpus, texts):
        shared = None if seen is None else overlap(seen, corpus.texts)
        if shared:
            say(f"Beware: {shared:.1%} of {corpus.name} also stands in the text that the model was calibrated on.")
        tokens = evaluation_windows(tokenizer, corpus, length, windows)
        context = circumstances(data=corpus.name, sha256=corpus.sha256, overlap_with_calibration=shared)
        with progress(f"windows of {corpus.name}", len(models) * -(-len(tokens) // 8)) as advance:
            records += measure_quality(models, tokens, context, advance)
        if not hearing:
            records += measure_repetition(models, tokenizer, corpus.texts, context)
    return records


def _cost(models: Mapping[str, Any], batches: Sequence[int], prompt: int, meter: Meter) -> list[Record]:
    """What models take: time, memory beyond the weights, energy."""
    records: list[Record] = []
    settings = {"prompt_tokens": prompt, "decoded_tokens": DECODED_TOKENS}
    with progress("latency rounds", 16 * len(batches)) as advance:
        for size in batches:
            records += measure_latency(models, circumstances(), advance, **settings, batch_size=size)
    records += measure_limits(models, circumstances())
    records += measure_memory(models, circumstances(), prompt_tokens=prompt)
    records += measure_energy(models, meter, circumstances(), **settings)
    if meter.source in ("unavailable", "estimate"):
        say(f"Energy {'not counted' if meter.source == 'unavailable' else 'estimated'}: {meter.about}.")
    return records


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
