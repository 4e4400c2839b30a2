"""A Hugging Face folder that loads: written whole or not at all, read back before it takes its name, exported dense."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors

from rankfold.architectures import release
from rankfold.checkpoint.written import check_adapters, check_written, copy_small_files
from rankfold.errors import InputError
from rankfold.modules import restore_storage
from rankfold.registration import PREFIX
from rankfold.shards import check_folder, whole_folder

MAX_SHARD_SIZE = "5GB"


def save_adapters(
    adapted: Any, tokenizer: Any, folder: str | Path, *, base: str | Path, overwrite: bool = False
) -> Path:
    """Write the adapters of a PEFT model and the tokenizer, whole or not at all; the weights under them stay apart.

    Args:
        adapted: A PEFT model.
        tokenizer: Its tokenizer, or `None`.
        folder: Where to write.
        base: The checkpoint that the adapters belong to, whose place they keep.
        overwrite: Whether an existing folder may be replaced.

    Raises:
        ValueError: If the folder exists, or the disk is full.
    """
    target = Path(folder)
    place = Path(base).resolve() if Path(base).is_dir() else base
    adapted.peft_config["default"].base_model_name_or_path = str(place)
    with _written(target, overwrite) as partial:
        adapted.save_pretrained(partial)
        check_adapters(adapted, partial, target)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
    return target


def save(
    model: Any,
    tokenizer: Any,
    folder: str | Path,
    *,
    source: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model and its tokenizer as a folder that `from_pretrained` loads, completely or not at all.

    What was written is loaded back and compared with the model before the folder takes its name.

    Args:
        model: A model, usually after `rankfold.compress`.
        tokenizer: Its tokenizer, or `None`.
        folder: Where to write; weights go to a temporary folder beside it, which is renamed when complete.
        source: The model from which this one was made: the small files beside its weights (processor, chat template,
            licence) are copied too.
        overwrite: Whether an existing folder may be replaced.

    Raises:
        ValueError: If the folder exists, the disk is full, or what was written does not load back as the same model.
    """
    target = Path(folder)
    restore_storage(model)
    with _written(target, overwrite) as partial:
        _write_weights(model, partial, target)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if source is not None:
            copy_small_files(source, partial, note=_card_note(model))
        check_folder(partial)
    return target


@contextmanager
def _written(target: Path, overwrite: bool) -> Iterator[Path]:
    """A folder that takes its place when it is whole; what goes wrong with the disk is said."""
    try:
        with whole_folder(target, overwrite) as partial:
            yield partial
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{target}: the checkpoint could not be written ({error}); nothing was left there.") from error


def _write_weights(model: Any, folder: Path, target: Path) -> None:
    """Write weights and configuration, and load them back.

    Stock models are written under the names that their kind has on disk. Where transformers cannot take back its own
    renaming (few bits in 5.24, and some experts), under the names of the modules, which it loads as well.
    """
    quantized = getattr(model, "hf_quantizer", None) is not None
    stock = not model.config.model_type.startswith(PREFIX)
    if stock and not quantized:
        try:
            model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
            return check_written(model, folder, target)
        except (InputError, RuntimeError):
            for file in folder.glob("*.safetensors*"):
                file.unlink()
    model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE, save_original_format=False)
    return check_written(model, folder, target)


def _card_note(model: Any) -> str:
    """What a model card must say of a model that was made from another."""
    made = "compressed" if model.config.model_type.startswith(PREFIX) else "made"
    return f"This checkpoint was {made} with rankfold from the model that is described below."


def export_dense(
    model: Any,
    tokenizer: Any,
    folder: str | Path,
    *,
    source: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Multiply all factors out and write an ordinary checkpoint that needs no rankfold; the model becomes dense.

    Raises:
        ValueError: If the model is not factorized, the folder exists, or the disk is full.
    """
    if not model.config.model_type.startswith(PREFIX):
        raise InputError(
            f"A {type(model).__name__} is an ordinary model already: there are no factors to multiply out."
        )
    release(model)
    return save(model, tokenizer, folder, source=source, overwrite=overwrite)
