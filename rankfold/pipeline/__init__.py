"""One call from a budget in the user's words to a compressed model."""

from rankfold.pipeline.budget import Budget, parse_bytes
from rankfold.pipeline.front_door import compress
from rankfold.pipeline.reading import Reading, as_corpus, read_text
from rankfold.pipeline.run import note
from rankfold.pipeline.settings import EFFORTS, Effort, Settings
from rankfold.pipeline.workers import RETRIES, connect, share_of_machine

__all__ = [
    "EFFORTS",
    "RETRIES",
    "Budget",
    "Effort",
    "Reading",
    "Settings",
    "as_corpus",
    "compress",
    "connect",
    "note",
    "parse_bytes",
    "read_text",
    "share_of_machine",
]
