"""All that needs an accelerator, in one run of about ten minutes.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --device cpu --scale 32 --blocks 2 --sequences 4 --length 32 --rounds 2    # does it run?

Models are of random weights, made on the device: seconds and bytes do not depend on what the weights are. Parts:

- decompositions: eigenvalues and Cholesky factors at the sizes of these models, in float64 and float32, on the device
  and on the CPU, each with the error of what it gives back;
- llama: Llama-2-7B's shape, `rankfold compress` with the default method at keep 0.8, 256 x 2048 tokens;
- starcoder: StarCoder-15.5B's shape, LoRD of the down-projections of all blocks at half rank;
- speed: a prompt and decoding of both beside the dense model, the models taking turns, and what their bytes allow.

A part that fails is told and does not end the run. `--parts` chooses; after each part its results, if the widths are
whole, go to benchmarks/results/gpu.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parent.parent / "experiments"))
from results import Results, quiet
from transformers import AutoModelForCausalLM, GPTBigCodeConfig, LlamaConfig

import rankfold
from rankfold.circumstances import Circumstances, circumstances
from rankfold.cost import interleaved_latency, measure_peaks, memory_bytes
from rankfold.cost.latency import now
from rankfold.record import Record

SIZES = (1024, 4096, 6144)
"""Sides of the matrices that are taken apart: those of the models."""


def llama(scale: int, blocks: int | None) -> LlamaConfig:
    """Llama-2-7B, its widths divided."""
    return LlamaConfig(
        vocab_size=32_000 // scale, hidden_size=4096 // scale, intermediate_size=11_008 // scale,
        num_hidden_layers=blocks or 32, num_attention_heads=32 if scale == 1 else 4, max_position_embeddings=4096,
    )  # fmt: skip


def starcoder(scale: int, blocks: int | None) -> GPTBigCodeConfig:
    """StarCoder-15.5B, its widths divided."""
    return GPTBigCodeConfig(
        vocab_size=49_152 // scale, n_embd=6144 // scale, n_inner=24_576 // scale, n_layer=blocks or 40,
        n_head=48 if scale == 1 else 4, n_positions=8192, multi_query=True,
    )  # fmt: skip


class Bench:
    """The device, what is asked for and what was found."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = torch.device(arguments.device)
        self.models: dict[str, tuple[Any, Any]] = {}

    def model(self, config: Any) -> Any:
        """A model of random weights on the device, in bfloat16."""
        torch.manual_seed(0)
        with torch.device(self.device):
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()

    def timed(self, work: Callable[[], Any]) -> tuple[float, int | None]:
        """Seconds, and the peak of the device's memory where it counts that."""
        counts = self.device.type == "cuda"
        if counts:
            torch.cuda.reset_peak_memory_stats(self.device)
        start = now(self.device)
        work()
        seconds = now(self.device) - start
        return seconds, torch.cuda.max_memory_allocated(self.device) if counts else None

    def windows(self, config: Any, sequences: int) -> Tensor:
        """Random tokens."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(3, config.vocab_size, (sequences, self.arguments.length), generator=generator)

    def here(self, name: str, **facts: Any) -> Circumstances:
        """What stands beside every number."""
        return circumstances(f"random {name}", seed=0, device=str(self.device), **facts)


def decompositions(bench: Bench) -> list[Record]:
    """Seconds and errors of what the engine takes apart, by precision and place."""
    found = []
    places = dict.fromkeys((bench.device, torch.device("cpu")))
    for size in [size // bench.arguments.scale for size in SIZES]:
        generator = torch.Generator().manual_seed(0)
        spread = torch.logspace(0, -4, size, dtype=torch.float64)
        S = torch.randn(size, 2 * size, generator=generator, dtype=torch.float64) * spread[:, None]
        S = S @ S.T / (2 * size)
        for place in places:
            for dtype in (torch.float64, torch.float32):
                X = S.to(place, dtype)
                for what, take_apart in (("eigh", torch.linalg.eigh), ("cholesky", torch.linalg.cholesky_ex)):
                    take_apart(X)
                    start = now(place)
                    parts = take_apart(X)
                    seconds = now(place) - start
                    back = (parts[1] * parts[0]) @ parts[1].T if what == "eigh" else parts[0] @ parts[0].T
                    error = float((back.double().cpu() - S).norm() / S.norm())
                    facts = {"part": what, "row": f"{size}, {str(dtype).removeprefix('torch.')}, {place.type}"}
                    print(f"  {what} {facts['row']}: {seconds:.3f} s, error {error:.1e}", flush=True)
                    here = bench.here("matrix", **facts)
                    found.append(here.record("decompositions", "time", seconds, "second"))
                    found.append(here.record("decompositions", "relative_error", error))
    return found


def compressed(bench: Bench, name: str, config: Any, sequences: int, **how: Any) -> list[Record]:
    """Compress a model, step by step on the clock."""
    dense = bench.model(config)
    model = copy.deepcopy(dense)
    steps: list[tuple[str, float]] = []

    def stage(title: str, _: int) -> Callable[[], None]:
        steps.append((title, now(bench.device)))
        return lambda: None

    text = bench.windows(config, sequences)
    seconds, peak = bench.timed(lambda: rankfold.compress(model, text=text, stage=stage, **how))
    end = now(bench.device)
    bench.models[name] = (dense, model)
    facts = {"sequences": sequences, "length": bench.arguments.length, "blocks": config.num_hidden_layers}
    here = bench.here(name, **facts, **{key: str(value) for key, value in how.items()})
    print(f"  {name}: {seconds:.0f} s", flush=True)
    found = [here.record(name, "time", seconds, "second")]
    for (title, start), stop in zip(steps, [*(start for _, start in steps[1:]), end], strict=True):
        print(f"    {title}: {stop - start:.0f} s", flush=True)
        found.append(here.record(name, "time", stop - start, "second", part=title))
    if peak is not None:
        print(f"    peak of the device: {peak / 1e9:.1f} GB", flush=True)
        found.append(here.record(name, "peak_device_memory", peak, "byte"))
    return found


def speed(bench: Bench) -> list[Record]:
    """Prompt and decoding beside the dense model, and what bytes and bandwidth allow."""
    found = []
    peaks = measure_peaks(str(bench.device), torch.bfloat16)
    for name, (dense, model) in bench.models.items():
        pair = {"dense": dense, "compressed": model}
        taken = interleaved_latency(pair, rounds=bench.arguments.rounds, prompt_tokens=min(128, bench.arguments.length))
        here = bench.here(name, prompt_tokens=128, batch_size=1)
        for row, each in taken.items():
            least = memory_bytes(pair[row]) / peaks.bytes_per_second
            decode = each.decode_seconds or float("nan")
            print(
                f"  {name}, {row}: prompt {1e3 * each.prefill_seconds:.2f} ms, token {1e3 * decode:.2f} ms, its bytes "
                f"alone {1e3 * least:.2f} ms",
                flush=True,
            )
            facts = {"row": row, "contended": each.contended}
            found.append(here.record(name, "prefill_time", each.prefill_seconds, "second", **facts))
            found.append(here.record(name, "decode_time", decode, "second", **facts))
            found.append(here.record(name, "least_decode_time", least, "second", **facts))
        both = taken["compressed"].decode, taken["dense"].decode
        ratio = statistics.median(a / b for a, b in zip(*both, strict=True))
        found.append(here.record(name, "decode_time_ratio", ratio, "1", minus="dense"))
    return found


def main() -> None:
    """Run the parts, and write each down as it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scale", type=int, default=1, help="divide all widths by this, to try the program")
    parser.add_argument("--blocks", type=int, help="blocks of both models; by default their own")
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--parts", nargs="*", default=["decompositions", "llama", "starcoder", "speed"])
    quiet()
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("No CUDA device is here. `--device cpu --scale 32` tries the program without one.")
    bench = Bench(arguments)
    scale, blocks = arguments.scale, arguments.blocks
    down = ["mlp.c_proj"]
    half = starcoder(scale, blocks).n_embd // 2
    parts: dict[str, Callable[[], list[Record]]] = {
        "decompositions": lambda: decompositions(bench),
        "llama": lambda: compressed(bench, "llama", llama(scale, blocks), arguments.sequences, keep=0.8),
        "starcoder": lambda: compressed(
            bench, "starcoder", starcoder(scale, blocks), max(1, arguments.sequences // 8), method="lord", rank=half,
            sites=down,
        ),
        "speed": lambda: speed(bench),
    }  # fmt: skip
    failed = []
    for name in arguments.parts:
        print(name, flush=True)
        start = time.perf_counter()
        try:
            found = parts[name]()
            if scale == 1:
                Results("gpu").append(found)
        except Exception:  # a part that fails must not lose the others: time on an accelerator is dear
            failed.append(name)
            traceback.print_exc()
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
