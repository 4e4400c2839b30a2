"""One budget over bits and ranks beside the same bits everywhere, on a real model, by the calls that users make.

    python benchmarks/one_budget.py MODEL --calibration TEXT --text TEXT --bits 2.3 3.3 4.3
    python benchmarks/one_budget.py ... --bits 3.3 --llm-compressor ENVIRONMENT/bin/python
    python benchmarks/one_budget.py ... --bits --peers SpQR NF4 INT8 Q3_K_M --llama-cpp SOURCE

MODEL is a folder, a GGUF file or a name on the hub; a GGUF file's weights lie on the grid of its few bits, so what is
measured on them says less of quantizers than a folder does. All rows are calibrated on the same windows. Rows at each
number of bits a weight, everything counted: rounding to nearest and GPTQ with the same bits everywhere (groups of 64);
GPTQ in a bit less with a compensation of one rank that weighs the inputs alone (EoRA, arXiv:2410.21271; QERA,
arXiv:2410.06040) at equal bytes; `rankfold compress --bits` with `--allow bits` and with both; GPTQ by llm-compressor,
where an environment with it is given. `--peers` have bytes of their own: SpQR of ours, NF4 and INT8 by bitsandbytes,
K-quants of llama.cpp; beside each stands `rankfold compress --bits` at its bytes. Losses on the same held-out windows,
differences paired. Rows that were measured are not made again. Results: benchmarks/results/one_budget.jsonl.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parent.parent / "experiments"))
import peers
from results import Results, quiet, read

import rankfold
from rankfold.allocation.widths import factor_bytes, matrix_bytes
from rankfold.calibration import calibrate, summed_loss
from rankfold.checkpoint import load_model
from rankfold.factorization import Moments, SiteMoments
from rankfold.modules import linear_at, matrix_of, prefer
from rankfold.pipeline import read_text
from rankfold.plan import Option
from rankfold.quantization import Grid, Groups, fit, gptq, gptq_linear, quantize_blocks, quantize_by_library
from rankfold.sites import find_sites

GROUP, LENGTH = 64, 512
BOTH = "rankfold, bits and ranks"


Made = tuple[Any, float]
"""A model and its bits a weight of the sites, everything counted."""


class Bench:
    """One model and what is measured on its calibration text, once for all rows."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        self.folder, self.seed, self.arguments = folder, arguments.seed, arguments
        model, self.tokenizer = rankfold.load(folder)
        self.sites = find_sites(model).select()
        reading = read_text(
            model, self.tokenizer, arguments.calibration, sequences=arguments.sequences, length=LENGTH, batch_size=4,
            seed=arguments.seed,
        )  # fmt: skip
        self.batches, self.facts = reading.batches, reading.facts
        self.weights = sum(site.out_features * site.in_features for site in self.sites)

    @cached_property
    def statistics(self) -> Any:
        """What our rows are chosen by."""
        model = load_model(self.folder)
        return calibrate(model, self.sites, self.batches, loss=summed_loss(model, "text", self.seed))

    def windows(self) -> Tensor:
        """The calibration windows."""
        return torch.cat([batch["input_ids"] for batch in self.batches])

    def uniform(self, layer: Callable[[Any, Tensor, Any], Any]) -> Made:
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

    def nearest(self, bits: int) -> Made:
        """Rounding to nearest."""

        def layer(site: Any, W: Tensor, moments: Any) -> Any:
            levels = gptq(W, torch.eye(W.shape[1]), bits, GROUP)
            return gptq_linear(levels, Groups(bits, GROUP), None, torch.bfloat16)

        return self.uniform(layer)

    def gptq(self, bits: int) -> Made:
        """GPTQ with the same bits everywhere, block after block on what the rounded ones before it give."""
        model = load_model(self.folder)
        quantize_blocks(model, self.batches, "gptq", Groups(bits, GROUP))
        return model, self.gptq_bits(bits)

    def compensated(self, bits: int, average: float) -> Made:
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

    def shared(self, average: float, allow: str, **settings: Any) -> Made:
        """The call that users make, the statistics handed over."""
        model, tokenizer = rankfold.load(self.folder)
        plan = rankfold.compress(
            model, tokenizer, bits=average, allow=allow, text=self.windows(), batch_size=4, seed=self.seed,
            statistics=self.statistics, **settings,
        )  # fmt: skip
        return model, 8 * plan.bytes / self.weights

    def spqr(self) -> Made:
        """SpQR of our own, with its paper's settings for 3 bits."""
        model = load_model(self.folder)
        bits = quantize_blocks(model, self.batches, "spqr", Grid())
        stored = sum(bits[site.name] * site.out_features * site.in_features for site in self.sites)
        return model, stored / self.weights

    def library(self, scheme: str) -> Made:
        """INT8 or NF4 by bitsandbytes: codes and their scales counted, 32 bits a row or a group of 64."""
        model, summary = quantize_by_library(self.folder, scheme)
        stored = 0
        for site in self.sites:
            weights = site.out_features * site.in_features
            if site.name in summary.left:
                stored += 16 * weights
            else:
                stored += 4 * weights + weights // 2 if scheme == "nf4" else 8 * weights + 32 * site.out_features
        return model, stored / self.weights

    def llm_compressor(self, bits: int) -> Made:
        """GPTQ by llm-compressor; bytes as ours in the same groups, fewer than its own format takes."""
        model = peers.llm_compressor(self.arguments.llm_compressor, self.folder, self.windows(), bits, GROUP)
        return model, self.gptq_bits(bits)

    def gptq_bits(self, bits: int) -> float:
        """Bits a weight of the same bits everywhere."""
        stored = sum(matrix_bytes((s.out_features, s.in_features), bits, GROUP) for s in self.sites)
        return 8 * stored / self.weights

    def k_quant(self, scheme: str) -> Made:
        """A K-quant of llama.cpp with an importance matrix of the calibration text; only blocks are quantized."""
        text = "".join(self.tokenizer.batch_decode(self.windows()))
        model, stored = peers.k_quant(self.arguments.llama_cpp, self.folder, text, scheme, LENGTH)
        return model, 8 * stored / self.weights


