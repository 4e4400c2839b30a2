"""What the experiments on LoRD (arXiv:2309.14021) share: models, text, and what they are measured on."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

import torch
from results import RESULTS, ROOT, Results, quiet
from torch import Tensor

from rankfold import compress
from rankfold.calibration import load_corpus, make_batches, random_windows, token_stream
from rankfold.checkpoint import load_model, load_tokenizer
from rankfold.circumstances import Circumstances, circumstances
from rankfold.measurement import evaluation_windows
from rankfold.quality import Quality, next_token_quality

__all__ = ["DOWN", "MODELS", "RESULTS", "ROOT", "Results", "Subject", "quiet"]

MODELS = ("pycode-starcoder", "pycode-llama", "pycode-codegen")
DOWN = {"pycode-starcoder": "mlp.c_proj", "pycode-llama": "mlp.down_proj", "pycode-codegen": "mlp.fc_out"}
"""The down-projection of each model."""


class Subject:
    """A bundled model, calibrated on the bundled sample and measured on held-out Python."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.folder = ROOT / "models" / name
        self.tokenizer = load_tokenizer(self.folder)
        self.held_out_texts = load_corpus("bundled:python-held-out").texts

    @cached_property
    def dense(self) -> Any:
        """The model in float32; `load` gives copies."""
        return load_model(self.folder, dtype=torch.float32)

    def load(self) -> Any:
        """A fresh copy."""
        return copy.deepcopy(self.dense)

    @cached_property
    def stream(self) -> Tensor:
        """The tokens of the calibration text."""
        return token_stream(self.tokenizer, load_corpus("bundled:calibration").texts)

    @cached_property
    def windows(self) -> Tensor:
        """128 x 256 tokens to calibrate on, seed 0."""
        return random_windows(self.stream, 128, 256, 0)

    @cached_property
    def batches(self) -> list[dict[str, Tensor]]:
        """The same as batches."""
        return make_batches(self.dense, self.windows, 32)

    @cached_property
    def held_out(self) -> Tensor:
        """Windows of held-out Python."""
        return evaluation_windows(self.tokenizer, load_corpus("bundled:python-held-out"), 256, 128)

    def quality(self, model: Any) -> Quality:
        """The next-token loss on held-out Python."""
        return next_token_quality(model, self.held_out, batch_size=32)

    @cached_property
    def context(self) -> Circumstances:
        """What every record of this subject depends on."""
        data = load_corpus("bundled:python-held-out")
        return circumstances(self.dense, data=data, seed=0, calibration="bundled:calibration, 128 x 256 tokens")

    def lord(self, rank: int, kind: str | None = None) -> Any:
        """LoRD of the down-projections, as the paper publishes it."""
        return self.compressed(rank=rank, method="lord", sites=[kind or DOWN[self.name]])

    def rankfold(self, keep: float, form: str | None = None) -> Any:
        """`rankfold compress --effort best`, in the default form or another."""
        return self.compressed(keep=keep, form=form, effort="best")

    def compressed(self, **choices: Any) -> Any:
        """A copy of the model after the one call that users make."""
        model = self.load()
        compress(model, self.tokenizer, text=self.windows, batch_size=32, **choices)
        return model
