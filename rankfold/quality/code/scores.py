"""How good completions are: pass@k with its confidence interval, and how many parse and know their names."""

from __future__ import annotations

import ast
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from rankfold.errors import InputError
from rankfold.progress import Step, no_step
from rankfold.quality.code.completions import Completion
from rankfold.quality.code.sandbox import Execution, Sandbox
from rankfold.quality.diversity import distinct_share, repeated_share
from rankfold.quality.intervals import Share, share


@dataclass(frozen=True)
class CodeScores:
    """What a model's completions of a set of tasks are worth."""

    passes: dict[int, Share]
    """pass@k by k."""
    rates: dict[int, tuple[float, ...]]
    """pass@k of every task."""
    parses: Share
    """Prompt and completion are Python."""
    knows_names: Share
    """The program parsed, and did not end in the use of a name that nothing defines."""
    repeated: float
    """Share of 4-grams of words that stood in the same completion before."""
    distinct: float
    """Share of the bigrams of all completions that are different."""
    errors: dict[str, int]
    """How often programs ended in what."""


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Probability that at least one of `k` samples, drawn from `samples` of which some are right, is right.

    The unbiased estimate of Chen et al. 2021 (arXiv:2107.03374, eq. 1).

    Raises:
        ValueError: If `k` is not between 1 and the number of samples.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    if not 1 <= k <= samples:
        raise InputError(f"pass@k needs k between 1 and the samples of a task, but got k {k} and {samples} samples.")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def parses(source: str) -> bool:
    """Whether a text is Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def score_completions(
    completions: Sequence[Completion],
    ks: Sequence[int],
    sandbox: Sandbox,
    *,
    workers: int | None = None,
    on_step: Step = no_step,
) -> CodeScores:
    """Run every completion with its task's tests in the sandbox.

    Raises:
        ValueError: If there are no completions, or a `k` is larger than the samples of a task.
    """
    if not completions:
        raise InputError("Scores need at least one completion, but got none.")
    programs = [made.task.program(made.text) for made in completions]
    executions = sandbox.run_all(programs, workers=workers, on_step=on_step)
    by_task: dict[str, list[bool]] = {}
    for made, execution in zip(completions, executions, strict=True):
        by_task.setdefault(made.task.name, []).append(execution.passed)
    valid = [parses(made.task.prompt + made.text) for made in completions]
    knows = [
        ok and execution.error not in ("NameError", "UnboundLocalError")
        for ok, execution in zip(valid, executions, strict=True)
    ]
    texts = [made.text for made in completions]
    rates = {k: tuple(pass_at_k(len(runs), sum(runs), k) for runs in by_task.values()) for k in ks}
    return CodeScores(
        passes={k: share(values) for k, values in rates.items()},
        rates=rates,
        parses=share(valid),
        knows_names=share(knows),
        repeated=repeated_share(texts),
        distinct=distinct_share(texts),
        errors=_counted(executions),
    )


def _counted(executions: Sequence[Execution]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for execution in executions:
        name = execution.error or "passed"
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))
