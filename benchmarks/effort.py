"""What each effort of `rankfold compress` takes and what it gives: seconds, peak memory and the rise of the loss.

    python benchmarks/effort.py MODEL --calibration TEXT --text TEXT
    python benchmarks/effort.py MODEL ... --keeps 0.8 --efforts quick default

MODEL is a folder. Whole commands, `rankfold compress MODEL OUT --keep KEEP --effort EFFORT`, each in a process of its
own with one thread; then the loss of what lies in OUT, on the windows on which the dense model is measured. Processor
seconds, not those of the clock. An interrupted run resumes. Results: benchmarks/results/effort.jsonl.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from commands import RANKFOLD, run

sys.path.append(str(Path(__file__).parent.parent / "experiments"))
from results import Results, quiet

from rankfold.calibration import default_length, load_corpus
from rankfold.checkpoint import load_model, load_tokenizer
from rankfold.circumstances import circumstances
from rankfold.measurement import evaluation_windows
from rankfold.pipeline import EFFORTS
from rankfold.quality import next_token_quality, paired_difference

KEEPS, WINDOWS = (0.9, 0.8, 0.6), 64


def main() -> None:
    """Run every command once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", default="bundled:calibration", help="text to calibrate on")
    parser.add_argument("--text", default="bundled:python-held-out", help="held-out text")
    parser.add_argument("--keeps", nargs="+", type=float, default=KEEPS)
    parser.add_argument("--efforts", nargs="+", choices=list(EFFORTS), default=list(EFFORTS))
    results = Results("effort")
    arguments = parser.parse_args()
    quiet()
    dense, tokenizer = load_model(str(arguments.model)), load_tokenizer(str(arguments.model))
    corpus, length = load_corpus(arguments.text), default_length(dense.config)
    text = evaluation_windows(tokenizer, corpus, length, WINDOWS)
    here = circumstances(dense, data=corpus, seed=0, calibration=Path(arguments.calibration).name)
    reference = next_token_quality(dense, text)

    def measured(keep: float, effort: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as place:
            out = Path(place) / "out"
            command = [*RANKFOLD, "compress", arguments.model, out, "--keep", keep, "--effort", effort]
            spent = run([*command, "--calibration", arguments.calibration])
            found = next_token_quality(load_model(out), text, dense=dense)
        rise = paired_difference(found.window_losses, reference.window_losses)
        return {
            "rise": (rise.value, rise.error),
            "divergence": (found.kl or 0.0, found.kl_error),
            "processor_time": spent.processor_seconds,
            "peak_memory": spent.peak_memory,
        }

    for keep in arguments.keeps:
        for effort in arguments.efforts:
            row = f"{effort}, keep {keep:g}"
            results.measure(arguments.model.name, row, here, lambda keep=keep, effort=effort: measured(keep, effort))


if __name__ == "__main__":
    main()
