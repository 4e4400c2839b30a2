"""`rankfold demo`: the main job on the bundled model, offline, from compression to text from both models."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer

from rankfold.calibration import load_corpus
from rankfold.checkpoint import is_factorized, load_model, load_tokenizer, save
from rankfold.circumstances import circumstances
from rankfold.cli.terminal import print_table, progress, say, stages
from rankfold.errors import InputError
from rankfold.measurement import (
    evaluation_windows,
    measure_latency,
    measure_quality,
    measure_size,
    table,
)
from rankfold.pipeline import compress
from rankfold.shards import check_target
from rankfold.sites import find_sites

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
    raise InputError(f"The bundled model {MODEL} is neither in the package nor beside it: reinstall rankfold.")


def demo(
    output: Annotated[Path, typer.Argument(help="Folder of the compressed model.")] = Path("demo-checkpoint"),
    keep: Annotated[float, typer.Option(help="Fraction of the sites' parameters to keep.")] = 0.8,
) -> None:
    """Run the main workflow on the bundled model, offline: compress, save, load, measure side by side, generate."""
    source = bundled_model()
    overwrite = is_factorized(output)
    check_target(output, overwrite)
    say(f"1/5  Load {MODEL}: a small Llama, trained on Python source.")
    dense, tokenizer = load_model(source), load_tokenizer(source)
    model = load_model(source)
    sites = find_sites(model).select()
    say(f"2/5  Factorize its {len(sites)} linear layers, keeping {keep:.0%} of their parameters.")
    with stages() as stage:
        compress(
            model, tokenizer, keep=keep, sites=sites, sequences=48, length=256,
            stage=lambda title, n: stage(f"     {title}", n),
        )  # fmt: skip
    say("3/5  Save a checkpoint and load it with AutoModelForCausalLM.from_pretrained.")
    save(model, tokenizer, output, overwrite=overwrite)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    say("4/5  Measure both side by side on Python projects used in neither training nor calibration.")
    models = {"dense": dense, "compressed": loaded}
    held_out = load_corpus("bundled:python-held-out")
    tokens = evaluation_windows(tokenizer, held_out, 256, limit=128)
    here = circumstances(models, data=held_out, seed=0)
    records = measure_size(models, {"dense": source, "compressed": output}, here)
    with progress("     windows", 2 * len(tokens) // 8) as advance:
        records += measure_quality(models, tokens, here, advance)
    with progress("     latency rounds", 16) as advance:
        records += measure_latency(models, here, advance)
    say("5/5  Generate from both.")
    for name, current in models.items():
        say(f"--- {name}\n{_generate(current, tokenizer)}")
    print_table(f"{MODEL}, keep {keep:g}, kfac, knapsack", ["", *models, "ratio"], table(records, models))
    if any(record.context.get("contended") for record in records):
        say("Other processes slowed this machine down during timing: the latency rows are unreliable.")
    say("A model this small is limited by call overhead, not by arithmetic: do not expect it to be faster.")
    say(f"Checkpoint: {output.absolute()}")


def _generate(model: Any, tokenizer: Any) -> str:
    transformers.set_seed(0)
    encoded = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(
            **encoded, max_new_tokens=60, do_sample=True, temperature=0.6, pad_token_id=tokenizer.pad_token_id
        )
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))
