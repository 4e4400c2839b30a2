"""Which multiples of a rank are fast on the machine at hand: two thin products timed at neighbouring ranks."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional as F

from rankfold.cost.latency import now
from rankfold.progress import Step, no_step

MULTIPLES = (1, 8, 16, 32, 64, 128)
"""What ranks may be lowered to a multiple of."""

WORTH = 1.05
"""A larger multiple must be faster by this factor, rank for rank, to be preferred."""


def neighbouring_ranks(full: int) -> dict[int, int]:
    """For each multiple a rank near half of the full one that is a multiple of it and of no larger one of the list.

    >>> neighbouring_ranks(1024)
    {1: 385, 8: 392, 16: 400, 32: 416, 64: 448, 128: 512}
    """
    base = max(128, full // 2 // 128 * 128)
    return {multiple: base - 128 + multiple for multiple in MULTIPLES if base - 128 + multiple <= full}


@torch.no_grad()
def rank_seconds(  # noqa: PLR0913
    out_features: int,
    in_features: int,
    ranks: Sequence[int],
    *,
    tokens: int = 128,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    rounds: int = 15,
    on_step: Step = no_step,
) -> dict[int, float]:
    """Median seconds of `up(down(x))` at every rank, the ranks taking turns.

    Args:
        out_features: Rows of the matrix.
        in_features: Its columns.
        ranks: Ranks to time.
        tokens: Inputs at once.
        device: Where to compute.
        dtype: Dtype of inputs and factors.
        rounds: Rounds after one of warming up.
        on_step: Called after each round.
    """
    x = torch.randn(tokens, in_features, device=device, dtype=dtype)
    factors = {rank: (torch.randn(rank, in_features).to(x), torch.randn(out_features, rank).to(x)) for rank in ranks}
    times: dict[int, list[float]] = {rank: [] for rank in factors}
    for number in range(rounds + 1):
        for rank, (down, up) in factors.items():
            start = now(x.device)
            F.linear(F.linear(x, down), up)
            seconds = now(x.device) - start
            if number:
                times[rank].append(seconds)
        on_step()
    return {rank: statistics.median(series) for rank, series in times.items()}


def fast_multiple(seconds: Mapping[int, float], ranks: Mapping[int, int]) -> int:
    """The smallest multiple to which lowering ranks pays, from the seconds at its rank.

    >>> ranks = neighbouring_ranks(1024)
    >>> fast_multiple({rank: rank * (1.0 if rank % 64 == 0 else 1.3) for rank in ranks.values()}, ranks)
    64
    >>> fast_multiple({rank: float(rank) for rank in ranks.values()}, ranks)
    1
    """
    each = {multiple: seconds[rank] / rank for multiple, rank in ranks.items()}
    best = min(each.values())
    return min(multiple for multiple, price in each.items() if price <= WORTH * best)
