"""The studies of depth, kinds and distance as they were measured, for the pages that tell of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import NamedTuple

from results import RESULTS

from rankfold.record import Record

REAL = "SmolLM2-135M-Instruct"

ARCHITECTURES = {
    REAL: "Llama",
    "pycode-llama": "Llama",
    "pycode-starcoder": "GPTBigCode",
    "pycode-codegen": "CodeGen",
    "pycode-opt": "OPT",
    "pycode-bloom": "Bloom",
    "pycode-mamba": "Mamba-2",
    "stories260K": "Llama, stories",
    "MiniLM": "BERT",
}
"""Every model that was studied, by what it is."""

MADE_SMALL = {model for model in ARCHITECTURES if model not in (REAL, "MiniLM")}
"""Models of under a million parameters."""


def study(model: str, by: str) -> dict[tuple[str, float], Record]:
    """The records of a study by group and share of the full rank."""
    path = RESULTS / f"characterization-{model}-{by}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = map(Record.from_json, lines)
    return {(str(record.context["group"]), float(record.context["share"])): record for record in records}


class Depth(NamedTuple):
    """What a study of single blocks says: rises at rank 1 as multiples of the median block's."""

    first: float
    last_three: float
    last: float
    first_is_worst: bool
    better: int
    """Blocks in which rank 1 costs less for each parameter removed than a quarter of the rank."""
    blocks: int
    """Blocks, where both are known of all."""


def depth_of(found: Mapping[tuple[str, float], Record]) -> Depth:
    """What a study of single blocks says."""
    blocks = list(dict.fromkeys(group for group, _ in found))
    rises = [float(found[block, 0.0].value or 0) for block in blocks]
    middle = statistics.median(rises)
    both = blocks if all((block, 0.25) in found for block in blocks) else []
    better = sum(per_parameter(found[block, 0.0]) < per_parameter(found[block, 0.25]) for block in both)
    late = statistics.fmean(rises[-3:]) / middle
    return Depth(rises[0] / middle, late, rises[-1] / middle, rises[0] == max(rises), better, len(both))


def per_parameter(record: Record) -> float:
    """Rise for each share of the model that was removed."""
    return float(record.value or 0) / float(record.context["removed_of_model"])


def apart(model: str) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """By distance, the rise of three blocks together: as a ratio to the sum of what each costs alone, and itself."""
    found, alone = study(model, "distance"), study(model, "block")
    blocks = list(dict.fromkeys(group for group, _ in alone))
    ratios: dict[str, list[float]] = {}
    rises: dict[str, list[float]] = {}
    for (group, _), record in found.items():
        apart, _, numbers = group.partition(" apart: blocks ")
        total = sum(float(alone[blocks[int(place)], 0.0].value or 0) for place in numbers.split(", "))
        ratios.setdefault(apart, []).append(float(record.value or 0) / total)
        rises.setdefault(apart, []).append(float(record.value or 0))
    return ratios, rises
