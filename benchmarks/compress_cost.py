"""Whole-process time and peak memory of `rankfold compress --method whitened` beside the same work done naively.

    python benchmarks/compress_cost.py            # makes a random Llama of 304 M parameters, runs three pairs
    python benchmarks/compress_cost.py --pairs 1

Both load the same bfloat16 checkpoint, calibrate on the same 8 x 512 tokens, factorize all 168 linear layers of the
blocks by the whitened SVD at keep 0.8, and save safetensors. The naive one is what a research script does: hooks on all
layers at once, each with a second moment of its own in float32, and a full `torch.linalg.svd` of every scaled matrix.
Pairs alternate, threads are pinned to one, and the ratio of the medians is what counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from commands import RANKFOLD, run
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "experiments"))
from results import asked_afresh

from rankfold.calibration import load_corpus, random_windows, token_stream
from rankfold.circumstances import circumstances

SEQUENCES, LENGTH, KEEP = 8, 512, 0.8


def make_model(folder: Path) -> None:
    """A Llama of 304 M random parameters in bfloat16, with the tokenizer of a bundled model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=24, num_attention_heads=16,
        num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "models" / "pycode-llama").save_pretrained(folder)


def naive(source: Path, target: Path) -> None:
    """The whitened SVD as a script would do it."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    windows = random_windows(token_stream(tokenizer, load_corpus("bundled:calibration").texts), SEQUENCES, LENGTH)
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "layers." in name
    }
    moments = {name: torch.zeros(layer.in_features, layer.in_features) for name, layer in layers.items()}
    for name, layer in layers.items():

        def hook(_: torch.nn.Module, args: tuple[torch.Tensor, ...], name: str = name) -> None:
            rows = args[0].flatten(0, 1).float()
            moments[name] += rows.T @ rows

        layer.register_forward_pre_hook(hook)
    with torch.no_grad():
        for ids in windows.split(8):
            model(input_ids=ids)
    factors = {}
    for name, layer in layers.items():
        W = layer.weight.detach().float()
        rank = int(KEEP * W.numel() / sum(W.shape))
        values, vectors = torch.linalg.eigh(moments[name])
        scale = values.clamp(min=1e-6 * float(values.max())).sqrt()
        root, inverse = (vectors * scale) @ vectors.T, (vectors / scale) @ vectors.T
        U, s, Vh = torch.linalg.svd(W @ root)
        factors[f"{name}.up"] = (U[:, :rank] * s[:rank].sqrt()).bfloat16().contiguous()
        factors[f"{name}.down"] = (s[:rank, None].sqrt() * Vh[:rank] @ inverse).bfloat16().contiguous()
    target.mkdir()
    save_file(factors, target / "factors.safetensors")


def compare(pairs: int, output: Path) -> None:
    """Run the pairs, write every run and the ratios."""
    runs: dict[str, list[tuple[float, int]]] = {"rankfold": [], "naive": []}
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "model"
        make_model(source)
        for number in range(pairs):
            ours = [*RANKFOLD, "compress", source, f"{temporary}/ours-{number}", "--method", "whitened"]
            ours += ["--keep", KEEP, "--sequences", SEQUENCES, "--length", LENGTH]
            theirs = [sys.executable, __file__, "--naive", source, f"{temporary}/naive-{number}"]
            for name, command in (("rankfold", ours), ("naive", theirs)):
                spent = run(command)
                runs[name].append((spent.seconds, spent.peak_memory))
                print(f"{name}: {runs[name][-1][0]:.1f} s, {runs[name][-1][1] / 2**20:,.0f} MiB", flush=True)
    settings = {"parameters": 304_000_000, "sequences": SEQUENCES, "length": LENGTH, "keep": KEEP, "threads": 1}
    here = circumstances("random Llama, 304 M", data="bundled:calibration", seed=0, **settings)
    records = []
    for index, (quantity, unit) in enumerate((("time", "second"), ("peak_memory", "byte"))):
        medians = {name: statistics.median(each[index] for each in values) for name, values in runs.items()}
        for name, values in runs.items():
            every = [each[index] for each in values]
            records.append(here.record(name, quantity, medians[name], unit, runs=every))
        ratio = medians["naive"] / medians["rankfold"]
        records.append(here.record("naive / rankfold", quantity, ratio))
        print(f"{quantity}: naive / rankfold = {ratio:.2f}")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("".join(record.to_json() + "\n" for record in records))


def main() -> None:
    """Compare, or do the naive run in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--naive", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "compress_cost.jsonl")
    # It measures anew in any case.
    asked_afresh()
    arguments = parser.parse_args()
    if arguments.naive:
        naive(*arguments.naive)
        return
    print(json.dumps(circumstances().facts))
    compare(arguments.pairs, arguments.output)


if __name__ == "__main__":
    main()
