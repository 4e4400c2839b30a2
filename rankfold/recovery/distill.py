"""Recovery of the whole model by the ecosystem's trainer: against its dense teacher, or on text alone."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from rankfold.errors import InputError
from rankfold.modules import GroupLinear, QuantizedLinear
from rankfold.progress import Step, no_step
from rankfold.sites import vocabulary_size

OBJECTIVES = ("kl", "next-token")


@dataclass(frozen=True)
class Recovered:
    """What recovery reached, in nats per token on the held-out windows: divergence from the teacher, or loss."""

    before: float
    after: float
    steps: int
    adapters: Any = None
    """For a quantized model, the PEFT model whose adapters were trained."""


def recover(  # noqa: PLR0913
    model: Any,
    teacher: Any,
    batches: Tensor | Sequence[Mapping[str, Tensor]],
    held_out: Tensor | None = None,
    *,
    work: Path | None = None,
    objective: str = "kl",
    steps: int = 500,
    batch_size: int = 16,
    rate: float | None = None,
    lora_rank: int | None = None,
    seed: int = 0,
    on_step: Step = no_step,
) -> Recovered:
    """Train a compressed causal language model, in place, and keep the state that does best on held-out text.

    Layers in groups of few bits, factors and compensations among them, keep their codes and zero points and train their
    scales (PEQA, arXiv:2305.14152) beside all that is not in few bits, so nothing that is stored grows. A model that a
    library quantized trains adapters only (QLoRA, arXiv:2305.14314); they are not merged, and `result.adapters` holds
    the model with them, to be saved separately.

    With `kl` every token's distribution is pulled towards the dense teacher's (Hinton et al. 2015, arXiv:1503.02531);
    with `next-token` no teacher is needed. The Hugging Face Trainer does the work: an interrupted run resumes from its
    last checkpoint in `work`, and it stops early when held-out text has not improved for three evaluations.

    Args:
        model: The compressed model.
        teacher: The dense model, or `None` for `next-token`.
        batches: Token ids to train on (windows, length), or batches with `input_ids` of one length.
        held_out: Token ids for validation; by default the last tenth of the windows is held out.
        work: Folder of the trainer's checkpoints, from which an interrupted run resumes; the caller removes it.
            By default a temporary folder.
        objective: What is minimized.
        steps: Maximum number of optimizer steps.
        batch_size: Windows per step.
        rate: Learning rate; by default chosen from the width of the model.
        lora_rank: Trains LoRA adapters of this rank instead of all parameters, and merges them where they can be.
        seed: Seed of the order of windows.
        on_step: Called after each step.

    Raises:
        ValueError: If the objective is unknown, the teacher is missing, the two vocabularies differ, or the weights
            are quantized in a way that does not train as asked.
    """
    if work is None:
        with tempfile.TemporaryDirectory() as folder:
            return recover(
                model, teacher, batches, held_out, work=Path(folder), objective=objective, steps=steps,
                batch_size=batch_size, rate=rate, lora_rank=lora_rank, seed=seed, on_step=on_step,
            )  # fmt: skip
    windows, held_out = _windows(batches, held_out)
    quantized = is_quantized(model)
    _check(model, teacher, objective, adapters=lora_rank is not None)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = model.training
    start = {} if lora_rank else {name: part.clone() for name, part in model.state_dict().items()}
    trained = _with_adapters(model, lora_rank) if lora_rank else model
    # Here, since the trainer brings datasets and PEFT with it: seconds for a command that trains nothing.
    from transformers.trainer_utils import get_last_checkpoint

    from rankfold.recovery.distiller import Distiller, arguments

    with nullcontext() if lora_rank else _training_scales(model):
        if not lora_rank:
            model.requires_grad_(True)
        trainer = Distiller(
            teacher if objective == "kl" else None,
            on_step,
            model=trained,
            args=arguments(model, work, steps, batch_size, rate or _rate(model, lora_rank), seed),
            train_dataset=_rows(windows),
            eval_dataset=_rows(held_out),
        )
        before = trainer.evaluate()["eval_loss"]
        work.mkdir(parents=True, exist_ok=True)
        _remove_incomplete(work)
        result = trainer.train(resume_from_checkpoint=get_last_checkpoint(str(work)))  # type: ignore[no-untyped-call]
    # With scales as they are stored.
    after = trainer.evaluate()["eval_loss"]
    if after > before:
        # The start is a candidate too: adapters that give nothing are those at zero.
        if lora_rank:
            for name, parameter in trained.named_parameters():
                if "lora_B" in name:
                    parameter.data.zero_()
        else:
            model.load_state_dict(start)
        after = before
    if lora_rank and not quantized:
        trained.merge_and_unload()
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    model.train(training)
    return Recovered(before, after, result.global_step, trained.eval() if quantized and lora_rank else None)


def _check(model: Any, teacher: Any, objective: str, adapters: bool) -> None:
    """Refuse what cannot be trained, before anything is."""
    if objective not in OBJECTIVES:
        raise InputError(f"The objective must be `kl` or `next-token`, but got {objective!r}.")
    if objective == "kl" and teacher is None:
        raise InputError("Recovery by divergence needs the dense model as teacher: pass it, or ask for next-token.")
    if objective == "kl" and vocabulary_size(teacher) != vocabulary_size(model):
        raise InputError(
            f"Teacher and model must share a vocabulary, but have {vocabulary_size(teacher)} and "
            f"{vocabulary_size(model)} tokens."
        )
    if not adapters and (_by_library(model) or _few_bits(model, besides=GroupLinear)):
        raise InputError("Quantized weights cannot take gradient steps: train adapters over them, with `lora` 8.")


@contextmanager
def _training_scales(model: Any) -> Iterator[None]:
    """Let gradients reach the scales of all layers in groups; what they have become is stored at the end."""
    layers = [module for module in model.modules() if isinstance(module, GroupLinear)]
    for layer in layers:
        layer.train_scales()
    try:
        yield
    finally:
        for layer in layers:
            layer.round_scales()


def is_quantized(model: Any) -> bool:
    """Whether weights of the model are in few bits, by bitsandbytes or in layers of ours."""
    return _by_library(model) or _few_bits(model)


def _by_library(model: Any) -> bool:
    return getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)


def _few_bits(model: Any, besides: tuple[type, ...] | type = ()) -> bool:
    """Whether the model has layers of ours in few bits, besides those of a type."""
    return any(isinstance(module, QuantizedLinear) and not isinstance(module, besides) for module in model.modules())


def _remove_incomplete(work: Path) -> None:
    """Remove checkpoints that a kill left half-written: the trainer's state is what it writes last."""
    for folder in work.glob("checkpoint-*"):
        try:
            json.loads((folder / "trainer_state.json").read_text())
        except (OSError, ValueError):
            shutil.rmtree(folder)