def rows(bench: Bench, average: float) -> Iterator[tuple[str, Callable[[], Made]]]:
    """The rows at an average number of bits."""
    whole = int(average)
    yield "nearest", lambda: bench.nearest(whole)
    yield "GPTQ", lambda: bench.gptq(whole)
    if bench.arguments.llm_compressor:
        yield "GPTQ by llm-compressor", lambda: bench.llm_compressor(whole)
    if whole > 2:
        yield f"GPTQ in {whole - 1} bits + one-sided compensation", lambda: bench.compensated(whole - 1, average)
    yield "rankfold, bits", lambda: bench.shared(average, "bits")
    yield BOTH, lambda: bench.shared(average, "rank,bits")


def peer(bench: Bench, scheme: str) -> Made:
    """A quantizer whose bytes are its own."""
    if scheme == "SpQR":
        return bench.spqr()
    if scheme in ("NF4", "INT8"):
        return bench.library(scheme.lower())
    return bench.k_quant(scheme)


class Table:
    """Rows are made, measured together with the dense model and written."""

    def __init__(self, bench: Bench, name: str, results: Results) -> None:
        self.bench, self.name, self.results = bench, name, results
        self.models: dict[str, Any] = {"dense": load_model(bench.folder)}
        self.facts: dict[str, dict[str, Any]] = {}

    def has(self, subject: str) -> bool:
        """Whether a row was measured."""
        return self.results.has(subject, base=self.name, seed=self.bench.seed)

    def make(self, row: str, average: float | None, make: Callable[[], Made]) -> float:
        """One row, at the average it was asked for or at its own; its bits a weight."""
        start = time.perf_counter()
        made, stored = make()
        prefer(made, "speed")
        subject = row if average is None else f"{row} @ {average:g}"
        seconds = round(time.perf_counter() - start)
        self.models[subject] = made
        self.facts[subject] = {"row": row, "bits": round(stored, 3), "seconds": seconds}
        self.facts[subject] |= {"peer": row} if average is None else {"average": average}
        print(self.name, subject, self.facts[subject], flush=True)
        return stored

    def measure(self) -> None:
        """All rows that were made, side by side."""
        if len(self.models) < 2:
            return
        found = rankfold.measure(
            self.models, self.bench.tokenizer, text=self.bench.arguments.text, length=LENGTH,
            windows=self.bench.arguments.windows, latency=False,
        )  # fmt: skip
        for record in found:
            context: Any = record.context
            context |= {"base": self.name, "seed": self.bench.seed, "calibration": dict(self.bench.facts)}
            context |= self.facts.get(record.subject, {})
            if record.name == "loss":
                print(record.subject, record.value, context.get("minus"), context.get("interval"), flush=True)
        self.results.append(found)


def main() -> None:
    """Make the rows at each number of bits, and each peer's, then measure them together with the dense model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, help="text to calibrate on")
    parser.add_argument("--text", required=True, help="held-out text")
    parser.add_argument("--bits", type=float, nargs="*", default=[2.3, 3.3, 4.3])
    parser.add_argument("--peers", nargs="*", default=[], help="SpQR, NF4, INT8, or types of llama.cpp such as Q3_K_M")
    parser.add_argument("--llm-compressor", type=Path, help="python of an environment with llm-compressor")
    parser.add_argument("--llama-cpp", type=Path, help="llama.cpp's source, built in its folder `build`")
    parser.add_argument("--sequences", type=int, default=32)
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
        bench = Bench(folder, arguments)
        for average in arguments.bits:
            table = Table(bench, name, results)
            for row, make in rows(bench, average):
                if not table.has(f"{row} @ {average:g}"):
                    table.make(row, average, make)
            table.measure()
        table = Table(bench, name, results)
        for scheme in arguments.peers:
            if not table.has(scheme):
                table.make(scheme, None, lambda: peer(bench, scheme))  # noqa: B023
        table.measure()
        for scheme in arguments.peers:
            table = Table(bench, name, results)
            if not table.has(f"{BOTH}, at the bytes of {scheme}"):
                # Never more bytes than the peer's.
                average = math.floor(bits_of(name, scheme) * 1000) / 1000
                table.make(f"{BOTH}, at the bytes of {scheme}", None, lambda: bench.shared(average, "rank,bits"))  # noqa: B023
            table.measure()


def bits_of(base: str, scheme: str) -> float:
    """Bits a weight of a peer's row."""
    rows = [record for record in read("one_budget") if record.context.get("base") == base]
    return float(next(record.context["bits"] for record in rows if record.context.get("peer") == scheme))


if __name__ == "__main__":
    main()
