"""The main job on the bundled model, offline: compress, save, load again, measure side by side, generate from both."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers

from rankfold.calibration import load_corpus
from rankfold.checkpoint import is_factorized, load_model, load_tokenizer, save
from rankfold.errors import InputError
from rankfold.measure import circumstances, evaluation_windows, measure_latency, measure_quality, measure_size, table
from rankfold.pipeline import Budget, Settings, compress_within, read_text
from rankfold.shards import check_target
from rankfold.sites import find_sites
from rankfold.terminal import print_table, progress, say, stages

MODEL = "pycode-llama"
PROMPT = "def read_lines(path):\n    with open(path) as"


def bundled_model() -> Path:
    """Folder of the bundled model: inside an installed package, or beside it in a checkout.

    Raises:
        ValueError: If neither holds it.
    """
    package = Path(str(files("rankfold")))
    for folder in (package / "models" / MODEL, package.parent / "models" / MODEL):
        if folder.is_dir():
            return folder
    raise InputError(f"The bundled model {MODEL} lies neither in the package nor beside it: install rankfold again.")


def run(output: Path, keep: float) -> None:
    """Compress the bundled model and show what that gained and cost."""
    source = bundled_model()
    overwrite = is_factorized(output)
    check_target(output, overwrite)
    say(f"1/5  Load {MODEL}: a small Llama, trained on Python source.")
    dense, tokenizer = load_model(source), load_tokenizer(source)
    model = load_model(source)
    sites = find_sites(model).select()
    corpus = load_corpus("bundled:calibration")
    budget, settings = Budget(keep=keep), Settings()
    text = read_text(model, tokenizer, corpus, settings, budget, sequences=48, length=256)
    say(f"2/5  Factorize its {len(sites)} linear layers, keeping {keep:.0%} of their parameters.")
    with stages() as stage:
        compress_within(model, sites, budget, settings, text, stage=lambda title, n: stage(f"     {title}", n))
    say("3/5  Save a checkpoint and load it with AutoModelForCausalLM.from_pretrained.")
    save(model, tokenizer, output, overwrite=overwrite)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    say("4/5  Measure both side by side on Python projects that neither training nor calibration saw.")
    models = {"dense": dense, "compressed": loaded}
    held_out = load_corpus("bundled:python-held-out")
    tokens = evaluation_windows(tokenizer, held_out, 256, limit=128)
    records = measure_size(models, {"dense": source, "compressed": output}, circumstances())
    with progress("     windows", 2 * len(tokens) // 8) as advance:
        records += measure_quality(models, tokens, circumstances(data=held_out.name), advance)
    with progress("     latency rounds", 16) as advance:
        records += measure_latency(models, circumstances(), advance)
    say("5/5  Generate from both.")
    for name, current in models.items():
        say(f"--- {name}\n{_generate(current, tokenizer)}")
    print_table(f"{MODEL}, keep {keep:g}, kfac, knapsack", ["", *models, "ratio"], table(records, models))
    if any(record.context.get("contended") for record in records):
        say("Other work slowed this machine down while it was timed: the latency rows are unreliable.")
    say("A model this small is bound by the cost of a call, not of the arithmetic: do not expect it to be faster.")
    say(f"Checkpoint: {output.absolute()}")


def _generate(model: Any, tokenizer: Any) -> str:
    transformers.set_seed(0)
    encoded = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(
            **encoded, max_new_tokens=60, do_sample=True, temperature=0.6, pad_token_id=tokenizer.pad_token_id
        )
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))
