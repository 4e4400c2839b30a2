"""Parameters of LoRD's published models from their configurations alone: python experiments/lord_sizes.py.

Models are built on the meta device, without weights. StarCoder: the down-projections of all 40 blocks at the ranks of
the released checkpoints, whose names truncate billions to one decimal, and at 3712, where the rank is cut by the
39.58 % of the abstract (arXiv:2309.14021). CodeGen: each kind of layer at half its break-even rank, of which no sizes
were published. Results: benchmarks/results/lord_sizes.jsonl.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from results import asked_afresh
from transformers import AutoConfig, AutoModelForCausalLM

from rankfold import allocate, find_sites
from rankfold.allocation import break_even_rank
from rankfold.circumstances import circumstances
from rankfold.cost import parameter_count

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "lord_sizes.jsonl"

STARCODER = {
    "model_type": "gpt_bigcode", "vocab_size": 49_152, "n_positions": 8192, "n_embd": 6144, "n_layer": 40,
    "n_head": 48, "n_inner": 24_576, "multi_query": True,
}  # fmt: skip

PUBLISHED = {4480: "14.9B", 4096: "14.5B", 3584: "13.8B", 3072: "13.2B", 2560: "12.6B", 2304: "12.3B"}
"""Rank of the down-projections, and the size in the name of the released checkpoint (nolanoAI/lordcoder-v0-*)."""

CODEGEN = {
    "350M": {"n_embd": 1024, "n_layer": 20, "n_head": 16, "rotary_dim": 32},
    "2B": {"n_embd": 2560, "n_layer": 32, "n_head": 32, "rotary_dim": 64},
    "6B": {"n_embd": 4096, "n_layer": 33, "n_head": 16, "rotary_dim": 64},
    "16B": {"n_embd": 6144, "n_layer": 34, "n_head": 24, "rotary_dim": 64},
}
"""The CodeGen family (arXiv:2203.13474) as its configurations on the hub have it."""


def on_meta(settings: dict[str, Any]) -> Any:
    """A model without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.bfloat16)


def truncated(parameters: int) -> str:
    """Billions as the released names have them: cut after one decimal.

    >>> truncated(14_985_000_000)
    '14.9B'
    """
    return f"{math.floor(parameters / 1e8) / 10:.1f}B"


def starcoder_sizes() -> dict[int, int]:
    """Parameters of StarCoder with its down-projections at each published rank."""
    model = on_meta(STARCODER)
    total, chosen = parameter_count(model), find_sites(model).select(["mlp.c_proj"])
    dense = sum(site.parameters for site in chosen)
    return {
        rank: total - dense + allocate(chosen, rank=rank, method="lord").parameters for rank in (*PUBLISHED, 3712)
    } | {0: total}


def codegen_rows() -> list[tuple[str, str, int, int, int]]:
    """Size, kind, full rank, half of the break-even rank, and parameters of the model with that kind at this rank."""
    rows = []
    for size, settings in CODEGEN.items():
        model = on_meta({"model_type": "codegen", "vocab_size": 51_200, "n_positions": 2048, "n_ctx": 2048, **settings})
        total, sites = parameter_count(model), find_sites(model)
        for kind in ("attn.qkv_proj", "attn.out_proj", "mlp.fc_in", "mlp.fc_out"):
            chosen = sites.select([kind])
            rank = break_even_rank("low_rank", chosen[0], bias=True) // 2
            plan = allocate(chosen, rank=rank, method="lord")
            parameters = total - sum(site.parameters for site in chosen) + plan.parameters
            rows.append((size, kind, min(chosen[0].out_features, chosen[0].in_features), rank, parameters))
        rows.append((size, "dense", 0, 0, total))
    return rows


def main() -> None:
    """Compute both tables and write them."""
    # They are computed anew in any case.
    asked_afresh()
    records = []
    here = circumstances(device="meta")
    for rank, parameters in starcoder_sizes().items():
        name = PUBLISHED.get(rank, "")
        print(f"StarCoder, rank {rank or 'full'}: {parameters:,} = {truncated(parameters)}   published: {name or '-'}")
        facts = {"kind": "mlp.c_proj", "rank": rank, "published": name, "truncated": truncated(parameters)}
        records.append(here.record("starcoder", "parameters", parameters, **facts))
    for size, kind, full, rank, parameters in codegen_rows():
        print(f"CodeGen-{size}, {kind}, rank {rank} of {full}: {parameters:,}")
        facts = {"kind": kind, "full_rank": full, "rank": rank}
        records.append(here.record(f"codegen-{size}", "parameters", parameters, **facts))
    RESULTS.write_text("".join(record.to_json() + "\n" for record in records))


if __name__ == "__main__":
    main()
