"""One budget over bits and ranks beside the same bits everywhere, on a real model, by the calls that users make.

    python benchmarks/one_budget.py MODEL --calibration TEXT --text TEXT --bits 2.3 3.3 4.3

MODEL is a folder, a GGUF file or a name on the hub; a GGUF file's weights lie on the grid of its few bits, so what is
measured on them says less of quantizers than a folder does. All rows are calibrated on the same windows. Rows at each
number of bits a weight, everything counted: rounding to nearest and GPTQ with the same bits everywhere (groups of 64);
GPTQ in a bit less with a compensation of one rank that weighs the inputs alone (EoRA, arXiv:2410.21271; QERA,
arXiv:2410.06040) at equal bytes; `rankfold compress --bits` with `--allow bits` and with both. Losses on the same
held-out windows, differences paired. Results: benchmarks/results/one_budget.jsonl.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parent.parent / "experiments"))
from results import Results, quiet

import rankfold
from rankfold.allocation.widths import factor_bytes, matrix_bytes
from rankfold.calibration import calibrate, summed_loss
from rankfold.checkpoint import load_model
from rankfold.factorization import Moments, SiteMoments
from rankfold.modules import linear_at, matrix_of, prefer
from rankfold.pipeline import read_text
from rankfold.plan import Option
from rankfold.quantization import Groups, fit, gptq, gptq_linear, quantize_blocks
from rankfold.sites import find_sites

GROUP, LENGTH = 64, 512


class Bench:
    """One model and what is measured on its calibration text, once for all rows."""

    def __init__(self, folder: Path, text: str, sequences: int, seed: int) -> None:
        self.folder, self.seed = folder, seed
        model, self.tokenizer = rankfold.load(folder)
        self.sites = find_sites(model).select()
        reading = read_text(model, self.tokenizer, text, sequences=sequences, length=LENGTH, batch_size=4, seed=seed)
        self.batches, self.facts = reading.batches, reading.facts
        start = time.perf_counter()
        loss = summed_loss(model, "text", seed)
        self.statistics = calibrate(model, self.sites, self.batches, loss=loss)
        self.seconds = time.perf_counter() - start
        self.weights = sum(site.out_features * site.in_features for site in self.sites)

    def windows(self) -> Tensor:
        """The calibration windows."""
        return torch.cat([batch["input_ids"] for batch in self.batches])

    def uniform(self, layer: Callable[[Any, Tensor, Any], Any]) -> tuple[Any, float]:
        """A model whose sites are replaced one by one, by weight and moments, and its bits a weight."""
        model = load_model(self.folder)
        stored = 0
        for site in self.sites:
            linear = linear_at(model, site.name)
            W, _ = matrix_of(linear)
            made = layer(site, W, self.statistics[site.name])
            if linear.bias is not None:
                getattr(made, "up", made).bias = linear.bias
            model.set_submodule(site.name, made)
            stored += sum(part.numel() * part.element_size() for part in made.buffers())
        return model, 8 * stored / self.weights

    def nearest(self, bits: int) -> tuple[Any, float]:
        """Rounding to nearest."""

        def layer(site: Any, W: Tensor, moments: Any) -> Any:
            levels = gptq(W, torch.eye(W.shape[1]), bits, GROUP)
            return gptq_linear(levels, Groups(bits, GROUP), None, torch.bfloat16)

        return self.uniform(layer)

    def gptq(self, bits: int) -> tuple[Any, float]:
        """GPTQ with the same bits everywhere, block after block on what the rounded ones before it give."""
        model = load_model(self.folder)
        quantize_blocks(model, self.batches, "gptq", Groups(bits, GROUP))
        stored = sum(matrix_bytes((s.out_features, s.in_features), bits, GROUP) for s in self.sites)
        return model, 8 * stored / self.weights

    def compensated(self, bits: int, average: float) -> tuple[Any, float]:
        """GPTQ in fewer bits and, at each site, the rank that fits into the average, weighing the inputs alone."""

        def layer(site: Any, W: Tensor, moments: Any) -> Any:
            shape = (site.out_features, site.in_features)
            left = average * math.prod(shape) / 8 - matrix_bytes(shape, bits, GROUP)
            rank = max(1, int(left / factor_bytes(shape, 1, 8)))
            while rank > 1 and factor_bytes(shape, rank, 8) > left:
                rank -= 1
            alone = Moments(1, torch.zeros(shape[0]).double(), torch.eye(shape[0]).double())
            option = Option(
                sites=(site.name,), form="compensated", ranks=(rank,), bits=bits, group=GROUP, factor_bits=8
            )
            known = SiteMoments(moments.inputs, None, alone, moments.share)
            return fit(W, known, option, torch.bfloat16).layer

        return self.uniform(layer)

    def shared(self, average: float, allow: str, **settings: Any) -> tuple[Any, float]:
        """The call that users make, the statistics handed over."""
        model, tokenizer = rankfold.load(self.folder)
        plan = rankfold.compress(
            model, tokenizer, bits=average, allow=allow, text=self.windows(), batch_size=4, seed=self.seed,
            statistics=self.statistics, **settings,
        )  # fmt: skip
        return model, 8 * plan.bytes / self.weights


def rows(bench: Bench, average: float) -> Iterator[tuple[str, Callable[[], tuple[Any, float]]]]:
    """The rows at an average number of bits."""
    whole = int(average)
    yield "nearest", lambda: bench.nearest(whole)
    yield "GPTQ", lambda: bench.gptq(whole)
    if whole > 2:
        yield f"GPTQ in {whole - 1} bits + one-sided compensation", lambda: bench.compensated(whole - 1, average)
    yield "rankfold, bits", lambda: bench.shared(average, "bits")
    yield "rankfold, bits and ranks", lambda: bench.shared(average, "rank,bits")


def main() -> None:
    """Make the rows at each number of bits, then measure them together with the dense model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, help="text to calibrate on")
    parser.add_argument("--text", required=True, help="held-out text")
    parser.add_argument("--bits", type=float, nargs="+", default=[2.3, 3.3, 4.3])
    parser.add_argument("--sequences", type=int, default=48)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    results = Results("one_budget")
    arguments = parser.parse_args()
    quiet()
    name = Path(arguments.model).name.removesuffix(".gguf")
    with tempfile.TemporaryDirectory() as work:
        folder = Path(arguments.model)
        if not folder.is_dir():
            model, tokenizer = rankfold.load(arguments.model, dtype=torch.bfloat16)
            folder = Path(work) / name
            rankfold.save(model, tokenizer, folder)
            del model
        bench: Bench | None = None
        for average in arguments.bits:
            if results.has(f"rankfold, bits and ranks @ {average:g}", base=name, seed=arguments.seed):
                continue
            bench = bench or Bench(folder, arguments.calibration, arguments.sequences, arguments.seed)
            models, facts = {"dense": load_model(folder)}, {}
            for row, make in rows(bench, average):
                start = time.perf_counter()
                made, stored = make()
                prefer(made, "speed")
                subject = f"{row} @ {average:g}"
                models[subject] = made
                facts[subject] = {"row": row, "bits": round(stored, 3), "seconds": round(time.perf_counter() - start)}
                print(name, subject, facts[subject], flush=True)
            found = rankfold.measure(
                models, bench.tokenizer, text=arguments.text, length=LENGTH, windows=arguments.windows, latency=False
            )
            for record in found:
                context: Any = record.context
                context |= {"base": name, "seed": arguments.seed, "calibration": dict(bench.facts)}
                context |= {"average": average, **facts.get(record.subject, {})}
                if record.name == "loss":
                    print(record.subject, record.value, context.get("minus"), context.get("interval"), flush=True)
            results.append(found)


if __name__ == "__main__":
    main()