def _rate(model: Any, lora_rank: int | None) -> float:
    """Learning rate for the width: weights, and the steps that suit them, shrink with its square root."""
    width = model.get_input_embeddings().weight.shape[1]
    return float((0.04 if lora_rank else 0.016) / width**0.5)


def _windows(batches: Tensor | Sequence[Mapping[str, Tensor]], held_out: Tensor | None) -> tuple[Tensor, Tensor]:
    """Token ids to train on and to decide on, as tables; the last tenth is kept apart where nothing else is."""
    if isinstance(batches, Tensor):
        windows = batches
    elif len({batch["input_ids"].shape[-1] for batch in batches}) == 1:
        windows = torch.cat([batch["input_ids"] for batch in batches]).cpu()
    else:
        raise InputError("Recovery trains on windows of one length: give at least one batch, all of the same length.")
    if held_out is not None:
        return windows, held_out
    if len(windows) < 2:
        raise InputError(f"Recovery needs windows for training and for validation, but got {len(windows)} in all.")
    cut = max(1, len(windows) // 10)
    return windows[:-cut], windows[-cut:]


def _rows(windows: Int[Tensor, "windows length"]) -> list[dict[str, Tensor]]:
    return [{"input_ids": window} for window in windows]


def _with_adapters(model: Any, rank: int) -> Any:
    """LoRA beside every linear layer of the blocks, factors included."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise InputError("Training adapters needs PEFT: pip install 'rankfold[recovery]'") from error
    if _few_bits(model, besides=GroupLinear):
        raise InputError("PEFT cannot train adapters over SpQR layers: quantize with `scheme` nf4 or int8 for that.")
    if _few_bits(model):
        raise InputError(
            "PEFT cannot train adapters over layers in groups of few bits: recover without `lora`, which trains their "
            "scales, or quantize with `scheme` nf4 or int8."
        )
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=names, lora_dropout=0.0))
