"""How good models are side by side, on the same text or the same rows, as records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from rankfold.circumstances import Circumstances
from rankfold.errors import InputError
from rankfold.fingerprint import file_digest, fingerprint
from rankfold.progress import Step, no_step
from rankfold.quality import (
    Sampling,
    Scorer,
    classification_accuracy,
    complete,
    distinct_share,
    load_labelled,
    masked_score,
    mistake_score,
    next_token_quality,
    next_token_score,
    paired_difference,
    repeated_share,
)
from rankfold.record import Record

PROMPTS, WRITTEN = 8, 96
"""Texts that are continued, and tokens written after each, to see whether a model repeats itself."""


def evaluation_windows(tokenizer: Any, corpus: Corpus, length: int, limit: int | None = None) -> Tensor:
    """Windows without overlap, each begun by the token with which the tokenizer begins a text.

    Raises:
        ValueError: If the corpus does not fill one window.
    """
    begin, end = special_tokens(tokenizer)
    enough = None if limit is None else (limit + 1) * length
    return split_windows(token_stream(tokenizer, corpus.texts, enough), length, begin, end)[:limit]


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
    text: str | Path | Corpus,
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
    corpus = text if isinstance(text, Corpus) else load_corpus(text)
    if "MaskedLM" in kind and tokenizer.mask_token_id is not None:
        tokens = evaluation_windows(tokenizer, corpus, length, windows)
        batches = masked_batches(make_batches(model, tokens, 8), tokenizer.mask_token_id, tokenizer.all_special_ids)
        return masked_score(batches), Scored(corpus.name, tokens, tokenizer.mask_token_id)
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise InputError(
            f"A {kind} has no next-token or masked-token loss. For a classifier give labelled rows (`labels`)."
        )
    tokens = evaluation_windows(tokenizer, corpus, length, windows)
    return next_token_score(tokens), Scored(corpus.name, tokens)


def measure_quality(
    models: Mapping[str, Any],
    windows: Tensor,
    here: Circumstances,
    on_step: Step = no_step,
) -> list[Record]:
    """Perplexity of every model, and the distance of all others from the first, which is the dense one."""
    reference, *_ = models
    records = []
    for name, model in models.items():
        dense = models[reference] if name != reference else None
        quality = next_token_quality(model, windows, dense=dense, on_step=on_step)
        rows: list[tuple[str, float, str, float | None]] = [
            ("loss", quality.loss, "nat/token", quality.loss_error),
            ("perplexity", quality.perplexity, "1", quality.perplexity_error),
        ]
        if quality.kl is not None:
            rows += [("kl_to_dense", quality.kl, "nat/token", quality.kl_error)]
        if quality.agreement is not None:
            rows += [("top1_agreement", quality.agreement, "1", quality.agreement_error)]
        records += [here.record(name, *row, tokens=quality.tokens) for row in rows]
    return records


def measure_score(
    models: Mapping[str, Any],
    tokenizer: Any,
    text: str | Path | Corpus,
    *,
    length: int,
    windows: int,
    here: Circumstances,
) -> list[Record]:
    """The loss of every model by its own objective, and the paired difference of all others from the first."""
    reference, *_ = models
    score, data = scorer_for(models[reference], tokenizer, text=text, length=length, windows=windows)
    here = here.also(data=data.name, data_sha256=fingerprint(data.fingerprint))
    scores = {name: score(model) for name, model in models.items()}
    records = []
    for name, found in scores.items():
        mean = paired_difference(found.values, [0.0] * len(found.values))
        records.append(here.record(name, found.name, mean.value, found.unit, mean.error))
        if name != reference:
            rise = paired_difference(found.values, scores[reference].values)
            records.append(here.difference(name, found.name, rise.value, found.unit, rise.error, minus=reference))
    return records


def measure_accuracy(models: Mapping[str, Any], tokenizer: Any, path: str | Path, here: Circumstances) -> list[Record]:
    """Accuracy of every classifier on the labelled rows of a file."""
    labelled = load_labelled(path)
    for name, model in models.items():
        if "SequenceClassification" not in type(model).__name__:
            raise InputError(
                f"{name}: labelled rows are for sequence classifiers, but this is a {type(model).__name__}. Measure a "
                "language model on text: leave `labels` out."
            )
    here = here.also(data=Path(path).name, data_sha256=file_digest(Path(path)))
    records = []
    for name, model in models.items():
        accuracy = classification_accuracy(model, tokenizer, labelled)
        details = {"right": accuracy.right, "rows": accuracy.total}
        records.append(here.record(name, "accuracy", accuracy.value, "1", accuracy.error, **details))
    return records


def measure_repetition(
    models: Mapping[str, Any], tokenizer: Any, texts: Sequence[str], here: Circumstances
) -> list[Record]:
    """How much models repeat themselves when they continue the beginnings of held-out texts, greedily."""
    records = []
    reads = min(max_length(model.config) or 4096 for model in models.values())
    length = min(WRITTEN, reads // 2)
    prompts = [text[: 8 * WRITTEN] for text in texts[:PROMPTS]]
    for name, model in models.items():
        written = complete(model, tokenizer, prompts, sampling=Sampling(temperature=0.0, new_tokens=length))
        for what, value in (("repeated", repeated_share(written)), ("distinct", distinct_share(written))):
            records.append(here.record(name, what, value, prompts=len(prompts), tokens=length))
    return records
