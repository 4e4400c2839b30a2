"""One number for each of the same items of any model, less of it being better: what studies and searches compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from rankfold.errors import InputError
from rankfold.precision import widened
from rankfold.quality.classification import Labelled, right_answers
from rankfold.quality.perplexity import next_token_quality


class Score(NamedTuple):
    """What a model reached on every item."""

    name: str
    """`loss`, `masked_loss` or `mistakes`."""
    unit: str
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the items."""
        return math.fsum(self.values) / len(self.values)


Scorer = Callable[[Any], Score]
"""Scores a model; raises `ValueError` where it gives numbers that are not finite."""


def next_token_score(windows: Int[Tensor, "windows length"], batch_size: int = 8) -> Scorer:
    """Next-token loss of every window, in nats per token."""
    return lambda model: Score(
        "loss", "nat/token", next_token_quality(model, windows, batch_size=batch_size).window_losses
    )


def masked_score(batches: Sequence[Mapping[str, Tensor]]) -> Scorer:
    """Loss at the masked tokens of every window, in nats per token.

    Args:
        batches: Batches with masked `input_ids` and with `labels` that are -100 where nothing is asked, as
            `rankfold.calibration.masked_batches` makes them.
    """

    @torch.no_grad()
    def score(model: Any) -> Score:
        losses: list[float] = []
        for batch in batches:
            logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits.float()
            each = F.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none", ignore_index=-100)
            asked = widened((batch["labels"] != -100).sum(1))
            losses += (widened(each).sum(1)[asked > 0] / asked[asked > 0]).tolist()
        if not losses or not all(map(math.isfinite, losses)):
            raise InputError("The masked-token loss must be finite, but the model gives NaN or infinity.")
        return Score("masked_loss", "nat/token", tuple(losses))

    return score


def mistake_score(tokenizer: Any, labelled: Labelled) -> Scorer:
    """1 for every labelled row that a classifier gets wrong, 0 otherwise."""
    return lambda model: Score(
        "mistakes", "1", tuple(1.0 - right for right in right_answers(model, tokenizer, labelled))
    )
