"""Model classes with factorized modules: made from stock ones, and known to the Auto classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from rankfold.architectures.code import CODE_FILE, auto_map, modeling_code
from rankfold.architectures.stock import made_name, stock_class, stock_models
from rankfold.modules import Factorized, stored_embeddings
from rankfold.plan import Plan
from rankfold.registration import PREFIX


class _FactorizedModel(Factorized):
    """The classes made here also write the code that loads them elsewhere whenever they are saved."""

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Save as transformers does, and put the loading code beside the weights."""
        config: Any = self.config  # type: ignore[attr-defined]
        config.auto_map = auto_map(stock_class(type(config)))
        result = super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        (Path(save_directory) / CODE_FILE).write_text(
            modeling_code(stock_class(type(config)), getattr(config, "rankfold", None))
        )
        return result


def config_class_for(stock: type[PretrainedConfig]) -> type[PretrainedConfig]:
    """Our configuration class for a stock one; made and registered with the Auto classes on first use."""
    name = f"Rankfold{stock.__name__}"
    made: Any = globals().get(name)
    if made is None:
        made = globals()[name] = type(name, (stock,), {"model_type": PREFIX + stock.model_type, "__module__": __name__})
        AutoConfig.register(made.model_type, made, exist_ok=True)
        for auto_class, model_class in stock_models(stock).items():
            getattr(transformers, auto_class).register(made, model_class_for(model_class, made), exist_ok=True)
    return made  # type: ignore[no-any-return]


def model_class_for(stock: type[PreTrainedModel], config_class: type[PretrainedConfig]) -> type[PreTrainedModel]:
    """Our model class for a stock one."""
    name = made_name(stock, stock_class(config_class))
    if name not in globals():
        # Kept in the module so that the class can be found again by name, as pickling and multiprocessing do.
        globals()[name] = type(
            name,
            (_FactorizedModel, stock),
            {"config_class": config_class, "__module__": __name__, "__doc__": stock.__doc__},
        )
    return globals()[name]  # type: ignore[no-any-return]


def adopt(model: Any, plan: Plan) -> None:
    """Turn a model with replaced modules into one of our classes, in place, so that it saves and loads as itself."""
    config_class = config_class_for(stock_class(type(model.config)))
    retype(model.config, config_class)
    model.__class__ = model_class_for(stock_class(type(model)), config_class)
    embeddings = stored_embeddings(model)
    model.config.rankfold = {**plan.to_dict(), **({"embeddings": embeddings} if embeddings else {})}
    model.config.architectures = [type(model).__name__]


def retype(config: Any, config_class: type[PretrainedConfig]) -> None:
    """Make a configuration one of another class, whose model type it then says."""
    config.__class__ = config_class
    # One that came from disk also holds the type that it had there.
    vars(config).pop("model_type", None)
