"""The ecosystem's trainer with the loss of distillation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from rankfold.recovery.divergence import divergence


class Distiller(Trainer):
    """A trainer whose loss is the divergence from a teacher, or the next-token loss without one."""

    def __init__(self, teacher: Any, on_step: Callable[[], None], **settings: Any) -> None:
        """The other settings are those of `transformers.Trainer`."""
        super().__init__(callbacks=[EarlyStoppingCallback(early_stopping_patience=3), _Progress(on_step)], **settings)
        self.remove_callback(PrinterCallback)
        self._teacher = teacher

    def compute_loss(  # type: ignore[override]
        self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any
    ) -> Any:
        """Mean over the predicted tokens of the batch, in nats."""
        ids = inputs["input_ids"]
        output = model(input_ids=ids, use_cache=False)
        logits = output.logits[:, :-1]
        if self._teacher is None:
            loss = F.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:])
        else:
            with torch.no_grad():
                expected = self._teacher(input_ids=ids.to(self._teacher.device), use_cache=False).logits[:, :-1]
            loss = divergence(logits, expected)
        return (loss, {"loss": loss}) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """The loss only."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None


class _Progress(TrainerCallback):
    def __init__(self, on_step: Callable[[], None]) -> None:
        self._on_step = on_step

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._on_step()


def arguments(model: Any, work: Path, steps: int, batch_size: int, rate: float, seed: int) -> TrainingArguments:
    """Settings of a short training that keeps its best state and is resumable."""
    every = max(1, steps // 10)
    return TrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        weight_decay=0.0,
        adam_beta2=0.98,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=model.device.type == "cpu",
        dataloader_pin_memory=model.device.type != "cpu",
        seed=seed,
        data_seed=seed,
    )
