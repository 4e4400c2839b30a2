"""Low-rank decomposition of language models: smaller, faster, and honest about what it costs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rankfold.registration import register

if TYPE_CHECKING:
    from rankfold.allocation import allocate
    from rankfold.calibration import Statistics, calibrate
    from rankfold.checkpoint import load, save
    from rankfold.compression import factorize
    from rankfold.errors import InputError
    from rankfold.measurement import measure
    from rankfold.pipeline import compress
    from rankfold.plan import Option, Plan
    from rankfold.record import Record, Records
    from rankfold.recovery import recover
    from rankfold.reports import report
    from rankfold.sites import Site, Sites, find_sites

__version__ = "0.1.0"

register()

__all__ = [
    "InputError",
    "Option",
    "Plan",
    "Record",
    "Records",
    "Site",
    "Sites",
    "Statistics",
    "allocate",
    "calibrate",
    "compress",
    "factorize",
    "find_sites",
    "load",
    "measure",
    "recover",
    "report",
    "save",
]

_ROOMS = {
    "allocate": "allocation",
    "calibrate": "calibration",
    "compress": "pipeline",
    "factorize": "compression",
    "find_sites": "sites",
    "InputError": "errors",
    "load": "checkpoint",
    "measure": "measurement",
    "Option": "plan",
    "Plan": "plan",
    "Record": "record",
    "Records": "record",
    "recover": "recovery",
    "report": "reports",
    "save": "checkpoint",
    "Site": "sites",
    "Sites": "sites",
    "Statistics": "calibration",
}
"""Where a name lives. Rooms are opened when they are asked for, since torch and transformers take seconds."""


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
