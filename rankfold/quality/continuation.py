"""A choice among continuations of held-out text, the true one and others: it tells small models apart."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from rankfold.errors import InputError
from rankfold.precision import device_of
from rankfold.progress import Step, no_step
from rankfold.quality.generation import prompt_ids

CHOICES = 4
"""The true continuation and three others."""


class ChoiceItems(NamedTuple):
    """Questions, each with its continuations at the end of one window a choice; the first choice is the true one."""

    windows: Int[Tensor, "items choices length"]
    scored: int
    """Tokens of a continuation."""


def choice_items(
    tokenizer: Any, texts: Sequence[str], *, count: int, context: int = 96, scored: int = 16, seed: int = 0
) -> ChoiceItems:
    """Questions from held-out text: what follows a place, against what follows other places that look alike.

    A place is the beginning of a line, or of a sentence where a text has few lines. The others are indented alike and
    come from the same text where it has enough of them, so that vocabulary alone does not give the answer away.

    Args:
        tokenizer: The tokenizer of the models that will be asked.
        texts: Held-out text.
        count: Questions.
        context: Tokens before a continuation, the begin token included.
        scored: Tokens of a continuation.
        seed: Seed of the choice of places.

    Raises:
        ValueError: If the text has not enough places.
    """
    rng = random.Random(seed)
    places = [(number, place) for number, text in enumerate(texts) for place in _places(text)]
    rng.shuffle(places)
    rows = []
    for number, place in places:
        before = prompt_ids(tokenizer, texts[number][:place], context)
        if len(before) < context:
            continue
        options = _options(tokenizer, texts, places, number, place, scored)
        if len(options) == CHOICES:
            rows.append([before + option for option in options])
        if len(rows) == count:
            break
    if len(rows) < count:
        raise InputError(
            f"The text gives {len(rows)} questions of {context} + {scored} tokens, but {count} were requested. "
            "Use a longer text, or request fewer."
        )
    return ChoiceItems(torch.tensor(rows), scored)


def _places(text: str) -> list[int]:
    """Where lines begin; where sentences do, if there are few lines."""
    lines = [match.start(1) for match in re.finditer(r"\n([^\n]*\S)", text)]
    if len(lines) * 200 >= len(text):
        return lines
    return [match.end() for match in re.finditer(r"[.!?]['\"]?\s+", text)]


def _options(
    tokenizer: Any, texts: Sequence[str], places: Sequence[tuple[int, int]], number: int, place: int, scored: int
) -> list[list[int]]:
    """The true continuation and others, as long and indented alike, none of them twice."""
    apart = 4 * scored * 6  # more characters than context and continuation have
    near = [p for n, p in places if n == number and abs(p - place) > apart]
    far = [(n, p) for n, p in places if n != number]
    candidates = [(number, place), *((number, p) for p in near), *far]
    indent = _indent(texts[number], place)
    found: list[list[int]] = []
    for n, p in candidates:
        if _indent(texts[n], p) != indent:
            continue
        ids = tokenizer(texts[n][p : p + 12 * scored], add_special_tokens=False)["input_ids"][:scored]
        if len(ids) == scored and ids not in found:
            found.append(ids)
        elif not found:
            return []
        if len(found) == CHOICES:
            break
    return found


def _indent(text: str, place: int) -> str:
    match = re.compile(r"[ \t]*").match(text, place)
    return match[0] if match else ""


@torch.no_grad()
def choose(
    model: Any,
    items: ChoiceItems,
    *,
    alone: bool = False,
    batch_size: int = 8,
    on_step: Step = no_step,
) -> list[bool]:
    """Whether a causal language model finds the true continuation the most likely one, for every question.

    Args:
        model: The model.
        items: The questions.
        alone: Whether the likelihood of a continuation without its context is taken off (Holtzman et al. 2021,
            arXiv:2104.08315). Where some begin like thousands of others, as stories do, likelihood chooses those.
        batch_size: Questions at once.
        on_step: Called after each batch.

    Raises:
        ValueError: If a likelihood is not a number.
    """
    right: list[bool] = []
    for batch in torch.split(items.windows, batch_size):
        losses = _losses(model, batch, items.scored)
        if alone:
            short = torch.cat([batch[..., :1], batch[..., -items.scored :]], -1)
            losses = losses - _losses(model, short, items.scored)
        # A tie with a wrong choice is no answer.
        right += (losses[:, :1] < losses[:, 1:]).all(1).tolist()
        on_step()
    return right


def _losses(model: Any, batch: Tensor, scored: int) -> Tensor:
    """Negative log-likelihood of every continuation of every question."""
    ids = batch.flatten(0, 1).to(device_of(model))
    logits = model(input_ids=ids).logits[:, -scored - 1 : -1].float()
    losses = F.cross_entropy(logits.transpose(1, 2), ids[:, -scored:], reduction="none").sum(1)
    if not bool(torch.isfinite(losses).all()):
        raise InputError(
            "The likelihood of a continuation must be a number, but the model gives NaN or infinity. Load a "
            "float16 model with `dtype` bfloat16; if it persists, the weights are damaged."
        )
    return losses.reshape(batch.shape[:2])
