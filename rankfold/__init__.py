"""Low-rank decomposition of language models: smaller, faster, and honest about what it costs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rankfold.registration import register

if TYPE_CHECKING:
    from rankfold.allocation import allocate
    from rankfold.calibration import calibrate
    from rankfold.compression import compress, compress_blocks, compress_in_rounds
    from rankfold.errors import InputError
    from rankfold.plan import Option, Plan
    from rankfold.record import Record
    from rankfold.sites import Site, Sites, find_sites

__version__ = "0.1.0"

register()

__all__ = [
    "InputError",
    "Option",
    "Plan",
    "Record",
    "Site",
    "Sites",
    "allocate",
    "calibrate",
    "compress",
    "compress_blocks",
    "compress_in_rounds",
    "find_sites",
]

_ROOMS = {
    "allocate": "allocation",
    "calibrate": "calibration",
    "compress": "compression",
    "compress_blocks": "compression",
    "compress_in_rounds": "compression",
    "InputError": "errors",
    "Option": "plan",
    "Plan": "plan",
    "Record": "record",
    "Site": "sites",
    "Sites": "sites",
    "find_sites": "sites",
}
"""Where a name lives. Rooms are opened when they are asked for, since torch and transformers take seconds."""


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
