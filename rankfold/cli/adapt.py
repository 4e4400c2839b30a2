"""`rankfold adapt`: the difference between two checkpoints as a LoRA adapter."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from rankfold.calibration import calibrate, calibration_windows, default_length, load_corpus, make_batches, usual_loss
from rankfold.checkpoint import load_model, load_tokenizer, save_adapters, tokenizer_if_any
from rankfold.circumstances import circumstances
from rankfold.cli.options import Device, Overwrite, Seed, SiteNames, is_decoder
from rankfold.cli.terminal import print_table, say, stages, write_records
from rankfold.errors import InputError
from rankfold.modules import QuantizedLinear
from rankfold.pipeline import parse_bytes
from rankfold.plan import Plan
from rankfold.recovery import (
    check_relatives,
    difference_adapter,
    difference_plan,
    differences,
    remaining_divergence,
)
from rankfold.shards import check_target
from rankfold.sites import Sites, find_sites

BATCH = 8
"""Windows a batch."""

HELD_OUT = 8
"""Windows of the calibration text's end on which ranks are compared."""


def adapt(
    base: Annotated[str, typer.Argument(help="The model that will carry the adapter, for example a quantized one.")],
    target: Annotated[str, typer.Argument(help="The model that it shall come near to: the original, or a fine-tune.")],
    output: Annotated[Path, typer.Argument(help="Folder of the adapter; written completely or not at all.")],
    bytes_: Annotated[
        str | None, typer.Option("--bytes", help="Bytes of the adapter's numbers over all layers, such as 4MB.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="One rank for all layers, instead.")] = None,
    compact: Annotated[
        bool,
        typer.Option(help="Choose a rank for each layer: better at equal bytes, but only PEFT scales it rightly."),
    ] = False,
    leave_others: Annotated[
        bool, typer.Option(help="Accept that embeddings, norms, biases and heads stay as the base has them.")
    ] = False,
    sites: SiteNames = None,
    calibration: Annotated[
        str, typer.Option(help="Text to calibrate on: a text or JSONL file, or a data set name.")
    ] = "bundled:calibration",
    sequences: Annotated[int, typer.Option(min=2, help="Sequences of the calibration text.")] = 128,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens per sequence (default: 512, or the model's limit if lower).")
    ] = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Write the difference between two models as a LoRA adapter, its bytes shared out by predicted loss."""
    check_target(output, overwrite)
    if (bytes_ is None) == (rank is None):
        raise InputError("Pass exactly one of --bytes, for the whole adapter, and --rank, for each layer.")
    budget = None if bytes_ is None else parse_bytes(bytes_)
    wanted, tokenizer = load_model(target, device=device, dense=True), load_tokenizer(target)
    carrier = load_model(base, device=device, dense=True)
    _check_base(base, carrier, tokenizer)
    chosen = find_sites(wanted).select(sites or ())
    others = check_relatives(carrier, wanted, chosen, leave_others)
    if others:
        say(f"{len(others)} weights outside of the adapter stay as the base has them, for example {others[0]}.")
    corpus = load_corpus(calibration, tokenizer=tokenizer)
    drawn = partial(
        calibration_windows, wanted, tokenizer, corpus, sequences=sequences,
        length=length or default_length(wanted.config), seed=seed,
    )  # fmt: skip
    held_out = None
    if budget is not None and not compact and is_decoder([wanted]):
        # What decides between ranks is read from text that no moment was measured on.
        with suppress(InputError):
            windows, held_out, _ = drawn(held_out=HELD_OUT)
        if held_out is None:
            say("The calibration text is too short to keep some apart: predicted losses choose the rank.")
    if held_out is None:
        windows, _, _ = drawn()
    batches = make_batches(wanted, windows, BATCH)
    with stages() as stage:
        passes = 2 * len({site.block for site in chosen}) + 1
        advance = stage("measuring inputs and gradients", passes * len(batches))
        loss = usual_loss(wanted, batches, seed)
        statistics = calibrate(wanted, chosen, batches, loss=loss, on_step=advance)
    found = differences(carrier, wanted, chosen, statistics)
    judge = None
    if held_out is not None:
        say(f"Measuring which rank leaves least, on {len(held_out)} windows kept apart from the calibration text.")
        judge = remaining_divergence(carrier, wanted, held_out)
    plan, factors = difference_plan(chosen, found, bytes=budget, rank=rank, compact=compact, judge=judge)
    adapted = difference_adapter(carrier, factors)
    save_adapters(adapted, tokenizer, output, base=base, overwrite=overwrite)
    _report(output, plan, chosen)
    here = circumstances(wanted, data=corpus, base=base, seed=seed)
    write_records([here.record(output.name, "adapter", plan.bytes, "byte")], output=None)


def _check_base(name: str, base: Any, tokenizer: Any) -> None:
    """Whether a base can carry an adapter, and reads the same tokens."""
    if hasattr(base, "peft_config"):
        raise InputError(f"{name}: an adapter cannot carry another one. Merge it into its base first, and adapt that.")
    if any(isinstance(module, QuantizedLinear) for module in base.modules()):
        raise InputError(
            f"{name}: PEFT does not know rankfold's layers in few bits. Export it with rankfold export --dense, or let "
            "rankfold compress --bits compensate what rounding costs."
        )
    own = tokenizer_if_any(name)
    if own is not None and own.get_vocab() != tokenizer.get_vocab():
        raise InputError(f"{name}: base and target must read the same tokens, but their tokenizers differ.")


def _report(output: Path, plan: Plan, sites: Sites) -> None:
    ranks = {option.sites[0]: option.ranks[0] for option in plan.options}
    kinds: dict[str, list[int]] = {}
    for site in sites:
        kinds.setdefault(site.kind, []).append(ranks[site.name])
    rows = [[kind, str(len(found)), f"{min(found)}..{max(found)}"] for kind, found in kinds.items()]
    print_table("adapter", ["kind", "sites", "rank"], rows)
    before, after = plan.calibration["loss_without"], plan.predicted_loss
    say(f"Predicted distance of the base from the target: {before:.4f} nat/token; with the adapter: {after:.4f}")
    if "measured" in plan.calibration:
        tried = ", ".join(f"{rank}: {left:.4f}" for rank, left in plan.calibration["measured"].items())
        say(f"Measured divergence from the target with ranks up to {tried} nat/token; the least was taken")
    say(f"Adapter: {output}, {plan.bytes:,} bytes of numbers")
    say(f"Next: rankfold measure {output} --dense TARGET --text TEXT")
