"""A checkpoint that was just written: loaded back and compared, and what lies beside its weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from rankfold.architectures import auto_class_for
from rankfold.errors import InputError
from rankfold.sites import example_ids, text_arguments

SMALL_FILE = 64 * 2**20
"""Bytes of the largest file that counts as small: tokenizers of large vocabularies have tens of megabytes."""

LARGE = 8 * 2**30
"""Bytes from which on a model is compared by its tensors alone, without running it."""

WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".ckpt", ".npz"}
"""Files of weights, in any format; code (.py) is not taken along either, nor pickles."""

NOT_COPIED = WEIGHTS | {".py", ".pkl", ".lock", ".incomplete"}


def copy_small_files(source: str | Path, folder: Path, note: str) -> None:
    """Copy what lies beside a model's weights and was not written anew: processor, chat template, licence, model card.

    Args:
        source: A model folder, or the name of a model on the hub.
        folder: The folder that is being written.
        note: A line that the copied model card begins with.
    """
    origin = Path(source) if Path(source).is_dir() else _downloaded(str(source))
    if origin is None:
        return
    for path in sorted(origin.iterdir()):
        if not path.is_file() or path.name.startswith(".") or path.name.endswith(".index.json"):
            continue
        target = folder / path.name
        if target.exists() or path.suffix in NOT_COPIED or path.stat().st_size > SMALL_FILE:
            continue
        if path.name == "README.md":
            target.write_text(_with_note(path.read_text(errors="replace"), note))
        else:
            shutil.copyfile(path, target)


def _downloaded(name: str) -> Path | None:
    """The folder of a hub model's small files, where the hub or its cache has them."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    ignored = [f"*{suffix}" for suffix in NOT_COPIED]
    try:
        return Path(snapshot_download(name, ignore_patterns=ignored))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return None


def _with_note(card: str, note: str) -> str:
    """A model card with a note after its metadata."""
    if card.startswith("---\n") and "\n---\n" in card[4:]:
        metadata, _, text = card[4:].partition("\n---\n")
        return f"---\n{metadata}\n---\n\n> {note}\n{text}"
    return f"> {note}\n\n{card}"


@torch.no_grad()
def check_written(model: Any, folder: Path, target: Path | None = None) -> None:
    """Load a folder back and compare it with the model from which it was written, tensor by tensor.

    Tensors are mapped from the file, so this takes little memory where names are those of the model. Models that are
    not large also read a few tokens, which finds what no file holds.

    Args:
        model: What was written.
        folder: Where it lies.
        target: The name under which the user knows the folder.

    Raises:
        ValueError: If the folder does not load, or loads as something else.
    """
    try:
        loaded, info = _load(model, folder)
    except Exception as error:  # whatever a loader raises, this folder must not stand
        raise InputError(
            f"{target or folder}: what was written does not load again ({type(error).__name__}: {error}). Nothing "
            f"was left there. Report this: {type(model).__name__} cannot be written yet."
        ) from error
    problem = _difference(model, loaded, info)
    if problem:
        raise InputError(
            f"{target or folder}: what was written loads as another model ({problem}). Nothing was left there. "
            f"Report this: {type(model).__name__} cannot be written yet."
        )


def check_adapters(adapted: Any, folder: Path, target: Path) -> None:
    """Read written adapters back and compare them with those of the model.

    Raises:
        ValueError: If they differ.
    """
    from peft import get_peft_model_state_dict

    stored = load_file(folder / "adapter_model.safetensors")
    expected = get_peft_model_state_dict(adapted)
    wrong = sorted(stored.keys() ^ expected.keys())
    wrong = wrong or [name for name, part in expected.items() if not _equal(part.cpu(), stored[name])]
    if wrong:
        raise InputError(f"{target}: the written adapters differ ({wrong[0]}). Nothing was left there.")


def _load(model: Any, folder: Path) -> tuple[Any, Any]:
    auto = auto_class_for(model.config)
    quantized = getattr(model, "hf_quantizer", None) is not None
    place = {"device_map": {"": str(model.device)}} if quantized else {}
    loaded, info = auto.from_pretrained(folder, dtype="auto", output_loading_info=True, **place)
    return loaded.eval(), info


def _difference(model: Any, loaded: Any, info: Any) -> str:
    """What tells two models apart, or nothing."""
    missing = sorted(map(str, [*info["missing_keys"], *info.get("mismatched_keys", ())]))
    if missing:
        return f"{len(missing)} weights are missing or of another shape, for example {missing[0]}"
    if type(loaded) is not type(model):
        return f"a {type(loaded).__name__} instead of a {type(model).__name__}"
    found = loaded.state_dict()
    for name, expected in model.state_dict().items():
        if name not in found:
            return f"{name} is missing"
        if not _equal(expected, found[name]):
            return f"{name} differs"
    size = sum(part.numel() * part.element_size() for part in model.parameters())
    return "" if size > LARGE else _different_logits(model, loaded)


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    b = b.to(a.device)
    return torch.equal(a, b) or (a.is_floating_point() and torch.equal(a.nan_to_num(), b.nan_to_num()))


def _different_logits(model: Any, loaded: Any) -> str:
    """What tells the outputs of two models apart on a few tokens, or nothing where they cannot be run on text."""
    training = model.training
    if getattr(model, "hf_quantizer", None) is None:
        loaded.to(model.device)
    try:
        read = text_arguments(model, example_ids(model, model.device))
        expected = model.eval()(**read).to_tuple()[0].float()
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, NotImplementedError, AssertionError):
        return ""
    finally:
        model.train(training)
    try:
        found = loaded(**read).to_tuple()[0].float()
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, AssertionError) as error:
        return f"it does not run any more: {type(error).__name__}: {error}"
    size = float(expected.nan_to_num().abs().max())
    # Experts may be computed by other kernels than before, in 16 bits with other roundings.
    tolerance = (0.05 if model.dtype in (torch.float16, torch.bfloat16) else 1e-3) * max(1.0, size)
    if torch.allclose(found, expected, rtol=0.0, atol=tolerance, equal_nan=True):
        return ""
    return f"outputs differ by {float((expected - found).abs().max()):.3g} of {size:.3g}"
