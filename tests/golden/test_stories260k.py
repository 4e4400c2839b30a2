"""Anchors on real weights: perplexities of the design's table, made by an independent prototype.

The prototype drew other random windows, so these hold within its tolerances only: 5 % for `svd`, which sees no
data, and 10 % for `whitened`. Repeat with `python benchmarks/quality.py --part grid`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import asset

from rankfold import allocate, find_sites
from rankfold.calibration import make_batches, random_windows, split_windows
from rankfold.checkpoint import load_model, load_tokenizer
from rankfold.compression import factorize_blocks
from rankfold.quality import next_token_quality


@pytest.fixture(scope="module")
def text() -> tuple[torch.Tensor, torch.Tensor]:
    """Calibration and evaluation windows: the first 70 % of one token stream, and the rest."""
    tokenizer = load_tokenizer(asset("weights/stories260K"))
    ids = torch.tensor(tokenizer(asset("data/tinystories/tinystories_sample.txt").read_text())["input_ids"])
    cut = int(0.7 * len(ids))
    return random_windows(ids[:cut], 256, 256, seed=0), split_windows(ids[cut:], 256)


def perplexity(folder: Path, text: tuple[torch.Tensor, torch.Tensor], **settings: Any) -> float:
    model = load_model(folder)
    if settings:
        sites = find_sites(model).select()
        factorize_blocks(model, allocate(sites, **settings), sites, make_batches(model, text[0], 32))
    return next_token_quality(model, text[1]).perplexity


def test_dense(stories: Path, text: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert perplexity(stories, text) == pytest.approx(6.07, abs=0.02)


@pytest.mark.parametrize(
    ("method", "keep", "expected", "tolerance"),
    [
        ("svd", 0.9, 88.9, 0.05),
        ("svd", 0.8, 236, 0.05),
        ("svd", 0.7, 545, 0.05),
        ("svd", 0.6, 1144, 0.05),
        ("whitened", 0.9, 22.5, 0.10),
        ("whitened", 0.8, 36.1, 0.10),
        ("whitened", 0.7, 62.7, 0.10),
        ("whitened", 0.6, 112, 0.10),
    ],
)
def test_the_table_of_the_prototype(
    stories: Path, text: tuple[torch.Tensor, torch.Tensor], method: str, keep: float, expected: float, tolerance: float
) -> None:
    assert perplexity(stories, text, method=method, keep=keep) == pytest.approx(expected, rel=tolerance)


def test_tucker_is_svd_at_equal_rank(stories: Path, text: tuple[torch.Tensor, torch.Tensor]) -> None:
    tucker, svd = (perplexity(stories, text, method=method, rank=12) for method in ("tucker", "svd"))
    assert tucker == pytest.approx(svd, rel=1e-4)
