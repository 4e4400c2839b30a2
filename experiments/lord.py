"""What the experiments on LoRD (arXiv:2309.14021) share: models, text, and a results file that is gone on with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankfold import Record, allocate, calibrate, compress, find_sites
from rankfold.calibration import load_corpus, make_batches, random_windows, summed_loss, token_stream
from rankfold.checkpoint import load_model, load_tokenizer
from rankfold.compression import compress_in_rounds
from rankfold.measure import circumstances, evaluation_windows
from rankfold.quality import Quality, next_token_quality

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
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
    def batches(self) -> list[dict[str, Tensor]]:
        """128 x 256 tokens to calibrate on, seed 0."""
        return make_batches(self.dense, random_windows(self.stream, 128, 256, 0), 32)

    @cached_property
    def held_out(self) -> Tensor:
        """Windows of held-out Python."""
        return evaluation_windows(self.tokenizer, load_corpus("bundled:python-held-out"), 256, 128)

    def quality(self, model: Any) -> Quality:
        """The next-token loss on held-out Python."""
        return next_token_quality(model, self.held_out, batch_size=32)

    @cached_property
    def context(self) -> dict[str, Any]:
        """What every record of this subject depends on."""
        return circumstances(
            calibration="bundled:calibration, 128 x 256 tokens", data="bundled:python-held-out", seed=0
        )

    def lord(self, rank: int, kind: str | None = None) -> Any:
        """LoRD of the down-projections, as the paper publishes it."""
        model = self.load()
        sites = find_sites(model).select([kind or DOWN[self.name]])
        compress(model, allocate(sites, rank=rank, method="lord"), calibrate(model, sites, self.batches))
        return model

    def rankfold(self, keep: float, form: str = "pivoted") -> Any:
        """The default of `rankfold compress`, or the same in two factors."""
        model = self.load()
        sites = find_sites(model).select()
        compress_in_rounds(
            model,
            sites,
            self.batches,
            loss=summed_loss(model, "text", 0),
            allocate=lambda losses: allocate(
                sites, keep=keep, losses=losses, method="kfac", allocation="knapsack", form=form
            ),
        )
        return model


class Results:
    """A results file: what stands there is not measured again."""

    def __init__(self, name: str) -> None:
        self.path = RESULTS / f"{name}.jsonl"
        self.path.touch()
        self.records = [Record.from_json(line) for line in self.path.read_text().splitlines()]

    def measure(self, subject: str, row: str, context: Mapping[str, Any], run: Callable[[], Mapping[str, Any]]) -> None:
        """Measure the values of one row, unless they are there.

        `run` gives values by name, each a number or a pair of a number and its standard error; text joins the context.
        """
        if any((record.subject, record.context["row"]) == (subject, row) for record in self.records):
            return
        values = run()
        facts = {**context, "row": row, **{k: v for k, v in values.items() if isinstance(v, (str, list))}}
        made = []
        for name, value in values.items():
            if isinstance(value, (str, list)):
                continue
            number, error = value if isinstance(value, tuple) else (value, None)
            made.append(Record(subject=subject, name=name, value=number, unit="1", error=error, context=facts))
        with self.path.open("a") as file:
            file.write("".join(record.to_json() + "\n" for record in made))
        self.records += made
        shown = ", ".join(f"{r.name} {r.value:.4g}" for r in made if r.value is not None)
        print(f"{subject} | {row}: {shown}", flush=True)


def quiet() -> None:
    """One thread, and no chatter of libraries."""
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
