"""Whether a model writes the next line of held-out code exactly."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from rankfold.errors import InputError
from rankfold.progress import Step, no_step
from rankfold.quality.generation import Sampling, complete

SHORTEST, LONGEST = 4, 100
"""Characters of a line that is asked for: without its indentation at least, with it at most."""

BEFORE = 5
"""Lines of a text that are not asked for, there being too little before them."""


class Line(NamedTuple):
    """A line of code and what stands before it."""

    before: str
    line: str


def choose_lines(texts: Sequence[str], count: int, seed: int = 0) -> list[Line]:
    """Lines of held-out code, drawn evenly from all that say something.

    Raises:
        ValueError: If there are not enough.
    """
    found = []
    for text in texts:
        place = 0
        for index, whole in enumerate(text.splitlines(keepends=True)):
            line = whole.rstrip()
            if index >= BEFORE and len(line.strip()) >= SHORTEST and len(line) <= LONGEST:
                found.append((text, place, line))
            place += len(whole)
    if len(found) < count:
        raise InputError(f"The text has {len(found)} lines that can be predicted, but {count} were requested.")
    return [Line(text[:place], line) for text, place, line in random.Random(seed).sample(found, count)]


def exact_lines(
    model: Any,
    tokenizer: Any,
    lines: Sequence[Line],
    *,
    new_tokens: int = 48,
    batch_size: int = 16,
    on_step: Step = no_step,
) -> list[bool]:
    """Which lines a causal language model writes exactly, taking its most likely tokens."""
    order = sorted(range(len(lines)), key=lambda index: len(lines[index].before))
    right = [False] * len(lines)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        texts = complete(
            model,
            tokenizer,
            # A line's end and the next line's indentation are one token to most tokenizers: the model writes both.
            [lines[index].before.rstrip() for index in chosen],
            sampling=Sampling(new_tokens=new_tokens),
        )
        for index, text in zip(chosen, texts, strict=True):
            written = next((line.rstrip() for line in text.split("\n")[1:] if line.strip()), "")
            right[index] = written == lines[index].line
        on_step()
    return right
