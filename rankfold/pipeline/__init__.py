"""One call from a budget in the user's words to a compressed model."""

from rankfold.pipeline.budget import Budget, parse_bytes
from rankfold.pipeline.front_door import compress
from rankfold.pipeline.reading import Reading, as_corpus, read_text
from rankfold.pipeline.run import note
from rankfold.pipeline.settings import EFFORTS, Effort, Settings

__all__ = [
    "EFFORTS",
    "Budget",
    "Effort",
    "Reading",
    "Settings",
    "as_corpus",
    "compress",
    "note",
    "parse_bytes",
    "read_text",
]
