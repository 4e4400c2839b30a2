"""`rankfold adapt` beside plain and one-sided extraction at equal bytes, on a real model.

    python benchmarks/adapters.py MODEL --calibration TEXT --text TEXT --tune TEXT
    python benchmarks/adapters.py ... --llama-cpp SOURCE    # with llama-cpp-python: the logits there, too

MODEL is a folder, a GGUF file or a name on the hub. Three pairs of a base and a target: what NF4 lost, what GPTQ in 3
bits lost (exported dense), and what a fine-tune learned (of 160 windows on the first 70 % of `--tune`, measured on the
rest). Rows at the bytes of ranks 2, 8 and 32 at every layer: the truncated SVD of the difference (mergekit's way);
weighed by the inputs alone at one rank (EoRA, arXiv:2410.21271); `rankfold adapt` with one rank or none at each layer,
and with ranks of their own. Each is written as a PEFT folder and loaded again, then all are measured side by side on
held-out text. Results: benchmarks/results/adapters.jsonl.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parent.parent / "experiments"))
from results import Results, quiet

import rankfold
from rankfold.calibration import Corpus, calibrate, load_corpus, summed_loss
from rankfold.checkpoint import export_dense, load_model, save_adapters
from rankfold.factorization import Moments, SiteMoments
from rankfold.pipeline import read_text
from rankfold.quantization import Groups, quantize_blocks, quantize_by_library
from rankfold.recovery import (
    Difference,
    check_relatives,
    difference_adapter,
    difference_plan,
    differences,
    remaining_divergence,
)
from rankfold.sites import find_sites

LENGTH, SEQUENCES, WINDOWS, RANKS = 512, 32, 16, (2, 8, 32)
HELD_OUT = 8
"""As the command line does."""
TUNED_WINDOWS, TUNED_LENGTH, TUNED_BATCH = 160, 256, 8
PLAIN, ONE_SIDED, ONE_RANK, OWN_RANKS = "truncated SVD", "inputs alone", "rankfold adapt", "rankfold adapt --compact"


@dataclass(frozen=True)
class Pair:
    """A base that carries adapters, the target, and the texts that belong to them."""

    name: str
    base: Path
    target: Path
    calibration: str | Path
    text: str | Path | Corpus


class Bench:
    """The folders of all pairs, made once."""

    def __init__(self, folder: Path, work: Path, arguments: argparse.Namespace) -> None:
        self.folder, self.work, self.arguments = folder, work, arguments

    def pair(self, name: str) -> Pair:
        """Make a pair by its name."""
        made = {"NF4": self.nf4, "GPTQ, 3 bits": self.gptq, "fine-tune": self.fine_tune}[name]
        return made(name)

    def nf4(self, name: str) -> Pair:
        """What NF4 lost."""
        base = self.work / "nf4"
        model, _ = quantize_by_library(self.folder, "nf4")
        rankfold.save(model, rankfold.load(self.folder)[1], base)
        return Pair(name, base, self.folder, self.arguments.calibration, self.arguments.text)

    def gptq(self, name: str) -> Pair:
        """What GPTQ in 3 bits lost."""
        base = self.work / "gptq"
        model, tokenizer = rankfold.load(self.folder)
        reading = read_text(
            model, tokenizer, self.arguments.calibration, sequences=SEQUENCES, length=LENGTH, batch_size=4, seed=0
        )
        quantize_blocks(model, reading.batches, "gptq", Groups(3, 64))
        rankfold.save(model, tokenizer, self.work / "gptq-few")
        export_dense(*rankfold.load(self.work / "gptq-few"), base)
        return Pair(name, base, self.folder, self.arguments.calibration, self.arguments.text)

    def fine_tune(self, name: str) -> Pair:
        """What a fine-tune of all weights learned."""
        target = self.work / "tuned"
        text = "\n".join(load_corpus(self.arguments.tune).texts)
        cut = int(0.7 * len(text))
        (self.work / "seen.txt").write_text(text[:cut])
        unseen = Corpus(f"last 30 % of {Path(self.arguments.tune).name}", (text[cut:],))
        model, tokenizer = rankfold.load(self.folder, dtype=torch.float32)
        reading = read_text(
            model, tokenizer, str(self.work / "seen.txt"), sequences=TUNED_WINDOWS, length=TUNED_LENGTH, batch_size=1,
            seed=0,
        )  # fmt: skip
        ids = torch.cat([batch["input_ids"] for batch in reading.batches])
        steps = len(ids) // TUNED_BATCH
        rankfold.recover(model, None, ids, objective="next-token", steps=steps, batch_size=TUNED_BATCH, rate=1e-4)
        rankfold.save(model.to(torch.bfloat16), tokenizer, target)
        return Pair(name, self.folder, target, self.work / "seen.txt", unseen)


def unweighed(statistics: Mapping[str, SiteMoments], sites: Any, inputs: bool) -> dict[str, SiteMoments]:
    """Statistics that say nothing of the outputs, and of the inputs only where asked for."""
    found = {}
    for site in sites:
        known = statistics[site.name]
        alone = Moments(1, torch.zeros(site.out_features).double(), torch.eye(site.out_features).double())
        same = Moments(1, torch.zeros(site.in_features).double(), torch.eye(site.in_features).double())
        found[site.name] = SiteMoments(known.inputs if inputs else same, None, alone, known.share)
    return found


def adapters(bench: Bench, pair: Pair) -> dict[str, tuple[Path, dict[str, Any]]]:
    """All adapters of a pair as folders, with their facts."""
    target, tokenizer = rankfold.load(pair.target)
    carrier = load_model(pair.base, dense=True)
    sites = find_sites(target).select()
    others = check_relatives(carrier, target, sites, leave_others=True)
    reading = read_text(
        target,
        tokenizer,
        str(pair.calibration),
        sequences=SEQUENCES,
        length=LENGTH,
        batch_size=4,
        seed=0,
        held_out=True,
    )
    statistics = calibrate(target, sites, reading.batches, loss=summed_loss(target, "text", 0))
    both = differences(carrier, target, sites, statistics)
    assert reading.held_out is not None, "asked for"
    judge = remaining_divergence(carrier, target, reading.held_out[:HELD_OUT])
    ways: dict[str, tuple[Mapping[str, Difference], dict[str, Any]]] = {
        PLAIN: (differences(carrier, target, sites, unweighed(statistics, sites, inputs=False)), {}),
        ONE_SIDED: (differences(carrier, target, sites, unweighed(statistics, sites, inputs=True)), {}),
        ONE_RANK: (both, {"judge": judge}),
        OWN_RANKS: (both, {"compact": True}),
    }
    found = {}
    for rank in RANKS:
        size = 2 * sum(rank * (site.out_features + site.in_features) for site in sites)
        for way, (known, settings) in ways.items():
            budget = {"rank": rank} if way in (PLAIN, ONE_SIDED) else {"bytes": size}
            plan, factors = difference_plan(sites, known, **budget, **settings)
            row = f"{way}, the bytes of rank {rank}"
            folder = bench.work / f"{pair.base.name}-{pair.target.name}-{len(found)}"
            adapted = difference_adapter(load_model(pair.base, dense=True), factors)
            save_adapters(adapted, tokenizer, folder, base=pair.base)
            stored = (folder / "adapter_model.safetensors").stat().st_size
            found[row] = folder, {"row": way, "rank": rank, "bytes": stored, "others": len(others)}
            if "judge" in settings:
                found[row][1]["judged"] = plan.calibration.get("measured", {})
            if known is both:
                found[row][1].update(predicted=plan.predicted_loss, without=plan.calibration["loss_without"])
            print(pair.name, row, found[row][1], flush=True)
    return found


def in_llama_cpp(source: Path, pair: Pair, adapter: Path, work: Path) -> dict[str, float]:
    """How far llama.cpp's logits of base and adapter are from PEFT's, relative to what the adapter changes."""
    from llama_cpp import Llama

    base = work / f"{pair.base.name}-dense"
    model, tokenizer = load_model(pair.base, dense=True, dtype=torch.float32), rankfold.load(pair.target)[1]
    rankfold.save(model, tokenizer, base)
    files = [work / "base.gguf", work / "adapter.gguf"]
    for program, given, file in (
        ("convert_hf_to_gguf.py", [base], files[0]),
        ("convert_lora_to_gguf.py", [adapter, "--base", base], files[1]),
    ):
        command = [sys.executable, source / program, *given, "--outtype", "f32", "--outfile", file]
        subprocess.run([str(part) for part in command], check=True, capture_output=True)
    ids = tokenizer("The quick brown fox jumps over the lazy dog, and the dog is not pleased.")["input_ids"]

    def logits(lora: Path | None) -> Tensor:
        loaded = Llama(
            str(files[0]), lora_path=None if lora is None else str(lora), n_ctx=len(ids), logits_all=True, n_threads=1,
            verbose=False,
        )  # fmt: skip
        loaded.eval(ids)
        return torch.tensor(loaded.scores[: len(ids)]).float()

    from peft import PeftModel

    with torch.no_grad():
        before = model(torch.tensor([ids])).logits[0].float()
        theirs = PeftModel.from_pretrained(model, adapter).float()(torch.tensor([ids])).logits[0].float()
    change = float((theirs - before).norm())
    return {
        "llama_cpp_distance": float((logits(files[1]) - theirs).norm()) / change,
        "llama_cpp_distance_of_base": float((logits(None) - before).norm()) / change,
    }


def main() -> None:
    """Make and measure the adapters of every pair that was not measured yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, help="text to calibrate on")
    parser.add_argument("--text", required=True, help="held-out text")
    parser.add_argument("--tune", required=True, help="text of the fine-tune; its last 30 % are held out")
    parser.add_argument("--llama-cpp", type=Path, help="llama.cpp's source, beside an installed llama-cpp-python")
    parser.add_argument("--pairs", nargs="*", default=["NF4", "GPTQ, 3 bits", "fine-tune"])
    results = Results("adapters")
    arguments = parser.parse_args()
    quiet()
    name = Path(arguments.model).name.removesuffix(".gguf")
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        folder = Path(arguments.model)
        if not folder.is_dir():
            model, tokenizer = rankfold.load(arguments.model, dtype=torch.bfloat16)
            folder = work / name
            rankfold.save(model, tokenizer, folder)
        bench = Bench(folder, work, arguments)
        for which in arguments.pairs:
            if results.has("without", base=name, pair=which):
                continue
            pair = bench.pair(which)
            made = adapters(bench, pair)
            if arguments.llama_cpp:
                row = f"{ONE_RANK}, the bytes of rank 8"
                made[row][1].update(in_llama_cpp(arguments.llama_cpp, pair, made[row][0], work))
                print(which, made[row][1], flush=True)
            found: list[Any] = []
            for rank in RANKS:
                chosen = [row for row, (_, facts) in made.items() if facts["rank"] == rank]
                # Dense: bitsandbytes' kernels take three times as long over many tokens, for the same numbers.
                models = {"target": load_model(pair.target), "without": load_model(pair.base, dense=True)}
                models |= {row: load_model(made[row][0], dense=True) for row in chosen}
                found += rankfold.measure(
                    models, rankfold.load(folder)[1], text=pair.text, length=LENGTH, windows=WINDOWS, latency=False
                )
            for record in found:
                context: Any = record.context
                context |= {"base": name, "pair": which, "seed": 0}
                context |= made[record.subject][1] if record.subject in made else {}
                if record.name == "loss":
                    print(which, record.subject, record.value, context.get("interval"), flush=True)
            results.append(found)


if __name__ == "__main__":
    main()
