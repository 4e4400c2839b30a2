"""What lm-evaluation-harness calls for HumanEval: a completion is right if its program passes in the sandbox."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from rankfold.quality.code import Sandbox, humaneval_task, strongest_protection


def process_results(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 if the completion of a row of HumanEval passes its tests, else 0."""
    program = humaneval_task(row).program(results[0])
    return {"pass@1": float(_sandbox().run(program).passed)}


@cache
def _sandbox() -> Sandbox:
    return Sandbox(protection=strongest_protection())
