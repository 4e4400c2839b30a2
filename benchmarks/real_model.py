"""README's table: a real model as it is, quantized and compressed, by the calls that users make, side by side.

    python benchmarks/real_model.py MODEL --calibration TEXT --text TEXT

MODEL is a folder, a GGUF file or a name on the hub. Rows: dense; INT8 and 4 bits (NF4) by bitsandbytes through
`rankfold quantize`; one budget over bits and ranks at the bytes of the 4-bit row; SVD-LLM's method (`whitened`) and the
default engine at keep 0.8. All models are then measured in one `rankfold.measure`, their timings interleaved. Results:
benchmarks/results/real_model.jsonl.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent.parent / "experiments"))
from results import Results, quiet

import rankfold
from rankfold.checkpoint import load_model
from rankfold.quantization import quantize_by_library

KEEP, SEQUENCES, LENGTH, WINDOWS = 0.8, 32, 512, 64


FOUR_BITS = "4 bits (NF4)"


def compressed(folder: Path, text: str, **choices: Any) -> Any:
    """A model after the one call."""
    model, tokenizer = rankfold.load(folder)
    rankfold.compress(model, tokenizer, text=text, sequences=SEQUENCES, length=LENGTH, **choices)
    return model


def stored(folder: Path) -> int:
    """Bytes of a checkpoint's weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def rows(folder: Path, text: str, folders: Mapping[str, Path]) -> dict[str, Callable[[], Any]]:
    """How each row is made, in this order."""
    return {
        "dense": lambda: rankfold.load(folder)[0],
        "INT8": lambda: quantize_by_library(folder, "int8")[0],
        FOUR_BITS: lambda: quantize_by_library(folder, "nf4")[0],
        # A file's header is not part of a budget of bytes.
        "rankfold, the same bytes": lambda: compressed(folder, text, bytes=stored(folders[FOUR_BITS]) - 200_000),
        "SVD-LLM (whitened), keep 0.8": lambda: compressed(folder, text, keep=KEEP, method="whitened"),
        "rankfold, keep 0.8": lambda: compressed(folder, text, keep=KEEP),
    }


def main() -> None:
    """Make every model in a folder of its own, then measure them together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, help="text to calibrate on")
    parser.add_argument("--text", required=True, help="held-out text")
    results = Results("real_model")
    arguments = parser.parse_args()
    name = Path(arguments.model).name.removesuffix(".gguf")
    if results.has("dense", base=name):
        print(f"{name}: measured already with these versions; --fresh measures again.")
        return
    quiet()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / name
        model, tokenizer = rankfold.load(arguments.model, dtype=torch.bfloat16)
        rankfold.save(model, tokenizer, folder)
        del model
        folders: dict[str, Path] = {}
        seconds = {}
        for number, (row, make) in enumerate(rows(folder, arguments.calibration, folders).items()):
            folders[row] = Path(work) / f"row-{number}"
            start = time.perf_counter()
            rankfold.save(make(), tokenizer, folders[row])
            seconds[row] = time.perf_counter() - start
            print(f"{row}: {seconds[row]:.0f} s", flush=True)
        models = {row: load_model(place) for row, place in folders.items()}
        found = rankfold.measure(
            models, tokenizer, text=arguments.text, length=LENGTH, windows=WINDOWS, folders=folders, say=print
        )
    calibration = {"text": Path(arguments.calibration).name, "sequences": SEQUENCES, "length": LENGTH}
    for record in found:
        facts: Any = record.context
        facts |= {"base": name, "calibration": calibration, "seconds_to_make": round(seconds[record.subject])}
    results.append(found)
    print(found)


if __name__ == "__main__":
    main()
