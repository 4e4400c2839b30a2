"""transformers' Auto classes know our model types from the moment that both packages are imported."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PREFIX = "rankfold-"
"""Begins every model type of ours, so that no loader takes a checkpoint for the stock model."""

_AUTO = "transformers.models.auto.configuration_auto"


class _LazyTypes(dict[str, Any]):
    """Our model types, each made when it is asked for: making all of them would import every architecture."""

    def __init__(self, known: dict[str, Any], module: ModuleType) -> None:
        super().__init__(known)
        self._stock = module

    def __contains__(self, model_type: object) -> bool:
        return super().__contains__(model_type) or (
            isinstance(model_type, str)
            and model_type.startswith(PREFIX)
            and model_type.removeprefix(PREFIX) in self._stock.CONFIG_MAPPING_NAMES
        )

    def __missing__(self, model_type: str) -> Any:
        # By name, since it needs torch and this module must not.
        return importlib.import_module("rankfold.architectures").config_class_for(
            self._stock.CONFIG_MAPPING[model_type.removeprefix(PREFIX)]
        )


def register() -> None:
    """Let the Auto classes know our model types, now or when transformers is imported; done by `import rankfold`."""
    if _AUTO in sys.modules:
        _extend(sys.modules[_AUTO])
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


def _extend(module: ModuleType) -> None:
    mapping = module.CONFIG_MAPPING
    if not isinstance(mapping._extra_content, _LazyTypes):
        mapping._extra_content = _LazyTypes(mapping._extra_content, module)


class _WhenImported(MetaPathFinder):
    """Waits for one module of transformers: importing it here would cost every `import rankfold` seconds."""

    def find_spec(self, name: str, path: Iterable[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The module's own spec, with a loader that registers our types after it."""
        if name != _AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenExtend(spec.loader)
        return spec


class _ThenExtend(Loader):
    """A loader that runs another one first."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the other one does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the other one does, and then ours."""
        self._loader.exec_module(module)
        _extend(module)

    def __getattr__(self, name: str) -> Any:
        """Whatever else is asked of a loader, such as its source."""
        return getattr(self._loader, name)
