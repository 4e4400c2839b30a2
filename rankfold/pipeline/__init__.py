"""One call from a budget in the user's words to a compressed model."""

from rankfold.pipeline.budget import Budget, parse_bytes
from rankfold.pipeline.reading import Reading, as_corpus, read_text
from rankfold.pipeline.run import compress, note
from rankfold.pipeline.settings import DRIFT, ROUNDS, Settings

__all__ = [
    "DRIFT",
    "ROUNDS",
    "Budget",
    "Reading",
    "Settings",
    "as_corpus",
    "compress",
    "note",
    "parse_bytes",
    "read_text",
]
