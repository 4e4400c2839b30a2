"""Models measured side by side: quality on held-out text, size, time, memory and energy, in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankfold.calibration import Corpus, check_length, default_length, load_corpus, overlap
from rankfold.checkpoint import load_tokenizer
from rankfold.circumstances import Circumstances, circumstances
from rankfold.cost import Meter, open_meter
from rankfold.errors import InputError
from rankfold.measurement.cost import (
    measure_energy,
    measure_latency,
    measure_limits,
    measure_memory,
    measure_size,
)
from rankfold.measurement.quality import (
    evaluation_windows,
    measure_accuracy,
    measure_quality,
    measure_repetition,
    measure_score,
)
from rankfold.measurement.warning_signs import warning_signs
from rankfold.precision import device_of
from rankfold.progress import Stage, no_stage
from rankfold.record import Record, Records
from rankfold.recovery import is_quantized
from rankfold.sites import listens, vocabulary_size

HELD_OUT_TEXTS = ("bundled:english-held-out", "bundled:python-held-out")
"""What quality is measured on by default: two corpora, since one flatters whoever calibrated on its like."""

DECODED_TOKENS = 8
"""Tokens decoded in every round of the latency."""

Say = Callable[[str], None]
"""Takes a line for a person."""


def measure(  # noqa: PLR0913
    models: Any,
    tokenizer: Any = None,
    *,
    text: str | Path | Corpus | Sequence[str | Path | Corpus] = HELD_OUT_TEXTS,
    labels: str | Path | None = None,
    length: int | None = None,
    windows: int = 256,
    latency: bool = True,
    prompt: int = 128,
    batches: Sequence[int] = (1,),
    folders: Mapping[str, str | Path] | None = None,
    meter: Meter | None = None,
    stage: Stage = no_stage,
    say: Say = lambda line: None,
) -> Records:
    """Measure the quality, size and speed of a model, or of several against the first, which is the dense one.

    Args:
        models: A model, or models by name: `{"dense": dense, "compressed": model}`.
        tokenizer: Their tokenizer; by default the one stored with the first model.
        text: Held-out texts: files, data set names or corpora.
        labels: JSONL with sentence and label, for classifiers, in place of text.
        length: Tokens per window; by default 512, or the models' limit if lower.
        windows: Maximum number of windows to score.
        latency: Whether prefill and decoding are timed, models interleaved, and memory and energy measured.
        prompt: Tokens of the timed prompt.
        batches: Numbers of prompts that are timed at once.
        folders: Folders of the models, by name, to count their bytes on disk.
        meter: Energy meter; by default whatever this machine has.
        stage: Opens a stage of work, for progress bars.
        say: Receives messages for the user, line by line.

    Raises:
        ValueError: If the models do not share a vocabulary, or read fewer tokens than asked for.
    """
    chosen: dict[str, Any] = dict(models) if isinstance(models, Mapping) else {"model": models}
    check_comparable(chosen)
    for measured in chosen.values():
        check_length(measured, max(length or 0, prompt + DECODED_TOKENS if latency else 0))
    if tokenizer is None:
        tokenizer = load_tokenizer(next(iter(chosen.values())).name_or_path)
    here = circumstances(chosen, seed=0)
    task = _Task(chosen, tokenizer, here, stage, say)
    records = Records(measure_size(chosen, folders or {}, here))
    if labels is not None:
        records += measure_accuracy(chosen, tokenizer, labels, here)
    else:
        size = length or min(default_length(measured.config) for measured in chosen.values())
        several = [text] if isinstance(text, (str, Path, Corpus)) else text
        records += task.quality(several, size, windows)
    if latency:
        device = str(device_of(next(iter(chosen.values()))))
        records += task.cost(batches, prompt, meter or open_meter(device))
    quantized = [name for name, measured in chosen.items() if is_quantized(measured)]
    for sign in warning_signs(records, dense=next(iter(chosen)), quantized=quantized):
        records.append(here.record(sign.subject, "failure sign", None, sign=sign.name, text=sign.text))
    return records


def check_comparable(models: Mapping[str, Any]) -> None:
    """Refuse to compare models token by token that have different tokens.

    Raises:
        ValueError: If their vocabularies differ in size.
    """
    sizes = {name: vocabulary_size(model) for name, model in models.items()}
    if len(set(sizes.values())) > 1:
        raise InputError(f"Models are compared token by token and must share a vocabulary, but have {sizes} tokens.")


@dataclass(frozen=True)
class _Task:
    models: Mapping[str, Any]
    tokenizer: Any
    here: Circumstances
    stage: Stage
    say: Say

    def quality(self, texts: Sequence[str | Path | Corpus], length: int, windows: int) -> list[Record]:
        """What models lose on held-out texts, each by its own objective."""
        models, tokenizer, here = self.models, self.tokenizer, self.here
        records: list[Record] = []
        if all("MaskedLM" in type(measured).__name__ for measured in models.values()):
            for name in texts:
                records += measure_score(models, tokenizer, name, length=length, windows=windows, here=here)
            return records
        hearing = all(listens(measured) for measured in models.values())
        decoders = all(model.can_generate() and not model.config.is_encoder_decoder for model in models.values())
        if not hearing and not decoders:
            self.say(
                "Quality was not measured: perplexity is for decoders; give a classifier labelled rows (`labels`)."
            )
            return records
        if hearing:
            self.say("These are speech models: their decoders are scored on text alone, with silence as audio.")
        seen = self._calibration_texts()
        for text in texts:
            corpus = text if isinstance(text, Corpus) else load_corpus(text)
            shared = None if seen is None else overlap(seen, corpus.texts)
            if shared:
                self.say(f"Warning: {shared:.1%} of {corpus.name} is in the text that the model was calibrated on.")
            tokens = evaluation_windows(tokenizer, corpus, length, windows)
            facts = here.also(data=corpus.name, data_sha256=corpus.sha256, overlap_with_calibration=shared)
            advance = self.stage(f"windows of {corpus.name}", len(models) * -(-len(tokens) // 8))
            records += measure_quality(models, tokens, facts, advance)
            if not hearing:
                records += measure_repetition(models, tokenizer, corpus.texts, facts)
        return records

    def cost(self, batches: Sequence[int], prompt: int, meter: Meter) -> list[Record]:
        """What models take: time, memory beyond the weights, energy."""
        models, here = self.models, self.here
        records: list[Record] = []
        settings = {"prompt_tokens": prompt, "decoded_tokens": DECODED_TOKENS}
        advance = self.stage("latency rounds", 16 * len(batches))
        for size in batches:
            records += measure_latency(models, here, advance, **settings, batch_size=size)
        records += measure_limits(models, here)
        records += measure_memory(models, here, prompt_tokens=prompt)
        records += measure_energy(models, meter, here, **settings)
        if meter.source in ("unavailable", "estimate"):
            self.say(f"Energy was {'not counted' if meter.source == 'unavailable' else 'estimated'}: {meter.about}.")
        return records

    def _calibration_texts(self) -> Sequence[str] | None:
        """The text that a compressed model was calibrated and trained on, where it can still be read here."""
        for measured in self.models.values():
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
                    self.say(f"The text {name}, used for this model, cannot be read here: overlap is not checked.")
                else:
                    texts += corpus.texts
            if texts:
                return texts
        return None
