"""Perplexity with its standard error, and how far a compressed model is from the dense one, in one pass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from rankfold.errors import InputError
from rankfold.precision import device_of, widened
from rankfold.progress import Step, no_step
from rankfold.sites import listens, text_arguments, vocabulary_size

LOGITS = 2**26
"""Logits of a forward call at most, if it reads more than one window; in float32, and about six copies of them."""


@dataclass(frozen=True)
class Quality:
    """Next-token quality over some windows; each error is the standard error of a mean over windows."""

    tokens: int
    """Tokens that were scored."""
    loss: float
    """Mean negative log-likelihood in nats per token."""
    loss_error: float | None
    """`None` where there is one window only."""
    kl: float | None = None
    """Mean divergence from the dense model's distribution, in nats per token."""
    kl_error: float | None = None
    agreement: float | None = None
    """Share of tokens at which the most likely next token is the dense model's."""
    agreement_error: float | None = None
    window_losses: tuple[float, ...] = ()
    """Mean loss of every window, for differences between models on the same windows."""

    @property
    def perplexity(self) -> float:
        """`exp(loss)`."""
        return math.exp(min(self.loss, 700.0))

    @property
    def perplexity_error(self) -> float | None:
        """Standard error of the perplexity, to first order."""
        return None if self.loss_error is None else self.perplexity * self.loss_error


@torch.no_grad()
def next_token_quality(
    model: Any,
    windows: Int[Tensor, "windows length"],
    *,
    dense: Any = None,
    batch_size: int = 8,
    on_step: Step = no_step,
) -> Quality:
    """Quality of a causal language model on windows of tokens, the first token of each unscored.

    A decoder that listens is scored on text alone, after silence.

    Args:
        model: The model to measure.
        windows: Token ids, each window on its own.
        dense: The model to compare with, if any; it reads the same batches.
        batch_size: Windows between two steps; a forward call reads fewer where they have more than `LOGITS` logits.
        on_step: Called after each batch, for a progress bar.

    Returns:
        Token-weighted means over all windows.

    Raises:
        ValueError: If a logit is NaN or infinite; no batch is ever dropped.
    """
    columns: list[Tensor] = []
    device = device_of(model)
    at_once = max(1, LOGITS // max(1, windows.shape[1] * (vocabulary_size(model) or 1)))
    for number, batch in enumerate(torch.split(windows, batch_size)):
        for part in torch.split(batch, at_once):
            ids = part.to(device)
            logits = _logits(model, ids, number)
            loss = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            rows = [widened(loss).mean(1)]
            if dense is not None:
                reference = _logits(dense, ids, number)
                rows += _distance(logits, reference)
            columns.append(torch.stack(rows).cpu())
        on_step()
    table = torch.cat(columns, dim=1)
    means = table.mean(1).tolist()
    errors: list[float | None] = [None] * len(table)
    if table.shape[1] > 1:
        errors = (table.std(1) / math.sqrt(table.shape[1])).tolist()
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    pairs = [*zip(means, errors, strict=True), (None, None), (None, None)]
    (loss, loss_error), (kl, kl_error), (agreement, agreement_error) = pairs[:3]
    return Quality(tokens, loss, loss_error, kl, kl_error, agreement, agreement_error, tuple(table[0].tolist()))


def _logits(model: Any, ids: Int[Tensor, "batch length"], number: int) -> Float[Tensor, "batch scored vocabulary"]:
    """Logits for every token but the first of each window, in float32."""
    read = text_arguments(model, ids) if listens(model) else {"input_ids": ids}
    logits: Tensor = model(**read).logits[:, :-1].float()
    if not bool(torch.isfinite(logits).all()):
        raise InputError(
            f"Logits must be finite, but batch {number} of the evaluation gives NaN or infinity. Load a float16 model "
            "with `dtype` bfloat16 or float32; if it persists, the model is broken and has no perplexity."
        )
    return logits


def _distance(logits: Tensor, reference: Tensor) -> list[Tensor]:
    """Divergence from the reference and agreement with its first choice, by window."""
    expected = reference.log_softmax(-1)
    kl = (expected.exp() * (expected - logits.log_softmax(-1))).sum(-1)
    agreement = logits.argmax(-1) == reference.argmax(-1)
    return [widened(kl).mean(1), widened(agreement).mean(1)]
