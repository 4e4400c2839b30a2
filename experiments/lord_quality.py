"""LoRD at the published cuts of the rank, and what code the model still writes.

    python experiments/lord_quality.py HumanEval.jsonl.gz

The down-projections of pycode-starcoder get the share of the full rank that four of the released StarCoders have
(arXiv:2309.14021); beside them rankfold with as many parameters. Columns: perplexity of held-out Python, pass@1 and
pass@10 (10 samples at temperature 0.6), share of completions that parse and that know their names, true continuations
found among four, next lines exact. Results: benchmarks/results/lord_quality.jsonl.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from lord import Results, Subject, quiet

from rankfold import find_sites
from rankfold.cost import parameter_count
from rankfold.quality import Sampling, choice_items, choose, share
from rankfold.quality.code import (
    Sandbox,
    choose_lines,
    complete_tasks,
    describe,
    exact_lines,
    load_tasks,
    score_completions,
    strongest_protection,
)

SHARES = {"14.9B": 4480 / 6144, "13.8B": 3584 / 6144, "13.2B": 3072 / 6144, "12.3B": 2304 / 6144}
"""Name of a released checkpoint, and the share of the full rank that its down-projections have."""

SAMPLES, ITEMS = 10, 400


def row(subject: Subject, model: Any, tasks: list[Any]) -> dict[str, Any]:
    """Everything that is measured of one model."""
    quality = subject.quality(model)
    items = choice_items(subject.tokenizer, subject.held_out_texts, count=ITEMS)
    right = share(choose(model, items))
    lines = share(exact_lines(model, subject.tokenizer, choose_lines(subject.held_out_texts, ITEMS)))
    with tempfile.TemporaryDirectory() as folder:
        made = complete_tasks(
            model, subject.tokenizer, tasks, Path(folder) / "completions.jsonl", samples=SAMPLES,
            sampling=Sampling(temperature=0.6, new_tokens=96), batch_size=41,
        )  # fmt: skip
    protection = strongest_protection()
    scores = score_completions(made, [1, SAMPLES], Sandbox(protection=protection))
    return {
        "parameters": parameter_count(model),
        "perplexity": (quality.perplexity, quality.perplexity_error),
        "choice": (right.value, right.error),
        "next_line": (lines.value, lines.error),
        "pass@1": (scores.passes[1].value, scores.passes[1].error),
        f"pass@{SAMPLES}": (scores.passes[SAMPLES].value, scores.passes[SAMPLES].error),
        f"pass@{SAMPLES} high": scores.passes[SAMPLES].high,
        "parses": (scores.parses.value, scores.parses.error),
        "knows_names": (scores.knows_names.value, scores.knows_names.error),
        "repeated": scores.repeated,
        "distinct": scores.distinct,
        "sandbox": describe(protection)["sandbox"],
    }


def main() -> None:
    """Measure what is missing."""
    quiet()
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    tasks = load_tasks(sys.argv[1])
    subject, results = Subject("pycode-starcoder"), Results("lord_quality")
    context = subject.context.also(tasks=Path(sys.argv[1]).name, samples=SAMPLES, temperature=0.6)
    results.measure(subject.name, "dense", context, lambda: row(subject, subject.load(), tasks))
    total = parameter_count(subject.dense)
    weights = sum(site.parameters for site in find_sites(subject.dense).select())
    for name, part in SHARES.items():
        rank = round(part * 128)
        lord = partial(subject.lord, rank)
        results.measure(
            subject.name,
            f"LoRD, rank {rank} of 128 (as {name})",
            context,
            lambda lord=lord: row(subject, lord(), tasks),
        )
        removed = total - parameter_count(lord())
        if removed > 0 and name in ("13.8B", "13.2B", "12.3B"):
            ours = partial(subject.rankfold, 1 - removed / weights)
            results.measure(
                subject.name, f"rankfold, as small as {name}", context, lambda ours=ours: row(subject, ours(), tasks)
            )


if __name__ == "__main__":
    main()
