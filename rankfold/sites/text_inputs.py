"""What a model's forward call reads when it reads text alone, whatever else it could look at or listen to."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from rankfold.errors import InputError

_SPECIAL = re.compile(r"(token_id|token_index|_id|_index)$")
_AUDIO = ("input_features", "input_values")


def text_config(model: Any) -> Any:
    """The configuration of the part of a model that reads text: its own, or the one inside it."""
    return model.config.get_text_config()


def has_other_inputs(model: Any) -> bool:
    """Whether a model reads images or sound beside text."""
    parts = ("vision_config", "audio_config", "speech_config", "encoder_config", "vision_tower_config")
    return text_config(model) is not model.config or listens(model) or any(hasattr(model.config, p) for p in parts)


def listens(model: Any) -> bool:
    """Whether a model's encoder hears sound and its decoder writes text."""
    parameters = inspect.signature(model.forward).parameters
    return model.config.is_encoder_decoder and any(name in parameters for name in _AUDIO)


def vocabulary_size(model: Any) -> int | None:
    """Number of token ids that a model reads; `None` where it has no table of them, as Canine."""
    try:
        return int(model.get_input_embeddings().num_embeddings)
    except (NotImplementedError, AttributeError):
        return None


def text_arguments(model: Any, ids: Int[Tensor, "batch length"]) -> dict[str, Tensor]:
    """Keyword arguments of a forward call on tokens; a decoder reads what its encoder reads, or silence before it.

    Raises:
        ValueError: If the model cannot be run without images or sound.
    """
    if not model.config.is_encoder_decoder:
        return {"input_ids": ids}
    if not listens(model):
        return {"input_ids": ids, "decoder_input_ids": ids}
    name = next(name for name in _AUDIO if name in inspect.signature(model.forward).parameters)
    sound = _silence(model, name)
    return {name: sound.expand(len(ids), *sound.shape[1:]), "decoder_input_ids": ids}


def example_ids(model: Any, device: torch.device | str, seed: int = 0) -> Int[Tensor, "3 5"]:
    """A few token ids, none of which stands for an image or a sound; rows end as texts do, where classifiers look."""
    size = vocabulary_size(model) or 128
    special = set(_special_ids(model.config.to_dict()))
    plain = [number for number in range(min(size, 4096)) if number not in special] or list(range(size))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(plain), (3, 5), generator=generator)
    ids = torch.tensor(plain)[chosen]
    end = getattr(text_config(model), "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < size:
        ids[:, -1] = end
    return ids.to(device)


def _special_ids(settings: Mapping[Any, Any]) -> Iterator[int]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _special_ids(value)
        elif _SPECIAL.search(str(name)):
            yield from (item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int))


def _silence(model: Any, name: str) -> Tensor:
    """One silent recording of the shape that the encoder takes; found by trying, once for each model."""
    kept: Tensor | None = getattr(model, "_silence", None)
    if kept is not None:
        return kept.to(next(model.parameters()).device)
    like = next(part for part in model.parameters() if part.is_floating_point())
    problem: Exception | None = None
    for shape in _shapes(model, name):
        sound = torch.zeros(shape, dtype=like.dtype, device=like.device)
        try:
            with torch.no_grad():
                model(**{name: sound}, decoder_input_ids=torch.ones(1, 2, dtype=torch.long, device=like.device))
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError) as error:
            problem = problem or error
            continue
        model._silence = sound.cpu()
        return sound
    raise InputError(
        f"{type(model).__name__} must be given sound of a shape that is not known here ({problem}), so text alone "
        "cannot run it. Pass an example of its arguments as inputs=."
    ) from problem


def _shapes(model: Any, name: str) -> Iterator[tuple[int, ...]]:
    """Shapes of a recording: samples, or frames of features, which come first or last."""
    if name == "input_values":
        yield from ((1, 16_000), (1, 1, 16_000))
        return
    configs = [model.config, *(value for value in vars(model.config).values() if hasattr(value, "to_dict"))]
    bands = {
        int(value)
        for config in configs
        for key in ("num_mel_bins", "input_feat_per_channel", "n_mels", "feature_projection_input_dim", "d_model")
        if isinstance(value := getattr(config, key, None), int)
    } | {80}
    frames = 2 * int(getattr(model.config, "max_source_positions", 128))
    for band in bands:
        yield from ((1, band, frames), (1, 64, band), (1, frames, band), (1, band, 64))
