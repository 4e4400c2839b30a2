"""QLoRA over a compressed model beside QLoRA over the dense one: python experiments/lord_qlora.py.

Memory: GPTBigCode of 305 M random parameters, down-projections at half rank, weights in NF4, adapters of rank 16 on all
layers, one step of 2 x 256 tokens, each in a process of its own: bytes of the weights, of adapters, gradients and
optimizer, and the peak of the process over that of the imports. Loss: pycode-starcoder on the bundled sample, 200 steps
of 16 x 256 tokens, the last tenth held out, beside full training of the factors. Results:
benchmarks/results/lord_qlora.jsonl.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from lord import Results, Subject, quiet
from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

from rankfold import allocate, factorize, find_sites
from rankfold.calibration import random_windows, split_windows
from rankfold.checkpoint import load_model, save
from rankfold.circumstances import circumstances
from rankfold.cost import memory_bytes, parameter_count
from rankfold.quantization import quantize_by_library
from rankfold.recovery import recover

ADAPTER_RANK, STEPS = 16, 200
TARGETS = ["c_attn", "c_fc", "c_proj", "down", "up"]


def big(folder: Path, compressed: bool) -> int:
    """Write a random model of 305 M parameters in NF4, and give its parameters."""
    torch.manual_seed(0)
    config = GPTBigCodeConfig(
        vocab_size=49_152, n_positions=1024, n_embd=1024, n_layer=24, n_head=16, n_inner=4096, multi_query=True,
        bos_token_id=0, eos_token_id=0, dtype="bfloat16",
    )  # fmt: skip
    model = GPTBigCodeForCausalLM(config).to(torch.bfloat16)
    if compressed:
        # Which matrices they are makes no difference to memory: the plain SVD of random weights.
        factorize(model, allocate(find_sites(model).select(["mlp.c_proj"]), rank=512, method="svd"))
    with tempfile.TemporaryDirectory() as plain:
        save(model, None, Path(plain) / "model")
        made, _ = quantize_by_library(Path(plain) / "model", "nf4")
    save(made, None, folder)
    return parameter_count(made)


def resident(name: str) -> int:
    """Bytes of this process in memory, now (`VmRSS`) or at most (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))


def train_once(folder: str) -> None:
    """Two steps of QLoRA in this process; prints the bytes of the parts and the peak."""
    from peft import LoraConfig, get_peft_model

    # A process inherits the peak of the one that started it, so the kernel's mark is set back (Linux).
    Path("/proc/self/clear_refs").write_text("5")
    start = resident("VmRSS")
    model = load_model(folder)
    names = [name for name, module in model.named_modules() if name.rpartition(".")[2] in TARGETS]
    chosen = [name for name in names if not list(model.get_submodule(name).children())]
    adapted = get_peft_model(model, LoraConfig(r=ADAPTER_RANK, target_modules=chosen))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    ids = torch.randint(49_152, (2, 256))
    for _ in range(2):
        adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapters = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    peak = resident("VmHWM")
    print(json.dumps({"weights": memory_bytes(model) - adapters, "adapters": 4 * adapters, "peak": peak - start}))


def memory(compressed: bool) -> dict[str, Any]:
    """The parts, in bytes, measured in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        parameters = big(Path(folder) / "model", compressed)
        command = [sys.executable, __file__, "--train", f"{folder}/model"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {"parameters": parameters, **json.loads(done.stdout.splitlines()[-1])}


def loss(subject: Subject, compressed: bool, scheme: str | None) -> dict[str, Any]:
    """Held-out loss before and after training, by adapters over NF4 weights or of all parameters."""
    cut = int(0.9 * len(subject.stream))
    windows = random_windows(subject.stream[:cut], STEPS * 16, 256, seed=1)
    held_out = split_windows(subject.stream[cut:], 256)[:64]
    model = subject.lord(64) if compressed else subject.load()
    with tempfile.TemporaryDirectory() as folder:
        if scheme:
            save(model, None, Path(folder) / "model")
            model, _ = quantize_by_library(Path(folder) / "model", scheme, dtype=torch.float32)
        result = recover(
            model, None, windows, held_out, work=Path(folder) / "work", objective="next-token", steps=STEPS,
            lora_rank=ADAPTER_RANK if scheme else None,
        )  # fmt: skip
    return {"before": result.before, "after": result.after, "steps": result.steps, "parameters": parameter_count(model)}


def main() -> None:
    """Measure what is missing."""
    quiet()
    if sys.argv[1:2] == ["--train"]:
        train_once(sys.argv[2])
        return
    results = Results("lord_qlora")
    context = circumstances("GPTBigCode, 305 M", seed=0, adapter_rank=ADAPTER_RANK)
    for name, compressed in (("QLoRA over the dense model", False), ("QLoRA over LoRD", True)):
        results.measure("GPTBigCode, 305 M", name, context, lambda compressed=compressed: memory(compressed))
    subject = Subject("pycode-starcoder")
    rows = {
        "dense, all parameters": (False, None), "dense, QLoRA": (False, "nf4"), "LoRD, all parameters": (True, None),
        "LoRD, QLoRA": (True, "nf4"),
    }  # fmt: skip
    for name, (compressed, scheme) in rows.items():
        results.measure(subject.name, name, subject.context, lambda c=compressed, s=scheme: loss(subject, c, s))


if __name__ == "__main__":
    main()
