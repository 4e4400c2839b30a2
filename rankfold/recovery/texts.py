"""What recovery reads: text at hand, text that the dense model writes, or both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from rankfold.calibration import calibration_windows, load_corpus
from rankfold.errors import InputError
from rankfold.progress import Stage
from rankfold.recovery.samples import sample_windows

GENERATED = "generated"
"""The name of text that the dense model writes itself."""

BATCH = 64
"""Windows that are written at once."""


def recovery_windows(  # noqa: PLR0913
    model: Any,
    teacher: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    count: int,
    length: int,
    seed: int = 0,
    stage: Stage,
) -> tuple[Int[Tensor, "windows length"], Int[Tensor, "held_out length"]]:
    """Windows to train on, as many of each text, and windows to decide on: of given text where there is any.

    Args:
        model: The model that will read them.
        teacher: The dense model, which writes the text called `generated`.
        tokenizer: The tokenizer of both.
        texts: Files, data set names, or `generated`.
        count: Windows to train on in all.
        length: Tokens a window.
        seed: Seed of the choice of windows, and of what is written.
        stage: Opens a stage of work, for progress bars.

    Raises:
        ValueError: If there is no text, generated text is asked for without a teacher, or a text is too short.
    """
    if not texts:
        raise InputError("Recovery needs a text to train on, but got none.")
    if GENERATED in texts and teacher is None:
        raise InputError("Generated text comes from the dense model: pass `dense`.")
    each = -(-count // len(texts))
    windows, held_out = [], []
    for name in dict.fromkeys(texts):
        if name == GENERATED:
            held = max(2, each // 16)
            advance = stage("generating text", -(-(each + held) // BATCH))
            made = sample_windows(teacher, tokenizer, each + held, length, seed=seed, batch_size=BATCH, on_step=advance)
            windows.append(made[:each])
            if texts == [GENERATED]:
                held_out.append(made[each:])
            continue
        found, kept, _ = calibration_windows(
            model,
            tokenizer,
            load_corpus(name),
            sequences=each,
            length=length,
            seed=seed,
            held_out=max(2, min(64, each // 8)),
        )
        assert kept is not None, "held-out windows were asked for"
        windows.append(found)
        held_out.append(kept)
    return torch.cat(windows), torch.cat(held_out)
