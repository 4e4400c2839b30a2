"""A model folder, a GGUF file or a name on the hub, read with the class that its configuration names."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from rankfold.architectures import auto_class_for
from rankfold.checkpoint.few_bits import loading_settings, made_dense, scheme_of
from rankfold.errors import InputError
from rankfold.modules import keep_storage
from rankfold.registration import PREFIX
from rankfold.shards import check_folder

ADAPTER = "adapter_config.json"
"""The file by which a folder of adapters is known."""
SPREAD = "spread"
"""In place of a device: all that there are, and the disk."""
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
"""Names by which configurations say how many layers there are."""
MOST_SHARED = 1000
"""Layers that may share their weights, as ALBERT's do; more are held against the number of tensors."""


def load(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load a model and its tokenizer (`None` if there is none beside it); quantized weights are dequantized.

    Args:
        source: A model folder, a GGUF file, or the name of a model on the Hub.
        dtype: Dtype of the weights; by default the checkpoint's own.
        device: Where to put the model; `auto` is CUDA if available, then MPS. By default the CPU.
        trust_remote_code: Whether code in the folder may run.

    Raises:
        ValueError: If there is no such model, or it cannot be read.
    """
    model = load_model(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code, dense=True)
    return model, tokenizer_if_any(source)


def load_model(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
    dense: bool = False,
) -> Any:
    """A model with the class that its configuration names, dense or factorized, in evaluation mode.

    Args:
        source: A model folder, a GGUF file, or the name of a model on the hub.
        dtype: Dtype of the weights; without it the checkpoint's own.
        device: Where to put the model; without it the CPU. `spread` puts it on all accelerators, what they do not hold
            into memory, and what that does not hold stays on disk (accelerate), to be measured and to generate.
        trust_remote_code: Whether code that lies in the folder may run.
        dense: Whether weights that a library stored in few bits are made dense; `model.few_bits` then names the
            scheme that they came in.

    Raises:
        ValueError: If there is no such model, a shard is missing or damaged, weights that the model needs are not in
            the checkpoint, or dense weights are asked for that cannot be had.
    """
    spread = device == SPREAD
    device = None if spread else chosen_device(device)
    if (Path(source) / ADAPTER).is_file():
        return _with_adapters(Path(source), dtype, SPREAD if spread else device, trust_remote_code, dense)
    check_source(source)
    with _reading(source):
        place, config = _config_of(source, trust_remote_code)
        scheme = scheme_of(config)
        auto_class = auto_class_for(config)
        settings: dict[str, Any] = {"dtype": dtype or "auto", "trust_remote_code": trust_remote_code, **place}
        if scheme is not None:
            # Where a library quantized the weights it also puts them in their place.
            settings |= {"device_map": {"": str(device or "cpu")}}
            settings |= loading_settings(scheme, source) if dense else {}
        if spread:
            # Weights in safetensors stay in their files; others are written to this folder.
            folder = tempfile.TemporaryDirectory(prefix="rankfold-")
            settings |= {"device_map": "auto", "offload_folder": folder.name}
        if "gguf_file" not in place:
            settings["config"] = config
        model, info = auto_class.from_pretrained(_folder(source), **settings, output_loading_info=True)
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info.get("mismatched_keys", ()))
    if missing:
        raise InputError(
            f"{source}: the checkpoint must hold all weights of {type(model).__name__}, but {len(missing)} are missing "
            f"or of another shape, for example {missing[:3]}. They would be random; use a complete checkpoint."
        )
    origin = "GGUF" if "gguf_file" in place else scheme if dense else None
    if origin is not None:
        model = made_dense(model, source, origin)
        model.few_bits = origin
        if dtype is not None:
            # bitsandbytes gives only what it had in few bits the dtype that was asked for.
            model = model.to(dtype)
    if "gguf_file" in place:
        # transformers names the folder, in which other files may lie.
        model.name_or_path = model.config._name_or_path = str(source)
    keep_storage(model)
    if spread:
        model._weights_on_disk = folder  # as long as the model
    return (model if device is None or scheme is not None else model.to(device)).eval()


def _folder(source: str | Path) -> str | Path:
    return Path(source).parent if is_gguf(source) else source


def is_gguf(source: str | Path) -> bool:
    """Whether a source is a GGUF file."""
    return Path(source).suffix == ".gguf"


def _config_of(source: str | Path, trust_remote_code: bool) -> tuple[dict[str, str], Any]:
    """What loaders must be told of where the weights lie, and the configuration."""
    place = {"gguf_file": Path(source).name} if is_gguf(source) else {}
    if place and importlib.util.find_spec("gguf") is None:
        raise InputError(f"{source}: reading GGUF needs an extra: pip install 'rankfold[gguf]'")
    config = AutoConfig.from_pretrained(_folder(source), trust_remote_code=trust_remote_code, **place)
    return place, config


@contextmanager
def _reading(source: str | Path) -> Iterator[None]:
    """What goes wrong while transformers reads a checkpoint, in words that say what to do."""
    try:
        yield
    except InputError:
        raise
    except ImportError as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{source}: reading this checkpoint needs a library that is missing ({reason}).") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{source}: a JSON file beside the weights is damaged ({error}). Copy it again.") from error
    except OSError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        message = f"{source}: no model folder, and no model of this name can be reached on the hub ({reason})"
        raise InputError(message) from error
    except safetensors.SafetensorError as error:
        raise InputError(f"{source}: a shard cannot be read ({error}). Copy or download it again.") from error
    except Exception as error:  # a damaged configuration makes transformers raise anything, down to ZeroDivisionError
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{source}: transformers {transformers.__version__} cannot load this checkpoint "
            f"({type(error).__name__}: {reason[:300]}). Check config.json and the weights beside it, or load it with "
            "transformers first; --debug shows the trace."
        ) from error


def _with_adapters(folder: Path, dtype: Any, device: Any, trust_remote_code: bool, dense: bool) -> Any:
    """The model that a folder's adapters were trained over, with them."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise InputError(f"{folder}: adapters need PEFT: pip install 'rankfold[recovery]'") from error
    base = json.loads((folder / ADAPTER).read_text())["base_model_name_or_path"]
    model = load_model(base, dtype=dtype, device=device, trust_remote_code=trust_remote_code, dense=dense)
    if "disk" in getattr(model, "hf_device_map", {}).values():
        raise InputError(
            f"{folder}: adapters need their base model in memory, but some of {base} would stay on disk here. Merge "
            "them where it fits, or use a machine with more memory."
        )
    return PeftModel.from_pretrained(model, folder).eval()


def stored_dtype(source: str | Path) -> torch.dtype:
    """Dtype in which a checkpoint says that its weights are stored; float32 where it does not."""
    _, config = _config_of(source, trust_remote_code=False)
    dtype = config.dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def quantized_by_library(source: str | Path) -> bool:
    """Whether a checkpoint says that a library of transformers' quantized it."""
    return not is_gguf(source) and scheme_of(AutoConfig.from_pretrained(source)) is not None


def load_tokenizer(source: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer that lies beside a model, or inside a GGUF file.

    Raises:
        ValueError: If there is none.
    """
    if is_gguf(source):
        with _reading(source):
            return AutoTokenizer.from_pretrained(_folder(source), gguf_file=Path(source).name)
    if not _may_have_tokenizer(source):
        raise InputError(f"{source}: there is no tokenizer beside the model. Copy its files there.")
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, KeyError, ValueError) as error:
        # transformers 5 writes a class name that 4.57 does not know, for a class that it does know.
        if "TokenizersBackend" in str(error):
            return PreTrainedTokenizerFast.from_pretrained(source)
        reason = str(error).splitlines()[0]
        raise InputError(f"{source}: the tokenizer beside the model cannot be read ({reason}).") from error


def tokenizer_if_any(source: str | Path) -> Any:
    """The tokenizer beside a model, or `None`, for work that reads no text and only copies it."""
    return load_tokenizer(source) if _may_have_tokenizer(source) else None


def _may_have_tokenizer(source: str | Path) -> bool:
    folder = Path(source)
    return not folder.is_dir() or any(any(folder.glob(pattern)) for pattern in ("*token*", "*vocab*", "*.model"))


def is_factorized(folder: str | Path) -> bool:
    """Whether a folder holds a checkpoint of ours."""
    config = Path(folder) / "config.json"
    return config.is_file() and str(json.loads(config.read_text()).get("model_type", "")).startswith(PREFIX)


def chosen_device(device: torch.device | str | None) -> torch.device | str | None:
    """The device that a name stands for; `auto` is CUDA where there is one, then Apple's MPS, otherwise the CPU.

    Raises:
        ValueError: If there is no device of this name.
    """
    if device in {"auto", SPREAD}:
        return next((kind for kind in ("cuda", "mps") if _is_here(kind)), "cpu")
    try:
        kind = None if device is None else torch.device(device).type
    except RuntimeError as error:
        raise InputError(f"A device must be auto, cpu, cuda, cuda:1, mps or spread, but got {device!r}.") from error
    if kind in ("cuda", "mps") and not _is_here(kind):
        raise InputError(
            f"The device {device} was asked for, but torch {torch.__version__} sees no {kind.upper()} device here."
        )
    return device


def _is_here(kind: str) -> bool:
    return bool(torch.cuda.is_available() if kind == "cuda" else torch.backends.mps.is_available())


def check_source(source: str | Path) -> None:
    """Whether a model can lie here, to be asked before anything is loaded.

    Raises:
        ValueError: If a folder holds no whole checkpoint, or there is no such folder.
    """
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise InputError(f"{path}: a model folder must hold config.json, but this one does not.")
        settings = _check_config(path / "config.json")
        _check_layers(path, settings, check_folder(path))
    elif path.is_file() and is_gguf(path):
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise InputError(f"{path}: not a GGUF file, since it does not begin with those letters.")
    elif path.exists() or str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
        raise InputError(
            f"{source}: a model must be a folder with config.json, a .gguf file, or a name on the hub; no such folder."
        )


def _check_config(file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text())
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{file}: the configuration cannot be read ({error}). Copy it again.") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("model_type"), str):
        raise InputError(f"{file}: a configuration must be an object with a `model_type`, but this one is not.")
    return settings


def _check_layers(folder: Path, settings: Mapping[str, Any], tensors: int) -> None:
    """Whether the weights can be those of so many layers, since transformers would build all of them first."""
    parts = (settings, *(value for value in settings.values() if isinstance(value, dict)))
    layers = [part[name] for part in parts for name in LAYERS if isinstance(part.get(name), int)]
    if max(layers, default=0) > max(tensors, MOST_SHARED):
        raise InputError(
            f"{folder}: config.json speaks of {max(layers):,} layers, but the weights are {tensors:,} tensors. "
            "One of them is damaged or belongs to another model; copy both again."
        )
