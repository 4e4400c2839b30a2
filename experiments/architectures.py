"""Every language model type of transformers, made tiny, through disk and back: compressed, loaded, exported.

    python experiments/architectures.py            # what is not in the results yet, and the page
    python experiments/architectures.py llama t5   # only these types, printed

An interrupted run resumes. The results hold a row for each type, kind of head and version of transformers.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from tiny_models import HEADS, NotTinyError, first_line, pairs, text_inputs, tiny_model
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from rankfold.checkpoint import export_dense, load_model, save
from rankfold.pipeline import compress
from rankfold.sites import find_sites, text_arguments

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "architectures.jsonl"
PAGE = ROOT / "docs" / "architectures.md"
WORKS, REFUSED, NOT_TINY, FAILS = "works", "refused before work", "cannot be made tiny", "fails"
_ASKS = re.compile("missing|specify|has to be|required")
SECONDS = 180
"""A type that takes longer has failed."""

SAMPLE = (
    ("llama", "causal"), ("gemma3", "image-text-to-text"), ("gemma3n_text", "causal"), ("mixtral", "causal"),
    ("qwen3_moe", "causal"), ("olmoe", "causal"), ("deepseek_v3", "causal"), ("glm4_moe", "causal"),
    ("granitemoe", "causal"), ("phimoe", "causal"), ("falcon_h1", "causal"), ("mamba", "causal"), ("exaone", "causal"),
    ("openai-gpt", "causal"), ("xlm", "masked"), ("nomic_bert", "masked"), ("bert", "classification"),
    ("canine", "classification"), ("t5", "sequence to sequence"), ("bart", "sequence to sequence"),
    ("llava", "image-text-to-text"), ("qwen2_vl", "image-text-to-text"), ("smolvlm", "image-text-to-text"),
    ("whisper", "speech"), ("moonshine", "speech"),
)  # fmt: skip
"""What the tests run: one of each kind of difficulty that was met."""


class _WrongError(Exception):
    """A model that came back as another."""


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Logits for a few fixed tokens."""
    result: torch.Tensor = model(**text_arguments(model, text_inputs(model)["input_ids"])).logits
    return result


def check_same(what: str, expected: torch.Tensor, model: Any) -> None:
    """Compare a model's logits with those that were expected."""
    found = logits(model.eval())
    difference, size = float((found - expected).abs().max()), float(expected.abs().max())
    if not difference <= 2e-3 * max(1.0, size):
        raise _WrongError(f"{what}: logits differ by {difference:.3g}, of {size:.3g} at most")


def tried(model_type: str, head: str) -> tuple[str, str]:
    """What becomes of one type: an outcome and its reason."""
    with tempfile.TemporaryDirectory() as folder:
        source, auto = Path(folder) / "source", getattr(transformers, HEADS[head][0])
        try:
            model = tiny_model(model_type, head)
            model.save_pretrained(source)
            expected = logits(model)
            check_same("loaded by transformers", expected, auto.from_pretrained(source, dtype="auto"))
        except NotTinyError as error:
            return NOT_TINY, str(error)
        except Exception as error:  # whatever the stock model makes of its own checkpoint is the reason
            if isinstance(error, (TypeError, ValueError)) and re.search(
                r"missing|specify|has to be|required", str(error)
            ):
                return REFUSED, f"text alone cannot run it: {first_line(error)}"
            return NOT_TINY, f"the stock model does not run or come back: {first_line(error)}"
        return _round_trips(source, auto, expected)


def _round_trips(source: Path, auto: Any, expected: torch.Tensor) -> tuple[str, str]:
    step = "loading"
    try:
        check_same("loaded", expected, load_model(source))
        for method in ("svd", "kfac"):
            step = method
            out = source.with_name(method)
            model = load_model(source)
            sites = find_sites(model).select()
            if not len(sites):
                return REFUSED, "no layer in its blocks is an nn.Linear or a Conv1D that text reaches"
            before = sum(part.numel() for part in model.parameters())
            _compress(model, sites, method)
            if method == "svd" and not sum(part.numel() for part in model.parameters()) < before:
                return FAILS, "compression made it no smaller"
            save(model, None, out)
            compressed = logits(model)
            check_same(f"{method}, loaded again", compressed, load_model(out))
        step = "the folder's own code"
        _check_own_code(out, auto, compressed)
        step = "generating"
        loaded = load_model(out)
        if loaded.can_generate() and _stock_generates(auto.from_pretrained(source)):
            _generate(loaded)
        step = "the dense export"
        export_dense(loaded, None, source.with_name("dense"))
        check_same(step, compressed, auto.from_pretrained(source.with_name("dense"), dtype="auto"))
    except Exception as error:  # what any step raises is a result
        if "gives no gradients in evaluation mode" in str(error):
            return REFUSED, f"for kfac; svd works: {first_line(error)}"
        return FAILS, f"{step}: {first_line(error)}"
    return WORKS, ""


def _generate(model: Any) -> None:
    read = text_arguments(model, text_inputs(model)["input_ids"])
    read.pop("decoder_input_ids", None)
    model.generate(**read, max_new_tokens=3, do_sample=False)


def _stock_generates(model: Any) -> bool:
    try:
        _generate(model.eval())
    except Exception:  # some tiny stock models do not, for reasons of their own
        return False
    return True


def _compress(model: Any, sites: Any, method: str) -> None:
    ids = torch.cat([text_inputs(model, length=16, batch=4, seed=seed)["input_ids"] for seed in range(4)])
    compress(model, keep=0.6, sites=sites, method=method, text=ids)


