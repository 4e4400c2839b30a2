"""Which weights of a model may be factorized, which of them share an input, what is fused, what is left out and why."""

from rankfold.sites.find import block_paths, find_sites
from rankfold.sites.fused import fused_parts
from rankfold.sites.site import Part, Site, Sites, Skipped
from rankfold.sites.text_inputs import (
    example_ids,
    has_other_inputs,
    listens,
    text_arguments,
    text_config,
    text_part,
    vocabulary_size,
)

__all__ = [
    "Part",
    "Site",
    "Sites",
    "Skipped",
    "block_paths",
    "example_ids",
    "find_sites",
    "fused_parts",
    "has_other_inputs",
    "listens",
    "text_arguments",
    "text_config",
    "text_part",
    "vocabulary_size",
]
