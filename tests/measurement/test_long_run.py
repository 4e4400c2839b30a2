"""A long run is what the model would write token by token, and its stretches say what is in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rankfold.checkpoint import load_model
from rankfold.measurement.long_run import stretches, write_long


def test_within_the_window_the_run_is_ordinary_sampling(bundled: Path) -> None:
    model = load_model(bundled, dtype=torch.float32)
    prompt = torch.tensor([5, 9, 11])
    written, seconds = write_long(model, prompt, 8, window=64, temperature=1e-4)
    greedy = model.generate(
        input_ids=prompt[None], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert written.tolist() == greedy[0, 3:].tolist()
    assert len(seconds) == 8


def test_a_run_goes_on_past_what_the_model_reads(bundled: Path) -> None:
    model = load_model(bundled, dtype=torch.float32)
    written, seconds = write_long(model, torch.tensor([5]), 96, window=32, seed=1)
    again, _ = write_long(model, torch.tensor([5]), 96, window=32, seed=1)
    assert torch.equal(written, again)
    found = stretches(model, model, written, seconds, length=32, window=32)
    assert [stretch.start for stretch in found] == [0, 32, 64]
    assert all(stretch.kl == pytest.approx(0, abs=1e-6) for stretch in found)
    assert all(stretch.perplexity > 1 and stretch.seconds > 0 for stretch in found)
    circle = torch.tensor([7, 8] * 32)
    (turning,) = stretches(model, model, circle, [0.1] * 64, length=64, window=32)
    assert turning.repeated == pytest.approx(1 - 2 / 61)
    assert len({stretch.cache_bytes for stretch in found}) == 1
    with pytest.raises(ValueError, match="at most half of the window"):
        write_long(model, torch.arange(20), 4, window=32)
