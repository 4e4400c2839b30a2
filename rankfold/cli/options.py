"""Options that several verbs share, and what they have in common to check."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from rankfold.checkpoint import SPREAD
from rankfold.errors import InputError
from rankfold.plan import Plan

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Model = Annotated[str, typer.Argument(help="Model folder, or name on the Hugging Face hub.")]


def _one_device(name: str) -> str:
    """Refuse, before anything is loaded, to spread a model that is worked on."""
    if name == SPREAD:
        raise InputError(
            f"--device {SPREAD} is for rankfold measure, evaluate and benchmark, which only run a model. Give one "
            "device: compression maps weights from their files and works on one block at a time."
        )
    return name


PLACES = "auto (CUDA if available, then MPS, otherwise the CPU), cpu, cuda, cuda:1, mps"

Device = Annotated[str, typer.Option(help=f"Where to compute: {PLACES}.", callback=_one_device)]
Devices = Annotated[
    str,
    typer.Option(
        "--device",
        help=f"Where to compute: {PLACES}, or {SPREAD}: over all accelerators, memory and disk, for models larger than "
        "each.",
    ),
]
Dtype = Annotated[str, typer.Option(help=f"Dtype of the weights: {', '.join(DTYPES)}.")]
Seed = Annotated[int, typer.Option(help="Random seed.")]
Records = Annotated[
    Path | None, typer.Option("--output", help="File for the records (default: stdout, if it is piped).")
]
SiteNames = Annotated[
    list[str] | None,
    typer.Option(
        "--sites", help="Pattern or kind of site, such as 'mlp.c_proj'; repeat it (default: all in the blocks)."
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")]


def to_dtype(name: str) -> torch.dtype | None:
    """The dtype that an option names; `None` is the checkpoint's own."""
    if name not in DTYPES:
        raise InputError(f"--dtype must be one of {', '.join(DTYPES)}, but got {name!r}.")
    return DTYPES[name]


def is_decoder(models: Iterable[Any]) -> bool:
    """Whether all models are causal language models."""
    return all(model.can_generate() and not model.config.is_encoder_decoder for model in models)


def read_plan(file: Path) -> Plan:
    """The plan in a file.

    Raises:
        ValueError: If it cannot be read or is no plan.
    """
    try:
        return Plan.from_json(file.read_text())
    except OSError as error:
        raise InputError(f"{file}: the plan cannot be read ({error.strerror}).") from error
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: not a valid plan ({error}). Use one that rankfold explore wrote.") from error
