"""Processor seconds and peak memory of one budget over bits and ranks, beside the same bits everywhere.

    python benchmarks/few_bits_cost.py MODEL --calibration TEXT
    python benchmarks/few_bits_cost.py ... --llm-compressor ENVIRONMENT/bin/python

MODEL is a folder. Whole commands, each in a process of its own with one thread, on the same 32 x 512 tokens: `rankfold
quantize --scheme gptq` in 3 bits; `rankfold compress --bits 3.3` over bits, and over bits and ranks; GPTQ in 3 bits by
llm-compressor, where an environment with it is given, from windows that were cut before. Processor seconds, not those
of the clock, so that other work on the machine counts less. Results: benchmarks/results/few_bits_cost.jsonl.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from commands import RANKFOLD, run
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "experiments"))
from results import Results, quiet

import rankfold
from rankfold.circumstances import circumstances
from rankfold.pipeline import read_text

SEQUENCES, LENGTH = 32, 512


def rows(arguments: argparse.Namespace, work: Path) -> dict[str, list[Any]]:
    """The command of each row."""
    model, text = arguments.model, ["--calibration", arguments.calibration]
    text += ["--sequences", SEQUENCES, "--length", LENGTH]
    found = {
        "GPTQ": [*RANKFOLD, "quantize", model, work / "gptq", "--scheme", "gptq", "--bits", 3, *text],
        "rankfold, bits": [*RANKFOLD, "compress", model, work / "bits", "--bits", 3.3, "--allow", "bits", *text],
        "rankfold, bits and ranks": [*RANKFOLD, "compress", model, work / "both", "--bits", 3.3, *text],
    }
    if arguments.llm_compressor:
        loaded, tokenizer = rankfold.load(model)
        reading = read_text(
            loaded, tokenizer, arguments.calibration, sequences=SEQUENCES, length=LENGTH, batch_size=1, seed=0
        )
        windows = torch.cat([batch["input_ids"] for batch in reading.batches])
        save_file({"input_ids": windows.contiguous()}, work / "windows.safetensors")
        script = Path(__file__).parent / "gptq_by_llm_compressor.py"
        command = [arguments.llm_compressor, script, model, work / "windows.safetensors", work / "theirs"]
        found["GPTQ by llm-compressor"] = [*command, "--bits", 3, "--group", 64]
    return found


def main() -> None:
    """Run every command once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, help="text to calibrate on")
    parser.add_argument("--llm-compressor", type=Path, help="python of an environment with llm-compressor")
    results = Results("few_bits_cost")
    arguments = parser.parse_args()
    quiet()
    here = circumstances(
        Path(arguments.model).name, data=Path(arguments.calibration).name, seed=0, sequences=SEQUENCES, length=LENGTH
    )
    with tempfile.TemporaryDirectory() as place:
        for row, command in rows(arguments, Path(place)).items():

            def measured(command: list[Any] = command) -> dict[str, Any]:
                spent = run(command)
                return {"processor_time": spent.processor_seconds, "peak_memory": spent.peak_memory}

            results.measure(Path(arguments.model).name, row, here, measured)


if __name__ == "__main__":
    main()
