"""`rankfold compress` of checkpoints larger than the memory that the system lets it have, killed and gone on with.

    python benchmarks/larger_than_memory.py --width 512 --blocks 12 24 48 96 --memory 900000000
    python benchmarks/larger_than_memory.py --width 1024 --blocks 350 --memory 4294967296 --method svd --kills 5

Makes Llamas of random weights, one shard after the other, so that this takes no memory either; a block of width 1024
has 22 MB, the embedding 66 MB. The limit is that of a control group (`systemd-run --scope -p MemoryMax=`, or one made
by hand where that does not run and the user may); there is no swap. Of each run: seconds, and the peak of anonymous
memory, which the process cannot give back: pages of mapped files the system drops when others need them. With kills the
process is killed at random points, begun again each time, and its checkpoint compared with that of an uninterrupted
run, byte by byte. Results: benchmarks/results/larger_than_memory.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "experiments"))
from results import Results

from rankfold.circumstances import circumstances
from rankfold.fingerprint import file_digest

HEADS, KEYS, VOCABULARY = 16, 4, 32_000
GROUPS = Path("/sys/fs/cgroup/memory")


def make_model(folder: Path, width: int, blocks: int) -> None:
    """A Llama of random weights in bfloat16, a shard for every eight blocks."""
    inner, kv = 11 * width // 4, width * KEYS // HEADS
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=inner, num_hidden_layers=blocks,
        num_attention_heads=HEADS, num_key_value_heads=KEYS, max_position_embeddings=2048, tie_word_embeddings=True,
        dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "models" / "pycode-llama").save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def random_weight(rows: int, columns: int) -> torch.Tensor:
        # The residual stream must not grow with the blocks.
        weight = torch.randn(rows, columns, generator=generator) / columns**0.5
        return (weight / (2 * blocks) ** 0.5).to(torch.bfloat16)

    ones = torch.ones(width, dtype=torch.bfloat16)
    shapes = {
        "self_attn.q_proj": (width, width), "self_attn.k_proj": (kv, width), "self_attn.v_proj": (kv, width),
        "self_attn.o_proj": (width, width), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }  # fmt: skip
    embedding = (0.02 * torch.randn(VOCABULARY, width, generator=generator)).to(torch.bfloat16)
    places: dict[str, str] = {}
    size = 0
    for first in range(0, blocks, 8):
        shard = {} if first else {"model.embed_tokens.weight": embedding, "model.norm.weight": ones.clone()}
        for block in range(first, min(first + 8, blocks)):
            path = f"model.layers.{block}."
            shard |= {f"{path}{name}.weight": random_weight(*shape) for name, shape in shapes.items()}
            shard |= {f"{path}{name}.weight": ones.clone() for name in ("input_layernorm", "post_attention_layernorm")}
        name = f"model-{first // 8 + 1:05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, name)
        size += sum(part.nbytes for part in shard.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@contextmanager
def group(limit: int) -> Iterator[list[str]]:
    """What to put before a command so that the system lets it have no more memory."""
    trial = ["systemd-run", "--scope", "--quiet", "-p", f"MemoryMax={limit}", "-p", "MemorySwapMax=0"]
    if (
        shutil.which("systemd-run")
        and not subprocess.run([*trial, "true"], capture_output=True, check=False).returncode
    ):
        yield trial
        return
    place = GROUPS / f"rankfold-{os.getpid()}"
    try:
        place.mkdir()
    except OSError as error:
        raise SystemExit(f"No control group can be made here, by systemd-run or in {GROUPS}: {error}") from error
    try:
        (place / "memory.limit_in_bytes").write_text(str(limit))
        yield ["sh", "-c", f'echo $$ > {place / "cgroup.procs"}; exec "$@"', "sh"]
    finally:
        time.sleep(0.5)
        place.rmdir()


def anonymous(pid: int) -> int:
    """Bytes that a process has of its own."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def run(command: list[str], limit: int, killed_after: float | None = None) -> tuple[int, float, int]:
    """Exit code, seconds and peak anonymous bytes of a command under a limit."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    with group(limit) as before, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen([*before, *command], env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        peak = 0
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.05)
            if killed_after is not None and time.perf_counter() - start > killed_after:
                process.send_signal(signal.SIGKILL)
        seconds = time.perf_counter() - start
        if process.returncode not in (0, -signal.SIGKILL) or (process.returncode and killed_after is None):
            errors.seek(0)
            raise SystemExit(f"exit code {process.returncode}: {errors.read().decode()[-2000:]}")
    return process.returncode, seconds, peak


def digests(folder: Path) -> dict[str, str]:
    """What the weights and the configuration of a checkpoint are."""
    return {path.name: file_digest(path) for path in sorted(folder.iterdir()) if path.name != "README.md"}


def main() -> None:
    """Make the models and compress them under the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, nargs="+", default=[12, 24, 48, 96])
    parser.add_argument("--memory", type=int, default=900_000_000, help="bytes that the system lets the process have")
    parser.add_argument("--method", default="kfac")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="a folder on a disk with room for several checkpoints")
    results = Results("larger_than_memory")
    arguments = parser.parse_args()
    for blocks in arguments.blocks:
        with tempfile.TemporaryDirectory(dir=arguments.work) as work:
            source = Path(work) / "source"
            make_model(source, arguments.width, blocks)
            size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
            print(f"{blocks} blocks, {size:,} bytes, limit {arguments.memory:,}", flush=True)

            def command(out: str) -> list[str]:
                text = ["--sequences", str(arguments.sequences), "--length", str(arguments.length)]
                text = [] if arguments.method == "svd" else text
                to = [str(source), str(Path(work) / out), "--keep", "0.8", "--method", arguments.method]  # noqa: B023
                return [str(Path(sys.executable).with_name("rankfold")), "compress", *to, *text]

            _, seconds, peak = run(command("whole"), arguments.memory)
            print(f"  {seconds:.0f} s, {peak:,} bytes of its own", flush=True)
            here = circumstances(
                "random Llama", data="bundled:calibration", seed=arguments.seed, width=arguments.width, blocks=blocks,
                bytes=size, limit=arguments.memory, keep=0.8, method=arguments.method, sequences=arguments.sequences,
                length=arguments.length,
            )  # fmt: skip
            subject = f"{arguments.method}, {blocks} blocks of {arguments.width}"
            found = [
                here.record(subject, "time", seconds, "second"),
                here.record(subject, "peak_anonymous_memory", peak, "byte"),
            ]
            if arguments.kills:
                chance = random.Random(arguments.seed)
                points = sorted(chance.uniform(0.1, 0.9) for _ in range(arguments.kills))
                spent = 0.0
                for last, point in zip([0.0, *points], points, strict=False):
                    code, took, _ = run(command("killed"), arguments.memory, 15 + seconds * (point - last))
                    spent += took
                    print(f"  killed after {took:.0f} s (exit code {code})", flush=True)
                _, took, _ = run(command("killed"), arguments.memory)
                same = digests(Path(work) / "whole") == digests(Path(work) / "killed")
                print(f"  gone on with for {took:.0f} s; the same bytes: {same}", flush=True)
                found += [
                    here.record(subject, "time_killed", spent + took, "second", kills=arguments.kills),
                    here.record(subject, "same_bytes", float(same), kills=arguments.kills),
                ]
            results.append(found)


if __name__ == "__main__":
    main()
