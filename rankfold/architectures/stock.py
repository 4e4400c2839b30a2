"""The stock classes of transformers behind a configuration, and the names of ours for them."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PretrainedConfig, PreTrainedModel

from rankfold.errors import InputError

AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForSeq2SeqLM",
    "AutoModelForImageTextToText",
    "AutoModelForSpeechSeq2Seq",
)


def stock_class(made: type[Any]) -> type[Any]:
    """The transformers class under one of ours; a stock class is its own."""
    return next(
        base for base in made.__mro__ if not base.__name__.startswith(("Rankfold", "_Factorized", "Factorized"))
    )


def stock_models(config: type[PretrainedConfig]) -> dict[str, type[PreTrainedModel]]:
    """The stock model class behind each Auto class that knows this configuration."""
    found = {}
    for auto_class in AUTO_CLASSES:
        mapping = getattr(transformers, auto_class)._model_mapping
        if config in mapping:
            model_class = mapping[config]
            found[auto_class] = model_class[0] if isinstance(model_class, tuple) else model_class
    return found


def made_name(stock: type[Any], config: type[PretrainedConfig]) -> str:
    """Name of our model class: several model types, such as Exaone, share the model class of another, such as Llama."""
    shared = stock.config_class is not config
    return f"Rankfold{config.__name__.removesuffix('Config') if shared else ''}{stock.__name__}"


def auto_class_for(config: Any) -> Any:
    """The Auto class whose model for this configuration is the one that the configuration names.

    Raises:
        ValueError: If the configuration names a model that none of them loads.
    """
    wanted = (config.architectures or [None])[0]
    found = {}
    for name in AUTO_CLASSES:
        mapping = getattr(transformers, name)._model_mapping
        if type(config) in mapping:
            classes = mapping[type(config)]
            found[name] = {cls.__name__ for cls in (classes if isinstance(classes, tuple) else (classes,))}
    for name, classes in found.items():
        if wanted in classes:
            return getattr(transformers, name)
    if wanted is not None and found:
        known = sorted(set().union(*found.values()))
        raise InputError(
            f"The checkpoint holds a {wanted}, but of this architecture only {known} are supported. "
            "Load it with transformers and save the part that you want to compress."
        )
    return getattr(
        transformers, "AutoModelForCausalLM" if "AutoModelForCausalLM" in found or not found else "AutoModel"
    )
