"""Other people's quantizers, each run as its own users run it; what comes back is a model of transformers."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import rankfold


def llm_compressor(python: Path, folder: Path, windows: Tensor, bits: int, group: int) -> Any:
    """A model after GPTQ by llm-compressor, its weights dense; by the Python of an environment that has the library."""
    with tempfile.TemporaryDirectory() as work:
        save_file({"input_ids": windows.contiguous()}, Path(work) / "windows.safetensors")
        script = Path(__file__).parent / "gptq_by_llm_compressor.py"
        command = [python, script, folder, Path(work) / "windows.safetensors", Path(work) / "model"]
        _run([*command, "--bits", bits, "--group", group])
        return _of(folder, rankfold.load(Path(work) / "model", dtype=torch.bfloat16)[0])


def k_quant(source: Path, folder: Path, text: str, scheme: str, length: int) -> tuple[Any, int]:
    """A model in a K-quant of llama.cpp, and the bytes of its blocks' matrices.

    Args:
        source: llama.cpp's source, its `llama-quantize` and `llama-imatrix` built in its folder `build`.
        folder: The dense model. Embedding and head stay in 16 bits, as in the other rows.
        text: The importance matrix is measured on it.
        scheme: A type of llama.cpp, such as `Q3_K_M`.
        length: Tokens of a window.
    """
    from gguf import GGUFReader

    tools = source / "build" / "bin"
    with tempfile.TemporaryDirectory() as work:
        dense, importance, out = Path(work) / "dense.gguf", Path(work) / "imatrix.gguf", Path(work) / "out.gguf"
        (Path(work) / "text").write_text(text)
        _run([sys.executable, source / "convert_hf_to_gguf.py", folder, "--outtype", "bf16", "--outfile", dense])
        _run([tools / "llama-imatrix", "-m", dense, "-f", Path(work) / "text", "-c", length, "-o", importance, "-t", 2])
        kept = ("--token-embedding-type", "bf16", "--output-tensor-type", "bf16")
        _run([tools / "llama-quantize", "--imatrix", importance, *kept, dense, out, scheme, 2])
        tensors = [tensor for tensor in GGUFReader(out).tensors if tensor.name.startswith("blk.")]
        stored = sum(int(tensor.n_bytes) for tensor in tensors if len(tensor.shape) > 1)
        return _of(folder, rankfold.load(out, dtype=torch.bfloat16)[0]), stored


def _of(folder: Path, model: Any) -> Any:
    """A model that bears the name of what it was made from, not of a folder that is gone."""
    model.name_or_path = model.config._name_or_path = str(folder)
    return model


def _run(command: list[Any]) -> None:
    """Run a command to its end; its last words are the error's where it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {(done.stdout + done.stderr)[-2000:]}")
