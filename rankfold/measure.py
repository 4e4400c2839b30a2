"""The table of measurements: models side by side on the same text and the same machine, as records."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from rankfold.calibration import (
    Corpus,
    load_corpus,
    make_batches,
    masked_batches,
    max_length,
    special_tokens,
    split_windows,
    token_stream,
)
from rankfold.cost import disk_bytes, hardware, interleaved_latency, memory_bytes, parameter_count, reading
from rankfold.quality import (
    Scorer,
    classification_accuracy,
    load_labelled,
    masked_score,
    mistake_score,
    next_token_quality,
    next_token_score,
)
from rankfold.record import Record, value_of, versions


def evaluation_windows(tokenizer: Any, corpus: Corpus, length: int, limit: int | None = None) -> Tensor:
    """Windows without overlap, each begun by the token with which the tokenizer begins a text.

    Raises:
        ValueError: If the corpus does not fill one window.
    """
    begin, end = special_tokens(tokenizer)
    enough = None if limit is None else (limit + 1) * length
    return split_windows(token_stream(tokenizer, corpus.texts, enough), length, begin, end)[:limit]


def default_length(config: Any) -> int:
    """Tokens of a window: 512, or fewer where the model reads fewer."""
    return min(512, max_length(config) or 512)


class Scored(NamedTuple):
    """What a score is measured on."""

    name: str
    fingerprint: Any
    """What tells these items from others."""
    mask_token: int | None = None
    """For a masked language model, the token whose place is asked for."""


def scorer_for(
    model: Any,
    tokenizer: Any,
    *,
    text: str,
    labels: str | Path | None = None,
    length: int,
    windows: int,
) -> tuple[Scorer, Scored]:
    """What one model is scored by: mistakes on labelled rows, masked tokens, or next tokens, as it predicts them.

    Raises:
        ValueError: If a classifier has no labelled rows, or the model predicts nothing that can be scored.
    """
    kind = type(model).__name__
    if labels is not None:
        labelled = load_labelled(labels)
        return mistake_score(tokenizer, labelled), Scored(Path(labels).name, [*labelled])
    corpus = load_corpus(text)
    if "MaskedLM" in kind and tokenizer.mask_token_id is not None:
        tokens = evaluation_windows(tokenizer, corpus, length, windows)
        batches = masked_batches(make_batches(model, tokens, 8), tokenizer.mask_token_id, tokenizer.all_special_ids)
        return masked_score(batches), Scored(corpus.name, tokens, tokenizer.mask_token_id)
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise ValueError(
            f"A {kind} has no next-token or masked-token loss. For a classifier give labelled rows (--labels)."
        )
    tokens = evaluation_windows(tokenizer, corpus, length, windows)
    return next_token_score(tokens), Scored(corpus.name, tokens)


def circumstances(**details: Any) -> dict[str, Any]:
    """What a record depends on: the machine, the versions and the given details."""
    return {"hardware": hardware(), "versions": versions(), **details}


def measure_quality(
    models: Mapping[str, Any],
    windows: Tensor,
    context: Mapping[str, Any],
    on_batch: Callable[[], None] = lambda: None,
) -> list[Record]:
    """Perplexity of every model, and the distance of all others from the first, which is the dense one."""
    reference, *_ = models
    records = []
    for name, model in models.items():
        dense = models[reference] if name != reference else None
        quality = next_token_quality(model, windows, dense=dense, on_batch=on_batch)
        rows: list[tuple[str, float, str, float | None]] = [
            ("loss", quality.loss, "nat/token", quality.loss_error),
            ("perplexity", quality.perplexity, "1", quality.perplexity_error),
        ]
        if quality.kl is not None:
            rows += [("kl_to_dense", quality.kl, "nat/token", quality.kl_error)]
        if quality.agreement is not None:
            rows += [("top1_agreement", quality.agreement, "1", quality.agreement_error)]
        details = {**context, "tokens": quality.tokens}
        records += [Record(subject=name, name=n, value=v, unit=u, error=e, context=details) for n, v, u, e in rows]
    return records


def measure_accuracy(
    models: Mapping[str, Any], tokenizer: Any, path: str | Path, context: Mapping[str, Any]
) -> list[Record]:
    """Accuracy of every classifier on the labelled rows of a file."""
    labelled = load_labelled(path)
    records = []
    for name, model in models.items():
        accuracy = classification_accuracy(model, tokenizer, labelled)
        details = {**context, "right": accuracy.right, "rows": accuracy.total}
        records.append(
            Record(subject=name, name="accuracy", value=accuracy.value, unit="1", error=accuracy.error, context=details)
        )
    return records


def measure_size(
    models: Mapping[str, Any], folders: Mapping[str, str | Path], context: Mapping[str, Any]
) -> list[Record]:
    """Parameters, bytes in memory, and bytes on disk where the model lies in a local folder."""
    records = []
    for name, model in models.items():
        disk = disk_bytes(folders[name]) if name in folders else None
        why = {} if disk is not None else {"unavailable": "the model does not lie in a local folder"}
        rows = [("parameters", parameter_count(model), "1"), ("memory", memory_bytes(model), "byte")]
        records += [Record(subject=name, name=n, value=v, unit=u, context=dict(context)) for n, v, u in rows]
        records.append(Record(subject=name, name="disk", value=disk, unit="byte", context={**context, **why}))
    return records


def measure_latency(
    models: Mapping[str, Any],
    context: Mapping[str, Any],
    on_round: Callable[[], None] = lambda: None,
    **settings: int,
) -> list[Record]:
    """Seconds and tokens a second of prefill and decoding, models interleaved; whether the machine was contended."""
    records = []
    batch_size = settings.get("batch_size", 1)
    for name, latency in interleaved_latency(models, on_round=on_round, **settings).items():
        details = {**context, **settings, "contended": latency.contended, "rounds": len(latency.prefill)}
        tokens = {"prefill": batch_size * settings.get("prompt_tokens", 128), "decode": batch_size}
        for what, seconds in (("prefill", latency.prefill_seconds), ("decode", latency.decode_seconds)):
            if seconds is None:
                continue
            rate = tokens[what] / seconds
            values = ((what, seconds, "second"), (f"{what}_throughput", rate, "token/second"))
            records += [Record(subject=name, name=n, value=v, unit=u, context=details) for n, v, u in values]
    return records


def measure_limits(models: Mapping[str, Any], context: Mapping[str, Any]) -> list[Record]:
    """How much faster than the first model others could be at most: decoding by bytes, prefill by multiplications."""
    reference, *others = models
    dense = reading(models[reference])
    records = []
    for name in others:
        found = reading(models[name])
        for what, value in (
            ("decode_speedup_limit", dense.bytes / found.bytes),
            ("prefill_speedup_limit", dense.multiplications / found.multiplications),
        ):
            records.append(Record(subject=name, name=what, value=value, unit="1", context=dict(context)))
    return records


ROWS: dict[str, tuple[str, Callable[[float], str], bool]] = {
    "perplexity": ("perplexity", lambda v: f"{v:.4g}", True),
    "loss": ("loss, nat/token", lambda v: f"{v:.4f}", False),
    "accuracy": ("accuracy", lambda v: f"{v:.2%}", False),
    "kl_to_dense": ("KL to dense, nat/token", lambda v: f"{v:.4f}", False),
    "top1_agreement": ("same first choice", lambda v: f"{v:.1%}", False),
    "choice": ("true continuation found", lambda v: f"{v:.1%}", False),
    "next_line": ("next line exact", lambda v: f"{v:.1%}", False),
    "parses": ("completions that parse", lambda v: f"{v:.1%}", False),
    "knows_names": ("and use no unknown name", lambda v: f"{v:.1%}", False),
    "repeated": ("repeated 4-grams", lambda v: f"{v:.1%}", False),
    "distinct": ("distinct bigrams", lambda v: f"{v:.1%}", False),
    "parameters": ("parameters", lambda v: f"{v:,.0f}", True),
    "memory": ("bytes in memory", lambda v: f"{v:,.0f}", True),
    "disk": ("bytes on disk", lambda v: f"{v:,.0f}", True),
    "prefill": ("prefill, ms", lambda v: f"{v * 1e3:.3g}", True),
    "prefill_throughput": ("prefill, tokens/s", lambda v: f"{v:,.0f}", True),
    "prefill_speedup_limit": ("times as fast at most, by multiplications", lambda v: f"{v:.3f}", False),
    "decode": ("decode, ms/token", lambda v: f"{v * 1e3:.3g}", True),
    "decode_throughput": ("decode, tokens/s", lambda v: f"{v:,.0f}", True),
    "decode_speedup_limit": ("times as fast at most, by bytes", lambda v: f"{v:.3f}", False),
}
"""Rows of the table: title, how a value is written, and whether its ratio to the dense model says something."""


def table(records: Sequence[Record], subjects: Iterable[str]) -> list[list[str]]:
    """Rows of text: what, each subject's value with its standard error, and the last one's ratio to the first."""
    names = list(subjects)
    rows = []
    passes = dict.fromkeys(record.name for record in records if re.fullmatch(r"pass@\d+", record.name))
    for name, (title, write, comparable) in {**{k: (k, ROWS["choice"][1], False) for k in passes}, **ROWS}.items():
        data = list(dict.fromkeys(_setting(record) for record in records if record.name == name))
        for corpus in data:
            found = [record for record in records if _setting(record) == corpus]
            values = [value_of(found, subject, name) for subject in names]
            if all(value is None for value in values):
                continue
            cells = [_cell(found, subject, name, write) for subject in names]
            first, last = values[0], values[-1]
            ratio = f"{last / first:.3f}" if comparable and first and last and len(names) > 1 else ""
            rows.append([title if len(data) == 1 else f"{title}: {corpus}", *cells, ratio])
    return rows


def _setting(record: Record) -> str | None:
    """What a number was measured on, where the same was measured on several: a text, or a number of prompts at once."""
    batch = record.context.get("batch_size")
    setting = record.context.get("data") or (None if batch is None else f"batch {batch}")
    return None if setting is None else str(setting)


def _cell(records: Sequence[Record], subject: str, name: str, write: Callable[[float], str]) -> str:
    for record in records:
        if (record.subject, record.name) == (subject, name) and record.value is not None:
            error = f" ± {write(record.error)}" if record.error is not None else ""
            return write(record.value) + error
    return "-"
