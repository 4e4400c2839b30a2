"""A model's input embedding and head in few bits: found, rounded, and each width priced by what the model then says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from rankfold.errors import InputError
from rankfold.modules import GroupEmbedding, GroupLinear, TiedHead, put_embeddings
from rankfold.precision import float64_device
from rankfold.progress import Step, no_step
from rankfold.quantization.gptq import GPTQ, Groups, gptq, gptq_linear

EMBEDDING_BITS = (3, 4, 5, 6, 8)
"""Widths among which a budget chooses, besides leaving the embeddings as they are."""

GROUP = 64
"""Dimensions of a row that share a scale."""

WINDOWS = 8
"""Windows of the calibration text on which each width is measured; what was rounded by is read from others."""

READ = 64
"""Windows from which the moment of the head's inputs is taken."""

ROWS = 8192
"""Tokens whose rows are rounded at once."""


class Embeddings(NamedTuple):
    """A model's input embedding, and its head where it has one."""

    embedding: nn.Embedding
    head: nn.Linear | None
    tied: bool

    @property
    def bytes(self) -> int:
        """Bytes of both as they are, tied ones counted once."""
        weights = [self.embedding.weight] if self.tied or self.head is None else self._weights
        return sum(weight.numel() * weight.element_size() for weight in weights)

    def bytes_in(self, bits: int) -> int:
        """Bytes of both in few bits, scales and zero points counted."""
        count = len(self._weights) if not self.tied else 1
        return count * GPTQ.bytes(self.embedding.num_embeddings, self.embedding.embedding_dim, Groups(bits, GROUP))

    @property
    def _weights(self) -> list[Tensor]:
        return [self.embedding.weight, *(() if self.head is None else (self.head.weight,))]

    @torch.no_grad()
    def in_bits(self, bits: int, second: Float[Tensor, "in in"] | None = None) -> tuple[GroupEmbedding, Any]:
        """The layers in few bits that take their places; for the head `None` where there is none.

        Args:
            bits: Bits of a weight.
            second: Second moment of what the head reads, by which a tied matrix is rounded too: as a lookup it would
                rather have errors alike in all directions, but loses less by these (docs/log.md).
        """
        dtype = self.embedding.weight.dtype
        alike = torch.eye(self.embedding.embedding_dim, device=self.embedding.weight.device)
        read = alike if second is None else second
        rows = _rounded(self.embedding.weight, read if self.tied else alike, bits, None, dtype)
        embedding = GroupEmbedding.from_linear(rows, self.embedding.padding_idx)
        if self.head is None:
            return embedding, None
        if self.tied:
            return embedding, TiedHead(embedding, self.head.bias)
        return embedding, _rounded(self.head.weight, read, bits, self.head.bias, dtype)


def _rounded(weight: Tensor, second: Tensor, bits: int, bias: Tensor | None, dtype: torch.dtype) -> GroupLinear:
    """Many rows in few bits, a share of them at a time."""
    place = float64_device(weight.device)
    parts = [gptq(rows.to(place), second.to(place), bits, GROUP) for rows in torch.split(weight, ROWS)]
    levels = type(parts[0])(*(torch.cat(part) for part in zip(*parts, strict=True)))
    return gptq_linear(levels, Groups(bits, GROUP), bias, dtype).to(weight.device)


