"""Text drawn from a model itself, for recovery where no other text is at hand."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from rankfold.cost.latency import cache_of
from rankfold.errors import InputError
from rankfold.progress import Step, no_step


@torch.no_grad()
def sample_windows(
    model: Any,
    tokenizer: Any,
    count: int,
    length: int,
    *,
    seed: int = 0,
    batch_size: int = 64,
    on_step: Step = no_step,
) -> Int[Tensor, "count length"]:
    """Windows that a causal language model writes by itself, at temperature 1, each from a first token on.

    The first token is the tokenizer's own beginning; without one it is drawn evenly from the vocabulary.

    Raises:
        ValueError: If the model does not generate text.
    """
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise InputError(f"Only a causal language model writes text by itself, but this is a {type(model).__name__}.")
    device = next(model.parameters()).device
    begin = tokenizer.bos_token_id
    vocabulary = min(len(tokenizer), model.get_input_embeddings().num_embeddings)
    windows = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in range(0, count, batch_size):
            size = min(batch_size, count - start)
            first = torch.full((size, 1), begin) if begin is not None else torch.randint(vocabulary, (size, 1))
            windows.append(_continue(model, first.to(device), length).cpu())
            on_step()
    return torch.cat(windows)


def _continue(model: Any, ids: Int[Tensor, "batch start"], length: int) -> Int[Tensor, "batch length"]:
    """Tokens appended one by one; past the end of a text the model starts the next one, as in its training."""
    cache: dict[str, Any] = {}
    read = ids
    while ids.shape[1] < length:
        output = model(input_ids=read, use_cache=True, **cache)
        cache = cache_of(output)
        read = torch.multinomial(output.logits[:, -1].float().softmax(-1), 1)
        ids = torch.cat([ids, read], dim=1)
    return ids
