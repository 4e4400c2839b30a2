"""One call from a budget in the user's words to a compressed model."""

from rankfold.pipeline.budget import Budget, parse_bytes
from rankfold.pipeline.settings import Settings
from rankfold.pipeline.within import Stage, Text, compress_within, nest_within, note, read_text

__all__ = ["Budget", "Settings", "Stage", "Text", "compress_within", "nest_within", "note", "parse_bytes", "read_text"]
