"""Text that a model writes after prompts: in batches, greedy or sampled, up to strings that end it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rankfold.calibration import max_length
from rankfold.errors import InputError
from rankfold.precision import device_of


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float = 0.0
    """0 takes the most likely token."""
    top_p: float = 0.95
    """Only the most likely tokens that together have this probability are drawn from (arXiv:1904.09751)."""
    new_tokens: int = 256
    """Tokens written at most."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot be followed."""
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.new_tokens < 1:
            raise InputError(
                "Sampling needs a temperature of 0 or more, top_p in (0, 1] and at least one new token, but got "
                f"temperature {self.temperature:g}, top_p {self.top_p:g} and {self.new_tokens} new tokens."
            )


def prompt_room(model: Any, sampling: Sampling) -> int | None:
    """Tokens that a prompt may have so that the model can write after it; `None` where nothing limits it.

    Raises:
        ValueError: If the new tokens alone fill what the model reads.
    """
    limit = max_length(model.config)
    if limit is None:
        return None
    if sampling.new_tokens >= limit:
        raise InputError(
            f"The model reads {limit} tokens, so it must write fewer than that after a prompt, but "
            f"{sampling.new_tokens} new tokens were asked for."
        )
    return limit - sampling.new_tokens


@torch.no_grad()
def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    sampling: Sampling,
    stops: Sequence[str] = (),
    seed: int = 0,
) -> list[str]:
    """What a causal language model writes after each prompt, all prompts in one batch.

    A prompt that leaves no room for the new tokens loses its beginning. Where strings end a text, one that none of
    them ended, nor the model, was cut off by the limit, and loses its half line.

    Raises:
        ValueError: If the model does not generate text, or there is no room for a prompt.
    """
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise InputError(f"Only a causal language model continues a prompt, but this is a {type(model).__name__}.")
    room = prompt_room(model, sampling)
    rows = [prompt_ids(tokenizer, prompt, room) for prompt in prompts]
    device = device_of(model)
    ids, mask = _padded(rows, _padding(tokenizer))
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if sampling.temperature else {}
    ending = {"stop_strings": list(stops), "tokenizer": tokenizer} if stops else {}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        written = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            do_sample=sampling.temperature > 0,
            max_new_tokens=sampling.new_tokens,
            pad_token_id=_padding(tokenizer),
            **drawn,
            **ending,
        )
    new = written[:, ids.shape[1] :].tolist()
    ends = _end_tokens(model, tokenizer)
    return [_text_after(tokenizer, row, after, stops, ends) for row, after in zip(rows, new, strict=True)]


def prompt_ids(tokenizer: Any, prompt: str, room: int | None) -> list[int]:
    """Token ids of a prompt, begun as the tokenizer begins a text, its end kept where it has too many."""
    begin = tokenizer.bos_token_id
    ids: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    start = [] if begin is None else [begin]
    if room is not None:
        ids = ids[max(0, len(ids) + len(start) - room) :]
    return [*start, *ids] or [_padding(tokenizer)]


def _padding(tokenizer: Any) -> int:
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(token for token in candidates if token is not None))


def _padded(rows: Sequence[Sequence[int]], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows filled up on the left, and the mask of what is theirs."""
    longest = max(map(len, rows))
    ids = torch.tensor([[padding] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Tokens at which the model stops writing."""
    named = getattr(model.generation_config, "eos_token_id", None)
    listed = named if isinstance(named, list) else [named]
    return {token for token in (*listed, tokenizer.eos_token_id) if token is not None}


def _text_after(tokenizer: Any, prompt: list[int], new: list[int], stops: Sequence[str], end_tokens: set[int]) -> str:
    """The new text as it stands after the prompt, cut where a stop begins; without a half line if nothing ended it."""

    # Some tokenizers drop a space at the beginning of a text, so the prompt is decoded with it.
    def text(ids: list[int]) -> str:
        decoded: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return decoded

    before, whole = text(prompt), text(prompt + new)
    after = whole[len(before) :] if whole.startswith(before) else text(new)
    ends = [place for place in map(after.find, stops) if place >= 0]
    if ends:
        return after[: min(ends)]
    if stops and not set(new) & end_tokens:
        return after[: after.rfind("\n") + 1]
    return after
