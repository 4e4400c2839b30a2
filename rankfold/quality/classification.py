"""Accuracy of a sequence classifier on labelled texts."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rankfold.errors import InputError
from rankfold.precision import device_of
from rankfold.progress import Step, no_step


class Labelled(NamedTuple):
    """Texts and the index of the right class of each."""

    texts: list[str]
    labels: list[int]


class Accuracy(NamedTuple):
    """Right answers among all."""

    right: int
    total: int

    @property
    def value(self) -> float:
        """Share of right answers."""
        return self.right / self.total

    @property
    def error(self) -> float:
        """Binomial standard error."""
        return math.sqrt(self.value * (1 - self.value) / self.total)


def load_labelled(path: str | Path) -> Labelled:
    """Rows of a JSONL file, plain or `.gz`, with `sentence` or `text` and an integer `label`.

    Raises:
        ValueError: If the file is missing, empty, or a row lacks a text or a label.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{file}: labelled texts must be a JSONL file, but there is no such file.")
    opener: Any = gzip.open if file.suffix == ".gz" else open
    rows = []
    with opener(file, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except json.JSONDecodeError as error:
                raise InputError(f"{file}, line {number}: each line must be one JSON object ({error}).") from error
    if not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{file}: each row must be an object with `sentence` or `text` and an integer `label`.")
    texts = [row.get("sentence", row.get("text")) for row in rows]
    labels = [row.get("label") for row in rows]
    if any("\ud800" <= character <= "\udfff" for text in texts if isinstance(text, str) for character in text):
        raise InputError(f"{file}: text must be valid Unicode, but a row holds half of a surrogate pair.")
    if not rows or not all(isinstance(t, str) for t in texts) or not all(isinstance(n, int) for n in labels):
        raise InputError(f"{file}: each row must hold `sentence` or `text` and an integer `label`.")
    return Labelled(texts, labels)


@torch.no_grad()
def right_answers(
    model: Any,
    tokenizer: Any,
    labelled: Labelled,
    *,
    batch_size: int = 32,
    on_step: Step = no_step,
) -> list[bool]:
    """Whether a sequence classifier gets each row right.

    Raises:
        ValueError: If a logit is NaN or infinite.
    """
    device = device_of(model)
    right: list[bool] = []
    for start in range(0, len(labelled.texts), batch_size):
        texts: Sequence[str] = labelled.texts[start : start + batch_size]
        encoded = tokenizer(texts, return_tensors="pt", padding=True, truncation=True).to(device)
        logits = model(**encoded).logits
        if not bool(torch.isfinite(logits).all()):
            raise InputError(f"Logits must be finite, but the rows from {start} on give NaN or infinity.")
        labels = torch.tensor(labelled.labels[start : start + batch_size], device=device)
        right += (logits.argmax(-1) == labels).tolist()
        on_step()
    return right


def classification_accuracy(model: Any, tokenizer: Any, labelled: Labelled, **settings: Any) -> Accuracy:
    """Right answers of a sequence classifier; `settings` are those of `right_answers`."""
    right = right_answers(model, tokenizer, labelled, **settings)
    return Accuracy(sum(right), len(right))
