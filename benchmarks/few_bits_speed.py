"""Decoding at batch 1 and reading a prompt with layers in few bits or at a low rank, beside the dense bfloat16 model.

    python benchmarks/few_bits_speed.py

A Llama of random weights with 2048 columns: speed does not depend on what the weights are. Rows: dense as it is loaded,
and reordered for the CPU (`prefer(model, "speed")`, which all rows but the first and those named so have); the pivoted
form at 0.8 of the numbers, both ways; all layers in 8, 5, 4, 3 and 2 bits in groups of 64; 3 bits with a compensation
of rank 32 in 8 bits; a low rank of 256 in 8 bits. Models take turns. Results: benchmarks/results/few_bits_speed.jsonl,
each as a ratio to dense as it is loaded, in the same rounds.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.append(str(Path(__file__).parent.parent / "experiments"))
from results import Results, quiet

from rankfold.circumstances import circumstances
from rankfold.modules import (
    CompensatedLinear,
    GroupLinear,
    LowRankLinear,
    PivotedLinear,
    largest_rank,
    linear_at,
    prefer,
)
from rankfold.sites import find_sites

ROUNDS, PROMPT, KEEP = 21, 256, 0.8


def few(rows: int, columns: int, bits: int, group: int) -> GroupLinear:
    """A layer of random levels."""
    codes = torch.randint(0, 2**bits, (rows, columns))
    groups = columns // group if group > 0 else 1
    scales = torch.full((1 if group == -1 else rows, groups), 0.01)
    zeros = torch.full((rows, groups), 2 ** (bits - 1)) if group > 0 else None
    return GroupLinear.from_codes(codes, scales, zeros, {"bits": bits, "group": group}, None, torch.bfloat16)


def low_rank(rows: int, columns: int, rank: int) -> LowRankLinear:
    """Two factors in 8 bits."""
    layer = LowRankLinear(columns, rows, (rank,), bias=False, device="meta")
    layer.up, layer.down = few(rows, rank, 8, -1), few(rank, columns, 8, 0)  # type: ignore[assignment]
    return layer


def compensated(rows: int, columns: int) -> CompensatedLinear:
    """3 bits, and rank 32 beside them."""
    pair = low_rank(rows, columns, 32)
    return CompensatedLinear.from_parts(few(rows, columns, 3, 64), pair.up, pair.down)


def pivoted(rows: int, columns: int) -> PivotedLinear:
    """The rank at which 0.8 of the numbers are stored, as a multiple of 32."""
    rank = largest_rank("pivoted", rows, columns, int(KEEP * rows * columns)) // 32 * 32
    return PivotedLinear(columns, rows, (rank,), bias=False, dtype=torch.bfloat16)


ROWS: dict[str, Any] = {
    "dense, reordered": None,
    "keep 0.8, as loaded": pivoted,
    "keep 0.8": pivoted,
    "8 bits": lambda rows, columns: few(rows, columns, 8, 64),
    "5 bits": lambda rows, columns: few(rows, columns, 5, 64),
    "4 bits": lambda rows, columns: few(rows, columns, 4, 64),
    "3 bits": lambda rows, columns: few(rows, columns, 3, 64),
    "2 bits": lambda rows, columns: few(rows, columns, 2, 64),
    "3 bits + rank 32 in 8": compensated,
    "rank 256 in 8 bits": lambda rows, columns: low_rank(rows, columns, 256),
}


@torch.no_grad()
def main() -> None:
    """Time all models in alternating rounds."""
    quiet()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=2048, intermediate_size=5632, num_hidden_layers=4, num_attention_heads=16,
        num_key_value_heads=8,
    )  # fmt: skip
    models = {"dense": LlamaForCausalLM(config).to(torch.bfloat16).eval()}
    sites = find_sites(models["dense"]).select()
    for row, make in ROWS.items():
        models[row] = copy.deepcopy(models["dense"])
        for site in sites if make else ():
            models[row].set_submodule(site.name, make(*linear_at(models["dense"], site.name).weight.shape))
    seconds: dict[tuple[str, str], list[float]] = {}
    for what, length in (("decode", 1), ("prompt", PROMPT)):
        ids = torch.randint(0, 1024, (1, length))
        for row, model in models.items():
            prefer(model, "balance" if row == "dense" or "as loaded" in row else "speed")
            model(ids)
            seconds[row, what] = []
        for _ in range(ROUNDS):
            for row, model in models.items():
                # What the model before it left in caches is not this one's.
                model(ids)
                start = time.perf_counter()
                model(ids)
                seconds[row, what].append(time.perf_counter() - start)
    here = circumstances("random Llama, 2048 columns, 4 blocks", seed=0, dtype="bfloat16", rounds=ROUNDS)
    found = []
    for row in ROWS:
        for what in ("decode", "prompt"):
            ratios = [a / b for a, b in zip(seconds[row, what], seconds["dense", what], strict=True)]
            quartiles = statistics.quantiles(ratios, n=4)
            facts = {"row": row, "minus": "dense", "interval": [quartiles[0], quartiles[2]]}
            found.append(here.record("few bits", f"{what}_time_ratio", statistics.median(ratios), "1", **facts))
            print(
                f"{row:24} {what:7} {statistics.median(ratios):.2f} of dense ({quartiles[0]:.2f} to {quartiles[2]:.2f})"
            )
    Results("few_bits_speed").append(found)


if __name__ == "__main__":
    main()
