"""Losses whose gradients weigh a layer's outputs: of the text's own labels, or of labels drawn from the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from rankfold.errors import InputError

LABELS = ("text", "sampled")
"""Where labels come from: the text itself (empirical Fisher matrix), or the model (the Fisher matrix)."""

Loss = Callable[[Any, Mapping[str, Tensor]], Tensor]
"""A scalar from a model's output and the batch that it read."""

PART = 2**22
"""Logits that become float32 at once."""

IGNORED = -100
"""The label of positions that are not scored, as everywhere in transformers."""


def summed_loss(model: Any, labels: str = "text", seed: int = 0) -> Loss:
    """The loss of a model summed over everything that it predicts, so that each token's gradient has its own scale.

    Decoders are scored on the next token, classifiers on the class of each sequence, masked language models on
    the positions that carry a label (`masked_batches`) or on all. A bare encoder predicts nothing, and a single
    score has no alternative: such outputs are probed in random directions, which weighs their squared error.

    Args:
        model: A transformers model.
        labels: `text` reads the batch's `labels`, or its own next tokens; `sampled` draws from the model's
            distribution and needs none.
        seed: Seed of what is drawn.

    Raises:
        ValueError: If `labels` is unknown; when called, if `text` is asked for and the batch carries no labels.
    """
    if labels not in LABELS:
        raise InputError(f"Labels must be `text` or `sampled`, but got {labels!r}.")
    generator = torch.Generator().manual_seed(seed)
    shifted = bool(model.can_generate())
    encoder_decoder = model.config.is_encoder_decoder

    def loss(output: Any, batch: Mapping[str, Tensor]) -> Tensor:
        logits = getattr(output, "logits", None)
        if logits is None and getattr(output, "start_logits", None) is not None:
            # Answers are spans: the first and the last token are drawn, each from all tokens.
            logits = torch.stack([output.start_logits, output.end_logits])
        if logits is None or logits.shape[-1] == 1:
            values: Tensor = output.last_hidden_state if logits is None else logits
            return (values.float() * torch.randn(values.shape, generator=generator).to(values.device)).sum()
        targets = batch.get("labels")
        if shifted and (targets is None or not encoder_decoder):
            ids = batch["decoder_input_ids" if encoder_decoder else "input_ids"]
            # Nothing is cut off the logits, which would be copied; the last one predicts nothing.
            targets = F.pad((ids if targets is None else targets)[:, 1:], (0, 1), value=IGNORED)
        if labels == "sampled":
            targets = _drawn(logits, targets, generator)
        if targets is None:
            raise InputError(
                f"The loss of a {type(model).__name__} needs labels in its batches, but they hold {sorted(batch)}. "
                "Add them, or draw them from the model: labels='sampled'."
            )
        return _SummedCrossEntropy.apply(logits, targets)  # type: ignore[no-any-return,no-untyped-call]

    return loss


def usual_labels(model: Any, batches: Sequence[Mapping[str, Tensor]]) -> str:
    """Where labels come from if nobody says: the text where it holds them, otherwise the model."""
    return "text" if model.can_generate() or any("labels" in batch for batch in batches) else "sampled"


def usual_loss(model: Any, batches: Sequence[Mapping[str, Tensor]], seed: int = 0) -> Loss:
    """The loss whose gradients weigh a model's outputs if nobody says which."""
    return summed_loss(model, usual_labels(model, batches), seed)


class _SummedCrossEntropy(torch.autograd.Function):
    """Cross entropy in float32, summed, of logits that lie in memory once.

    Logits are the largest tensors of small models; those of few positions at a time become float32, in both directions.
    """

    @staticmethod
    def forward(ctx: Any, logits: Float[Tensor, "*rows classes"], targets: Int[Tensor, "*rows"]) -> Tensor:
        """The sum over all positions that have a label."""
        norms: list[Tensor] = []
        total = torch.zeros((), device=logits.device)
        for scores, target in _parts(logits, targets):
            norm = scores.logsumexp(-1)
            of_target = scores.gather(-1, target.clamp(min=0)[:, None]).squeeze(-1)
            total += torch.where(target == IGNORED, 0.0, norm - of_target).sum()
            norms.append(norm)
        ctx.save_for_backward(logits, targets, torch.cat(norms))
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """Probabilities less the labels."""
        logits, targets, norms = ctx.saved_tensors
        found = torch.empty_like(logits, memory_format=torch.contiguous_format)
        rows = found.view(-1, found.shape[-1])
        done = 0
        for scores, target in _parts(logits, targets):
            reach = slice(done, done + len(scores))
            part = scores.sub_(norms[reach, None]).exp_()
            part.scatter_add_(-1, target.clamp(min=0)[:, None], part.new_full((len(part), 1), -1.0))
            rows[reach] = part.mul_(torch.where(target == IGNORED, 0.0, gradient)[:, None]).to(rows.dtype)
            done = reach.stop
        return found, None


def _parts(
    logits: Float[Tensor, "*rows classes"], targets: Int[Tensor, "*rows"] | None
) -> Iterator[tuple[Float[Tensor, "some classes"], Any]]:
    """Few rows of logits at a time, copied into float32, with their labels."""
    rows = logits.detach().reshape(-1, logits.shape[-1])
    some = max(1, PART // rows.shape[-1])
    labels = [None] * len(rows) if targets is None else targets.reshape(-1)
    for start in range(0, len(rows), some):
        yield rows[start : start + some].to(torch.float32, copy=True), labels[start : start + some]


def _drawn(
    logits: Float[Tensor, "*rows classes"], targets: Int[Tensor, "*rows"] | None, generator: torch.Generator
) -> Int[Tensor, "*rows"]:
    """Labels from the model's own distribution, at the positions that are scored."""
    parts = [
        torch.multinomial(scores.softmax(-1).cpu(), 1, generator=generator) for scores, _ in _parts(logits, targets)
    ]
    drawn = torch.cat(parts).reshape(logits.shape[:-1]).to(logits.device)
    return drawn if targets is None else torch.where(targets == IGNORED, targets, drawn)


def masked_batches(
    batches: Iterable[Mapping[str, Tensor]], mask_token: int, keep: Iterable[int] = (), seed: int = 0
) -> list[dict[str, Tensor]]:
    """Batches for a masked language model: 15 % of the tokens replaced by the mask and scored, as in its training.

    Args:
        batches: Batches with `input_ids`.
        mask_token: Id of the mask.
        keep: Ids that are never masked, such as those that frame a sequence.
        seed: Seed of the choice.
    """
    generator = torch.Generator().manual_seed(seed)
    kept = torch.tensor(sorted(keep), dtype=torch.long)
    result = []
    for batch in batches:
        ids = batch["input_ids"]
        chosen = (torch.rand(ids.shape, generator=generator) < 0.15).to(ids.device)
        chosen &= ~torch.isin(ids, kept.to(ids.device))
        labels = torch.where(chosen, ids, IGNORED)
        result.append({**batch, "input_ids": torch.where(chosen, mask_token, ids), "labels": labels})
    return result