def _check_own_code(folder: Path, auto: Any, expected: torch.Tensor) -> None:
    """Load with the code that lies in the folder, as `trust_remote_code=True` does where rankfold is not installed."""
    config = json.loads((folder / "config.json").read_text())
    made = get_class_from_dynamic_module(config["auto_map"][auto.__name__], str(folder))
    model, info = made.from_pretrained(folder, dtype="auto", output_loading_info=True)
    if info["missing_keys"]:
        raise _WrongError(f"missing {sorted(info['missing_keys'])[:2]}")
    check_same("the folder's own code", expected, model)


def run_all(todo: list[tuple[str, str]], workers: int = 2) -> Iterator[tuple[str, str, str, str, float]]:
    """Outcomes as they come, each from a process of its own, since a type may crash or never end."""
    context = multiprocessing.get_context("fork")
    for first in (("llama", "causal"), ("t5", "sequence to sequence"), ("llava", "image-text-to-text")):
        # What all types need is imported once, here, and not by every process.
        tiny_model(*first)
    running: dict[Any, tuple[tuple[str, str], Any, float]] = {}
    waiting = list(todo)
    while waiting or running:
        while waiting and len(running) < workers:
            pair = waiting.pop(0)
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_send, args=(tried, pair, there), daemon=True)
            process.start()
            there.close()
            running[here] = (pair, process, time.monotonic())
        for here in wait(list(running), timeout=1):
            pair, process, start = running.pop(here)
            try:
                outcome, reason = here.recv()  # type: ignore[union-attr]
            except EOFError:
                outcome, reason = FAILS, "the process died"
            process.join()
            yield (*pair, outcome, reason, time.monotonic() - start)
        for here, (pair, process, start) in list(running.items()):
            if time.monotonic() - start > SECONDS:
                process.kill()
                del running[here]
                yield (*pair, FAILS, f"took more than {SECONDS} s", time.monotonic() - start)


def _send(work: Callable[..., Any], pair: tuple[str, str], there: Connection) -> None:
    there.send(work(*pair))


def page(rows: list[dict[str, Any]]) -> str:
    """The page: what works, what is refused, what was not tried, by version and kind of head."""
    text = [
        "# Architectures\n",
        "Written by `make architectures` (`experiments/architectures.py`). Every model type that transformers lists "
        "for "
        "these kinds of head is made tiny from its own configuration, with random weights, saved by transformers, "
        "loaded, compressed with `svd` and with the default `kfac` (keep 0.6), saved, loaded again with rankfold and "
        "with the code in the folder, exported dense and loaded with transformers; the logits must agree each time, "
        "and models that generate write three tokens. Tiny random models show that a checkpoint survives, not how good "
        "it is.\n",
        "A type is refused before any work where text alone cannot run it, or where nothing in it is a linear layer. "
        "Where a type cannot be made tiny, its real checkpoints were not tried.\n",
    ]
    for version in sorted({row["transformers"] for row in rows}, key=lambda v: [int(n) for n in v.split(".")[:2]]):
        here = [row for row in rows if row["transformers"] == version]
        text.append(f"\n## transformers {version}\n")
        text.append(f"| head | {' | '.join(OUTCOMES)} |\n|---|{'---|' * len(OUTCOMES)}")
        for head in [*HEADS, "all"]:
            counts = Counter(row["outcome"] for row in here if head in (row["head"], "all"))
            text.append(f"| {head} | {' | '.join(str(counts[outcome]) for outcome in OUTCOMES)} |")
        made = [row for row in here if row["outcome"] != NOT_TINY]
        works = sum(row["outcome"] == WORKS for row in made)
        text.append(f"\nOf {len(made)} that can be made tiny, {works} work ({works / max(1, len(made)):.1%}).\n")
        for outcome in (FAILS, REFUSED, NOT_TINY):
            chosen = sorted((r["type"], r["head"], r["reason"]) for r in here if r["outcome"] == outcome)
            if chosen:
                text.append(f"\n### {outcome.capitalize()}\n")
                text.append("| type | head | because |\n|---|---|---|")
                text += [f"| {kind} | {head} | {_cell(reason)} |" for kind, head, reason in chosen]
        text.append("\n### Works\n")
        for head in HEADS:
            names = sorted(row["type"] for row in here if row["outcome"] == WORKS and row["head"] == head)
            text.append(f"- **{head}**: {', '.join(names)}")
    return "\n".join(text) + "\n"


OUTCOMES = (WORKS, REFUSED, FAILS, NOT_TINY)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")[:220]


def main() -> None:
    """Try what is not known yet, and write the page."""
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    version, names = transformers.__version__, sys.argv[1:]
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    known = {(row["type"], row["head"]) for row in rows if row["transformers"] == version}
    todo = [pair for pair in pairs() if (pair[0] in names if names else pair not in known)]
    with Path(os.devnull if names else RESULTS).open("a") as file:
        for number, (model_type, head, outcome, reason, seconds) in enumerate(run_all(todo), start=1):
            row = {"transformers": version, "torch": torch.__version__, "type": model_type, "head": head}
            rows.append({**row, "outcome": outcome, "reason": reason})
            file.write(json.dumps(rows[-1]) + "\n")
            file.flush()
            print(f"{number}/{len(todo)} {model_type}, {head}: {outcome} {reason} ({seconds:.0f} s)", flush=True)
    if not names:
        PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
