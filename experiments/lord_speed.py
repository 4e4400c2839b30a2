"""Speed against parameters at the published sizes: python experiments/lord_speed.py.

A GPTBigCode of StarCoder's proportions, random weights in float32 (8 blocks, width 2048: 358 M parameters, more than
a cache holds), its down-projections at the shares of the full rank that the released StarCoders have, and
pycode-starcoder at the same shares. Dense and compressed take turns, one thread. Columns: parameters, prefill of 128
tokens and decoding at batch 1 and 8 in tokens a second, and how many times as fast bytes (decoding) and multiplications
(prefill) would allow. Results: benchmarks/results/lord_speed.jsonl.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from lord import DOWN, Results, Subject, quiet
from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

from rankfold import allocate, factorize, find_sites
from rankfold.circumstances import circumstances
from rankfold.cost import interleaved_latency, parameter_count, reading

RANKS = {"14.9B": 4480, "14.5B": 4096, "13.8B": 3584, "13.2B": 3072, "12.6B": 2560, "12.3B": 2304}
"""Published checkpoints, and their ranks of 6144."""

KIND = "mlp.c_proj"


def large() -> Any:
    """StarCoder's proportions at a third of its width and a fifth of its depth."""
    torch.manual_seed(0)
    return GPTBigCodeForCausalLM(
        GPTBigCodeConfig(
            vocab_size=8192, n_positions=512, n_embd=2048, n_layer=8, n_head=16, n_inner=8192, multi_query=True,
            bos_token_id=0, eos_token_id=0,
        )
    ).eval()  # fmt: skip


def at_rank(dense: Any, rank: int) -> Any:
    """The model with its down-projections at a rank, everything else shared with the dense one."""
    shared = {id(part): part for part in dense.parameters()}
    model = copy.deepcopy(dense, shared)
    factorize(model, allocate(find_sites(model).select([KIND]), rank=rank, method="svd"))
    return model


def measure(results: Results, subject: str, dense: Any, width: int) -> None:
    """All sizes of one model, interleaved."""
    models = {"dense": dense}
    for name, rank in RANKS.items():
        models[f"as {name}"] = at_rank(dense, round(rank * width / 6144))
    if all(results.has(subject, row=row) for row in models):
        return
    times = {batch: interleaved_latency(models, batch_size=batch, rounds=9, decoded_tokens=4) for batch in (1, 8)}
    whole = reading(dense)
    for name, model in models.items():
        found = reading(model)
        values: dict[str, Any] = {
            "parameters": parameter_count(model),
            "decode_limit": whole.bytes / found.bytes,
            "prefill_limit": whole.multiplications / found.multiplications,
        }
        for batch, latency in times.items():
            values[f"prefill_{batch}"] = batch * 128 / latency[name].prefill_seconds
            values[f"decode_{batch}"] = batch / (latency[name].decode_seconds or float("inf"))
        contended = any(latency[name].contended for latency in times.values())
        results.measure(subject, name, circumstances(dense, seed=0, contended=contended), lambda v=values: v)


def main() -> None:
    """Measure what is missing."""
    quiet()
    results = Results("lord_speed")
    with torch.no_grad():
        small = Subject("pycode-starcoder")
        assert DOWN[small.name] == KIND
        measure(results, small.name, small.dense, 128)
        measure(results, "GPTBigCode, 8 x 2048", large(), 2048)


if __name__ == "__main__":
    main()
