"""Rankfold beside SVD-LLM's own functions on one model in one run: the same matrices, seconds and peak memory by step.

    git clone https://github.com/AIoT-MLSys-Lab/SVD-LLM
    python benchmarks/svd_llm.py SVD-LLM

Its `profle_svdllm` and `whitening` are read from the clone and run unchanged; only the classes that would hold its
factors are replaced by plain holders, since its own know no grouped-query attention and no current transformers.
Every contestant runs in a process of its own, in alternating rounds. Writes benchmarks/results/svd_llm.jsonl.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import resource
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rankfold import allocate, calibrate, compress, factorize, find_sites
from rankfold.circumstances import circumstances

ROOT = Path(__file__).parent.parent
KEEP = 0.8
CONTESTANTS = ("svd-llm", "whitened", "kfac", "rankfold")
SEQUENCES, LENGTH = 32, 256


def build() -> Any:
    """A Llama of random weights with grouped-query attention, 29 M parameters in its blocks."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
    )
    return LlamaForCausalLM(config).eval()


def batches() -> list[dict[str, torch.Tensor]]:
    """Random token ids, four sequences at once."""
    ids = torch.randint(3, 512, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": part} for part in ids.split(4)]


def theirs(folder: Path) -> dict[str, Any]:
    """SVD-LLM's functions, with plain holders where its modules would stand."""
    wanted = {"profle_svdllm": "SVDLLM.py", "whitening": "SVDLLM.py", "find_layers": "utils/model_utils.py"}

    def holder(**_: Any) -> Any:
        return holder_of_weights()

    space: dict[str, Any] = {
        "torch": torch,
        "nn": nn,
        "tqdm": lambda items: items,
        "SVD_LlamaAttention": holder,
        "SVD_LlamaMLP": holder,
    }
    for name, file in wanted.items():
        tree = ast.parse((folder / file).read_text())
        function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
        exec(compile(ast.Module([function], []), file, "exec"), space)
    return space


def _place() -> SimpleNamespace:
    return SimpleNamespace(weight=SimpleNamespace())


def holder_of_weights() -> Any:
    """An nn.Module on which any attribute is a place for a weight."""

    class Holder(nn.Module):
        def __getattr__(self, name: str) -> Any:
            places: Any = self.__dict__.setdefault(
                "places", defaultdict(lambda: SimpleNamespace(weight=SimpleNamespace()))
            )
            return places[name]

    return Holder()


def run_theirs(folder: Path, model: Any) -> dict[str, float]:
    """Seconds of its two steps."""
    space = theirs(folder)
    for layer in model.model.layers:
        layer.hidden_size = model.config.hidden_size
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        profile = space["profle_svdllm"]("llama", model, batches(), "cpu")
        middle = time.perf_counter()
        space["whitening"]("llama", model, profile, KEEP, "cpu")
    return {"statistics": middle - start, "factorization": time.perf_counter() - middle}


def run_ours(model: Any, name: str) -> dict[str, float]:
    """Seconds of our steps: one-sided like theirs; both-sided in one round with its allocation; and the best effort."""
    start = time.perf_counter()
    ids = torch.cat([batch["input_ids"] for batch in batches()])
    choices = {"whitened": {"method": name}, "kfac": {"effort": "default"}}.get(name, {"effort": "best"})
    compress(model, keep=KEEP, text=ids, batch_size=4, **choices)
    return {"all_steps": time.perf_counter() - start}


@torch.no_grad()
def deviation(folder: Path) -> float:
    """Largest relative difference between its product of factors and ours, over all layers."""
    reference, model = build(), build()
    space = theirs(folder)
    for layer in reference.model.layers:
        layer.hidden_size = reference.config.hidden_size
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        profile = space["profle_svdllm"]("llama", reference, batches(), "cpu")
        space["whitening"]("llama", reference, profile, KEEP, "cpu")
    sites = find_sites(model).select()
    plan = allocate(sites, keep=KEEP, method="whitened")
    factorize(model, plan, calibrate(model, sites, batches(), method="whitened"))
    worst = 0.0
    for index, layer in enumerate(reference.model.layers):
        for owner, names in ((layer.self_attn, "qkvo"), (layer.mlp, ("gate", "up", "down"))):
            for name in names:
                product = getattr(owner, f"{name}_u_proj").weight.data @ getattr(owner, f"{name}_v_proj").weight.data
                path = f"model.layers.{index}.{'self_attn' if len(name) == 1 else 'mlp'}.{name}_proj"
                mine = model.get_submodule(path).product()
                worst = max(worst, float((mine - product).norm() / product.norm()))
    return worst


def main() -> None:
    """Alternate the contestants, write medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a clone of SVD-LLM")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=CONTESTANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.only:
        model = build()
        seconds = (
            run_theirs(arguments.folder, model) if arguments.only == "svd-llm" else run_ours(model, arguments.only)
        )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({**seconds, "total": sum(seconds.values()), "peak_memory": peak}))
        return
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for _ in range(arguments.rounds):
        for name in CONTESTANTS:
            command = [sys.executable, __file__, str(arguments.folder), "--only", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(name, found[name][-1], flush=True)
    here = circumstances("random Llama, 29 M", seed=0, keep=KEEP, tokens=SEQUENCES * LENGTH, rounds=arguments.rounds)
    medians = {n: {k: statistics.median(r[k] for r in runs) for k in runs[0]} for n, runs in found.items()}
    records = []
    for name, values in medians.items():
        for key, value in values.items():
            unit = "byte" if key == "peak_memory" else "second"
            records.append(here.record(name, key, value, unit))
            if key in medians["svd-llm"] and name != "svd-llm":
                ratio = value / medians["svd-llm"][key]
                records.append(here.record(f"{name} / svd-llm", key, ratio))
                print(f"{name} / svd-llm, {key}: {ratio:.2f}")
    worst = deviation(arguments.folder)
    records.append(here.record("whitened - svd-llm", "largest_difference", worst))
    print(f"largest relative difference of a layer's matrix, whitened against svd-llm: {worst:.2e}")
    output = ROOT / "benchmarks" / "results" / "svd_llm.jsonl"
    output.write_text("".join(record.to_json() + "\n" for record in records))


if __name__ == "__main__":
    main()
