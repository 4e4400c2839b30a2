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
from rankfold.precision import device_of

_SPECIAL = re.compile(r"(token_id|token_index|_id|_index)$")
_AUDIO = ("input_features", "input_values")


def text_config(model: Any) -> Any:
    """The configuration of the part of a model that reads text: its own, or the one inside it."""
    return text_part(model.config)


def text_part(config: Any) -> Any:
    """The part of a configuration that says how text is read: itself, or one inside it."""
    try:
        return config.get_text_config()
    except ValueError:
        # Several parts read text, as in MusicGen, whose decoder is what a causal model of it is.
        return config.get_text_config(decoder=True)


def has_other_inputs(model: Any) -> bool:
    """Whether a model reads images or sound beside text."""
    parts = ("vision_config", "audio_config", "speech_config", "encoder_config", "vision_tower_config")
    return text_config(model) is not model.config or listens(model) or any(hasattr(model.config, p) for p in parts)


def listens(model: Any) -> bool:
    """Whether a model's encoder hears sound and its decoder writes text."""
    return model.config.is_encoder_decoder and any(name in _parameters(model) for name in _AUDIO)


def _parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters


def vocabulary_size(model: Any) -> int | None:
    """Number of token ids that a model reads; `None` where it has no table of them, as Canine."""
    try:
        return int(model.get_input_embeddings().num_embeddings)
    except (NotImplementedError, AttributeError):
        return None


def text_arguments(model: Any, ids: Int[Tensor, "batch length"]) -> dict[str, Tensor]:
    """Keyword arguments of a forward call on tokens.

    A decoder reads what its encoder reads. A model that does not run on text alone is given silence or a blank image
    beside it, of a shape that is found by trying, once for each model.

    Raises:
        ValueError: If the model does not run on silence or a blank image of any shape that is known here.
    """
    if listens(model):
        name = next(name for name in _AUDIO if name in _parameters(model))
        return {name: _expanded(name, _silence(model, name), ids), "decoder_input_ids": ids}
    blank = _blank(model)
    arguments = {name: _expanded(name, part, ids) for name, part in blank.items()}
    if not model.config.is_encoder_decoder:
        return {"input_ids": ids, **arguments}
    return {**({} if _sees(blank) else {"input_ids": ids}), "decoder_input_ids": ids, **arguments}


def _sees(blank: Mapping[str, Tensor]) -> bool:
    """Whether an encoder reads an image in place of text."""
    return any(name in _IMAGES for name in blank)


def _expanded(name: str, part: Tensor, ids: Tensor) -> Tensor:
    """The same for every row of token ids, and for every token what `_PER_TOKEN` gave."""
    size = (ids.shape[1], *part.shape[2:]) if name in _PER_TOKEN else part.shape[1:]
    return part.to(ids.device).expand(len(ids), *size)


_PER_TOKEN = {
    "image_attention_mask": torch.ones(1, 1, 1, dtype=torch.long),
    "bbox": torch.zeros(1, 1, 4),
}
"""What some models ask of every token: which images it sees (Idefics), where it stands on its page (UDOP)."""


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
        return kept.to(device_of(model))
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
        f"{type(model).__name__} needs audio of a shape that is not known here ({problem}), so text alone cannot "
        "run it. Pass an example of its arguments as inputs=."
    ) from problem


_IMAGES = ("pixel_values", "flattened_patches", "input_features")


def _blank(model: Any) -> dict[str, Tensor]:
    """What a model must be given beside text so that it runs: nothing, or one blank image or recording."""
    kept: dict[str, Tensor] | None = getattr(model, "_blank_inputs", None)
    if kept is not None:
        return kept
    like = next(part for part in model.parameters() if part.is_floating_point())
    names = [name for name in _IMAGES if name in _parameters(model)]
    each = {name: part for name, part in _PER_TOKEN.items() if name in _parameters(model)}
    found: dict[str, Tensor] = {}
    # A model of images alone would run beside tokens that it ignores.
    reads_tokens = bool({"input_ids", "decoder_input_ids"} & _parameters(model).keys())
    if reads_tokens and (names or each) and like.device.type != "meta" and not _runs(model, {}):
        blanks = (
            {name: torch.zeros(shape, dtype=like.dtype)} for name in names for shape in _blank_shapes(model, name)
        )
        found = next((tried for tried in ({**blank, **each} for blank in [{}, *blanks]) if _runs(model, tried)), {})
    model._blank_inputs = found
    return found


def _runs(model: Any, beside: Mapping[str, Tensor]) -> bool:
    """Whether a model runs on a few tokens with something beside them."""
    device = device_of(model)
    ids = example_ids(model, device)[:1]
    read = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {"input_ids": ids}
    if model.config.is_encoder_decoder and not _sees(beside):
        read["input_ids"] = ids
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(**read, **{name: _expanded(name, part, ids) for name, part in beside.items()})
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError):
        return False
    finally:
        model.train(training)
    return True


def _blank_shapes(model: Any, name: str) -> Iterator[tuple[int, ...]]:
    """Shapes of one image, alone or in a list of images, of its patches, or of a recording's features."""
    if name == "input_features":
        yield from _shapes(model, name)
        return
    parts = [value for value in vars(model.config).values() if hasattr(value, "to_dict")]
    sizes: list[tuple[int, int]] = []
    for config in [*parts, model.config]:
        size = getattr(config, "image_size", None)
        sizes += [(size, size)] if isinstance(size, int) else [tuple(size)] if isinstance(size, (list, tuple)) else []
        if name == "flattened_patches" and hasattr(config, "patch_embed_hidden_size"):
            # Of each patch its row and its column, counted from 1, before its pixels.
            yield (1, 8, config.patch_embed_hidden_size + 2)
    for height, width in dict.fromkeys([*sizes, (224, 224)]):
        channels = {int(getattr(config, "num_channels", 3) or 3) for config in [*parts, model.config]} | {3}
        for channel in channels:
            yield from ((1, channel, height, width), (1, 1, channel, height, width))


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
