"""`rankfold recover`: training gives back what compression took."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from rankfold.calibration import check_length, default_length
from rankfold.checkpoint import load_model, load_tokenizer, quantized_by_library, save, save_adapters, stored_dtype
from rankfold.circumstances import circumstances
from rankfold.cli.options import Device, Dtype, Overwrite, Seed, is_decoder, to_dtype
from rankfold.cli.terminal import keeps, say, stages, write_records
from rankfold.errors import InputError
from rankfold.fingerprint import fingerprint
from rankfold.recovery import GENERATED, recovery_windows
from rankfold.recovery import recover as recover_model
from rankfold.shards import check_target

MOST_WINDOWS = 4096
"""Windows that recovery trains on at most; more steps read them again."""


def recover(
    model: Annotated[str, typer.Argument(help="Folder of the compressed model.")],
    output: Annotated[Path, typer.Argument(help="Folder of the recovered model; written completely or not at all.")],
    dense: Annotated[str | None, typer.Option(help="The dense model, whose predictions are the target.")] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to train on: a file, a data set name, or 'generated' (by the dense model); repeat to mix "
            "(default: bundled:calibration)."
        ),
    ] = None,
    objective: Annotated[str, typer.Option(help="kl (to the dense model) or next-token.")] = "kl",
    steps: Annotated[int, typer.Option(min=1, help="Maximum optimizer steps; training may stop early.")] = 500,
    batch: Annotated[int, typer.Option(min=1, help="Windows per step.")] = 16,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens per window (default: 512, or the model's limit if lower).")
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Learning rate (default: one that suits the width).")] = None,
    lora: Annotated[
        int | None,
        typer.Option(min=1, help="Train LoRA adapters of this rank and merge them; over quantized weights, save them."),
    ] = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
) -> None:
    """Train a compressed model to match its dense original; an interrupted run resumes."""
    check_target(output, overwrite)
    texts = text or ["bundled:calibration"]
    if objective == "kl" and dense is None:
        raise InputError("--objective kl needs the dense model: pass --dense, or use --objective next-token.")
    # 16-bit weights cannot take small steps: they are trained in float32 and rounded when they are saved.
    # Under adapters the weights stay as they are.
    exact = None if quantized_by_library(model) else torch.float32
    loaded, tokenizer = load_model(model, dtype=exact, device=device), load_tokenizer(model)
    stored = to_dtype(dtype) or stored_dtype(model)
    _check_decoder(loaded)
    teacher = load_model(dense, dtype=to_dtype(dtype), device=device) if dense is not None else None
    length = length or default_length(loaded.config)
    check_length(loaded, length)
    count = min(steps * batch, MOST_WINDOWS)
    with stages() as stage:
        windows, held_out = recovery_windows(
            loaded, teacher, tokenizer, texts, count=count, length=length, seed=seed, stage=stage
        )
        advance = stage("training", steps)
        folder = output.with_name(f".{output.name}.recovery")
        keeps(f"nothing was written to {output}; the same command resumes from the last checkpoint in {folder}.")
        work = folder / fingerprint(loaded, teacher, windows, objective, steps, batch, rate, lora, seed)
        result = recover_model(
            loaded,
            teacher,
            windows,
            held_out,
            work=work,
            objective=objective,
            steps=steps,
            batch_size=batch,
            rate=rate,
            lora_rank=lora,
            seed=seed,
            on_step=advance,
        )
    given = [name for name in texts if name != GENERATED]
    if hasattr(loaded.config, "rankfold") and given:
        facts = {**loaded.config.rankfold["calibration"], "recovery_text": given}
        loaded.config.rankfold = {**loaded.config.rankfold, "calibration": facts}
    if result.adapters is not None:
        save_adapters(result.adapters, tokenizer, output, base=model, overwrite=overwrite)
    else:
        save(loaded.to(stored), tokenizer, output, source=model, overwrite=overwrite)
    shutil.rmtree(folder, ignore_errors=True)
    what = "divergence from the dense model" if objective == "kl" else "loss"
    say(f"Held-out {what}: {result.before:.4f} -> {result.after:.4f} nat/token in {result.steps} steps.")
    say(f"Checkpoint: {output}")
    facts = {"objective": objective, "lora_rank": lora, "data_sha256": fingerprint(windows)}
    here = circumstances(loaded, data=", ".join(texts), seed=seed, **facts)
    values = [("held_out_before", result.before, "nat/token"), ("held_out_after", result.after, "nat/token")]
    values += [("steps", result.steps, "1")]
    write_records([here.record(output.name, *row) for row in values], output=None)


def _check_decoder(model: Any) -> None:
    if not is_decoder([model]):
        raise InputError(f"Recovery trains on next-token distributions, which a {type(model).__name__} does not have.")