def find_embeddings(model: Any) -> Embeddings:
    """The input embedding of a causal language model and its head.

    Raises:
        ValueError: If they are of a kind that has no form in few bits here.
    """
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise InputError(
            f"Embeddings are stored in few bits for causal language models, but got a {type(model).__name__}. "
            "Leave them as they are."
        )
    try:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:
        embedding = head = None
    name = type(model).__name__
    places = [path for path, module in model.named_modules(remove_duplicate=False) if module is embedding]
    reasons = {
        "are in few bits already": isinstance(embedding, GroupEmbedding),
        f"are no plain lookup (nn.Embedding), but {type(embedding).__name__}": type(embedding) is not nn.Embedding,
        f"stand at several places ({', '.join(places)})": len(places) > 1,
        f"belong to a head of another kind ({type(head).__name__})": head is not None and type(head) is not nn.Linear,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    if reason is None:
        if embedding.max_norm is not None:
            reason = "are renormalized while they are looked up"
        elif head is not None and head.weight.shape != embedding.weight.shape:
            reason = f"have other sizes than the head: {tuple(embedding.weight.shape)} and {tuple(head.weight.shape)}"
    if reason is not None:
        raise InputError(
            f"The embeddings of {name} {reason}: they cannot be stored in few bits. Leave them as they are."
        )
    tied = head is not None and head.weight is embedding.weight
    return Embeddings(embedding, head, tied)


class Width(NamedTuple):
    """What embeddings in some bits take and cost."""

    bits: int
    bytes: int
    loss: float
    """Mean divergence of the model's predictions from those that it made before, in nats a token."""


@torch.no_grad()
def embedding_widths(
    model: Any,
    batches: Sequence[Mapping[str, Tensor]],
    widths: Sequence[int] = EMBEDDING_BITS,
    on_step: Step = no_step,
) -> list[Width]:
    """What each width of the embeddings costs alone, measured: the rest of the model stays as it is.

    Args:
        model: A causal language model.
        batches: Calibration batches: the last windows measure, others say what the head reads.
        widths: Bits to try.
        on_step: Called after each width.

    Raises:
        ValueError: If the embeddings cannot be stored in few bits (`find_embeddings`).
    """
    found = find_embeddings(model)
    second = head_inputs(model, found, batches)
    _, windows = _parts(batches)
    before = [_logits(model, batch) for batch in windows]
    result = []
    for bits in widths:
        with _in_place(model, found, bits, second):
            after = (_logits(model, batch) for batch in windows)
            parts = [_divergence(p, q) for p, q in zip(before, after, strict=True)]
        tokens = sum(count for _, count in parts)
        result.append(Width(bits, found.bytes_in(bits), sum(total for total, _ in parts) / tokens))
        on_step()
    return result


@torch.no_grad()
def head_inputs(model: Any, found: Embeddings, batches: Sequence[Mapping[str, Tensor]]) -> Tensor | None:
    """Second moment of what the head reads; `None` without a head."""
    if found.head is None:
        return None
    second = torch.zeros(found.head.in_features, found.head.in_features, device=found.head.weight.device)

    def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].reshape(-1, args[0].shape[-1]).float()
        second.addmm_(x.T, x)

    hook = found.head.register_forward_pre_hook(add)
    try:
        for batch in _parts(batches)[0]:
            model(**batch)
    finally:
        hook.remove()
    return second


def put_in_bits(model: Any, bits: int, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """Store a model's embeddings in few bits, in place, and say what that took.

    Raises:
        ValueError: If they cannot be stored so (`find_embeddings`).
    """
    found = find_embeddings(model)
    second = head_inputs(model, found, batches)
    put_embeddings(model, *found.in_bits(bits, second), tied=False)
    return {"bits": bits, "tied": found.tied, "bytes": found.bytes_in(bits), "dense_bytes": found.bytes}


@contextmanager
def _in_place(model: Any, found: Embeddings, bits: int, second: Tensor | None) -> Iterator[None]:
    """The model with embeddings in few bits, for a while."""
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    put_embeddings(model, *found.in_bits(bits, second), tied=False)
    try:
        yield
    finally:
        put_embeddings(model, found.embedding, found.head, tied=tied)


def _parts(batches: Sequence[Mapping[str, Tensor]]) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Windows to round by and others to measure on, without labels; a single window has to do for both."""
    windows = [
        {name: value[row : row + 1] for name, value in batch.items() if name != "labels"}
        for batch in batches
        for row in range(len(next(iter(batch.values()))))
    ]
    measured = min(WINDOWS, len(windows) // 2)
    return windows[: len(windows) - measured][:READ], windows[-measured:] if measured else windows


def _logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    logits: Tensor = model(**batch).logits
    return logits[batch["attention_mask"].bool()] if "attention_mask" in batch else logits.flatten(0, 1)


def _divergence(p: Float[Tensor, "tokens vocabulary"], q: Float[Tensor, "tokens vocabulary"]) -> tuple[float, int]:
    """Sum of the divergences of all tokens, and their number; some rows at a time, since vocabularies are large."""
    total = 0.0
    for before, after in zip(torch.split(p, 256), torch.split(q, 256), strict=True):
        logs = before.float().log_softmax(-1)
        total += float(F.kl_div(after.float().log_softmax(-1), logs, reduction="sum", log_target=True))
    return total, len(p)
