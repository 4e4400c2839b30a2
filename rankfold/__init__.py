"""Low-rank decomposition of language models: smaller, faster, and honest about what it costs."""

from rankfold.allocation import allocate
from rankfold.architectures import register
from rankfold.calibration import calibrate
from rankfold.compress import compress, compress_blocks, compress_in_rounds
from rankfold.plan import Option, Plan
from rankfold.record import Record
from rankfold.sites import Site, Sites, find_sites

__version__ = "0.1.0"

register()

__all__ = [
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
