"""Text written over a long run: how its quality, its variety and its cost change with the position."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from rankfold.cost import cache_bytes, cache_of
from rankfold.errors import InputError
from rankfold.precision import device_of
from rankfold.progress import Step, no_step
from rankfold.quality import distinct_share, next_token_quality, repeated_share


class Stretch(NamedTuple):
    """What was written between two positions."""

    start: int
    """Position of its first token."""
    perplexity: float
    """Of the dense model on the text: what it thinks of it."""
    kl: float
    """Mean divergence from the dense model's distribution on the text, in nats per token."""
    repeated: float
    """Share of its 4-grams of tokens that stood in it before."""
    distinct: float
    """Share of its bigrams of tokens that are different."""
    seconds: float
    """Per token."""
    cache_bytes: int
    """Bytes that were kept of the text when it ended."""


@torch.no_grad()
def write_long(
    model: Any,
    prompt: Int[Tensor, " prompt"],
    tokens: int,
    *,
    window: int,
    temperature: float = 0.8,
    seed: int = 0,
    on_step: Step = no_step,
) -> tuple[Int[Tensor, " tokens"], list[float]]:
    """Write many tokens, the model reading at most `window` of them: its older half is dropped when it is full.

    Args:
        model: A causal language model.
        prompt: Token ids to begin with.
        tokens: Tokens to write.
        window: Tokens that the model reads at most.
        temperature: Temperature of sampling.
        seed: Seed of sampling.
        on_step: Called after each token.

    Returns:
        The tokens written, and the seconds of each.

    Raises:
        ValueError: If the prompt does not fit, or a logit is not finite.
    """
    if not 0 < len(prompt) <= window // 2:
        raise InputError(f"A prompt must fill at most half of the window of {window} tokens, but has {len(prompt)}.")
    generator = torch.Generator().manual_seed(seed)
    device = device_of(model)
    text = prompt.tolist()
    seconds: list[float] = []
    cache: dict[str, Any] = {}
    held = 0
    while len(seconds) < tokens:
        start = time.perf_counter()
        if not cache or held >= window:
            read = text[-(window // 2) :]
            cache, held = {}, 0
        else:
            read = text[-1:]
        output = model(input_ids=torch.tensor([read], device=device), use_cache=True, **cache)
        cache, held = cache_of(output), held + len(read)
        logits = output.logits[0, -1].float().cpu()
        if not bool(torch.isfinite(logits).all()):
            raise InputError(f"Logits must be finite, but token {len(seconds)} of the run gives NaN or infinity.")
        chances = (logits / temperature).softmax(-1)
        text.append(int(torch.multinomial(chances, 1, generator=generator)))
        seconds.append(time.perf_counter() - start)
        on_step()
    return torch.tensor(text[len(prompt) :]), seconds


def stretches(
    model: Any,
    dense: Any,
    written: Int[Tensor, " tokens"],
    seconds: Sequence[float],
    *,
    length: int,
    window: int,
) -> list[Stretch]:
    """What a run looks like, stretch by stretch.

    Args:
        model: The model that wrote.
        dense: The dense model.
        written: From `write_long`.
        seconds: The same.
        length: Tokens of a stretch, a multiple of half of the window.
        window: Tokens that the model read at most.
    """
    kept = cache_bytes(model, window) or 0
    found = []
    for start in range(0, len(written) - length + 1, length):
        part = written[start : start + length]
        windows = part[: length - length % (window // 2)].reshape(-1, window // 2)
        own = next_token_quality(model, windows, dense=dense)
        # Tokens, not words: a text that goes round in circles may have no spaces.
        text = " ".join(map(str, part.tolist()))
        found.append(
            Stretch(
                start=start,
                perplexity=next_token_quality(dense, windows).perplexity,
                kl=own.kl or 0.0,
                repeated=repeated_share([text]),
                distinct=distinct_share([text]),
                seconds=sum(seconds[start : start + length]) / length,
                cache_bytes=kept,
            )
        )
    return found
