"""What a compression reads: a text in whatever shape a user has it, as batches of windows of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Int
from torch import Tensor

from rankfold.calibration import (
    Corpus,
    calibration_windows,
    default_length,
    load_corpus,
    make_batches,
    masked_batches,
)
from rankfold.errors import InputError
from rankfold.fingerprint import fingerprint

HELD_OUT = 32
"""Windows at the end of the calibration text that are kept for verifying a limit on the loss."""


class Reading(NamedTuple):
    """Batches of a text, and what a plan has to say of them."""

    batches: list[dict[str, Tensor]]
    held_out: Int[Tensor, "windows length"] | None
    facts: Mapping[str, Any]


def read_text(  # noqa: PLR0913
    model: Any,
    tokenizer: Any,
    text: str | Path | Corpus | Sequence[str] | Tensor,
    *,
    sequences: int,
    length: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    held_out: bool = False,
) -> Reading:
    """Windows of a text to calibrate on, and others to verify a limit on the loss where one is asked for.

    Args:
        model: The model that will read them.
        tokenizer: Its tokenizer; not needed for windows.
        text: A file, a data set name, a corpus, texts, or windows of token ids.
        sequences: Windows to draw from a text.
        length: Tokens of a window; without it 512, or what the model reads.
        batch_size: Windows that pass the model at once; without it as `make_batches` chooses.
        seed: Seed of the choice of windows, and of masks.
        held_out: Whether windows at the end are kept apart.

    Raises:
        ValueError: If there is no tokenizer for a text, or the text is too short.
    """
    count = HELD_OUT if held_out else 0
    held: Tensor | None = None
    if isinstance(text, Tensor):
        if text.ndim != 2 or not text.numel() or (held_out and len(text) < 5):
            raise InputError(
                "Windows of token ids must be a table (windows, length), of at least five windows where a limit on the "
                f"loss is verified on the last of them, but got the shape {tuple(text.shape)}."
            )
        cut = len(text) - min(count, len(text) // 5)
        windows, held = text[:cut], text[cut:] if held_out else None
        facts: dict[str, Any] = {"corpus": "token ids", "sha256": fingerprint(text)}
        facts |= {"sequences": len(windows), "tokens": windows.numel()}
    else:
        if tokenizer is None:
            raise InputError("Text needs the tokenizer of the model, but got none: compress(model, tokenizer, ...).")
        windows, held, facts = calibration_windows(
            model, tokenizer, as_corpus(text, tokenizer), sequences=sequences,
            length=length or default_length(model.config), seed=seed, held_out=count,
        )  # fmt: skip
    batches = make_batches(model, windows, batch_size)
    if "MaskedLM" in type(model).__name__ and tokenizer is not None and tokenizer.mask_token_id is not None:
        batches = masked_batches(batches, tokenizer.mask_token_id, tuple(tokenizer.all_special_ids), seed)
    return Reading(batches, held, facts)


def as_corpus(text: str | Path | Corpus | Sequence[str], tokenizer: Any = None) -> Corpus:
    """A corpus from a file or data set name, from texts, or as it is.

    Raises:
        ValueError: If the file does not exist or holds no text.
    """
    if isinstance(text, Corpus):
        return text
    if isinstance(text, (str, Path)):
        return load_corpus(text, tokenizer=tokenizer)
    texts = tuple(part for part in text if part.strip())
    if not texts:
        raise InputError("A corpus must hold text, but got none.")
    return Corpus("texts given in Python", texts)
