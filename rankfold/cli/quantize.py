"""`rankfold quantize`: weights and factors in few bits, on top of low rank or alone."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from rankfold.calibration import calibration_windows, default_length, load_corpus, make_batches
from rankfold.checkpoint import load_model, load_tokenizer, save, tokenizer_if_any
from rankfold.circumstances import circumstances
from rankfold.cli.options import Device, Dtype, Model, Overwrite, Seed, to_dtype
from rankfold.cli.terminal import say, stages, write_records
from rankfold.cost import disk_bytes, memory_bytes, parameter_count
from rankfold.errors import InputError
from rankfold.modules import QUANTIZERS, is_linear, quantizer_at, settings_for
from rankfold.quantization import quantize_blocks
from rankfold.recovery import is_quantized
from rankfold.shards import check_target
from rankfold.sites import block_paths

BATCH = 8
"""Windows a batch."""


def quantize(
    model: Model,
    output: Annotated[Path, typer.Argument(help="Folder of the quantized model; written completely or not at all.")],
    scheme: Annotated[
        str,
        typer.Option(
            help=f"One of {', '.join(QUANTIZERS)}: gptq and spqr store 2 to 8 bits, the others use bitsandbytes."
        ),
    ] = "spqr",
    bits: Annotated[
        int | None, typer.Option(help="Bits per weight, for schemes that offer a choice (gptq: 4, spqr: 3).")
    ] = None,
    group: Annotated[int | None, typer.Option(help="Weights that share a scale (gptq: 64, spqr: 16).")] = None,
    outliers: Annotated[float | None, typer.Option(help="Share of the weights kept in 16 bits (spqr: 0.01).")] = None,
    calibration: Annotated[
        str, typer.Option(help="Text to calibrate on: a text or JSONL file, or a data set name.")
    ] = "bundled:calibration",
    sequences: Annotated[int, typer.Option(min=1, help="Sequences of the calibration text.")] = 128,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens per sequence (default: 512, or the model's limit if lower).")
    ] = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
) -> None:
    """Quantize the linear layers of a model, dense layers and factors alike, to 8 bits or fewer."""
    start = time.perf_counter()
    check_target(output, overwrite)
    entry = quantizer_at(scheme)
    settings = settings_for(scheme, {"bits": bits, "group": group, "outliers": outliers})
    corpus = None
    if entry.by_library is None:
        loaded, tokenizer = load_model(model, dtype=to_dtype(dtype), device=device), load_tokenizer(model)
        if is_quantized(loaded):
            raise InputError(f"{model}: already quantized. Quantize the checkpoint that it was made from.")
        before = memory_bytes(loaded)
        corpus = load_corpus(calibration, tokenizer=tokenizer)
        windows, _, _ = calibration_windows(
            loaded, tokenizer, corpus, sequences=sequences, length=length or default_length(loaded.config), seed=seed
        )
        _quantize_blocks(loaded, make_batches(loaded, windows, BATCH), scheme, settings)
    else:
        chosen: Any = to_dtype(dtype)
        before = memory_bytes(load_model(model))
        loaded, summary = entry.by_library(model, settings, device=device, **({"dtype": chosen} if chosen else {}))
        tokenizer = tokenizer_if_any(model)
        say(f"{len(summary.quantized)} layers quantized and tested.")
        if summary.left:
            say(f"{len(summary.left)} layers failed the test and stay in 16 bits, for example {summary.left[0]}.")
        if summary.padded:
            say(f"Factors were padded with {summary.padded:,} zeros, which are stored too.")
    if entry.few(settings) and any(not getattr(module, "tolerates_few_bits", True) for module in loaded.modules()):
        say("Warning: pivoted layers lose a lot at so few bits. For 4 bits or fewer, compress with --form low_rank.")
    save(loaded, tokenizer, output, source=model, overwrite=overwrite)
    stored = disk_bytes(output)
    assert stored is not None, "it was written just now"
    say(f"Checkpoint: {output}   ({time.perf_counter() - start:.1f} s)")
    say(f"Bytes: {before:,} in memory before, {stored:,} on disk now.")
    here = circumstances(loaded, data=corpus, scheme=scheme, settings=asdict(settings), seed=seed)
    values = [("dense_memory", before), ("disk", stored), ("parameters", parameter_count(loaded))]
    units = {"parameters": "1"}
    write_records([here.record(output.name, n, v, units.get(n, "byte")) for n, v in values], output=None)


def _quantize_blocks(model: Any, batches: Any, scheme: str, settings: Any) -> None:
    paths = block_paths(model)
    layers = [m for path in paths for m in model.get_submodule(path).modules() if is_linear(m)]
    with stages() as stage:
        on_step = stage("layers", len(layers))
        bits = quantize_blocks(model, batches, scheme, settings, on_step=on_step)
    average = sum(bits.values()) / len(bits)
    say(f"{len(bits)} of {len(layers)} layers in {average:.2f} bits per weight on average, overhead included.")
    stacks = [p for path in paths for p in model.get_submodule(path).parameters() if p.ndim == 3]
    if stacks:
        say(f"{sum(p.numel() for p in stacks):,} weights in stacks of experts are not quantized: factorize them first.")
    if len(bits) < len(layers):
        say("The other layers are too small for quantization to shrink them.")
