"""Ranks chosen late beside ranks chosen early: python experiments/adaptive_rank.py.

pycode-llama, kfac measured once, in two factors. Nested: one checkpoint cut to keep 0.9 to 0.5, beside a static model
of each budget. Per token: every site at three quarters of its break-even rank and more where a token needs it, beside
the static model whose rank is the average. Columns: rise of the loss on held-out Python, numbers multiplied a token on
average, prefill and decoding beside the static twin, taking turns. Results: benchmarks/results/adaptive_rank.jsonl.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from lord import Results, Subject, quiet

from rankfold import allocate, calibrate, factorize, find_sites
from rankfold.allocation import break_even_rank, factorized_option
from rankfold.compression import adapt, nest, shrink
from rankfold.cost import parameter_count, relative_cost
from rankfold.plan import Plan
from rankfold.quality import paired_difference

KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5)
SMALL, SHARE = 0.5, 0.5
"""Share of the rank that every token takes, and share of the tokens that take all of it: three quarters on average."""


def rise(subject: Subject, model: Any) -> tuple[float, float]:
    """Over the dense model."""
    found = paired_difference(subject.quality(model).window_losses, subject.quality(subject.dense).window_losses)
    return tuple(found)


def at_share(sites: Any, share: float) -> Plan:
    """Every site at a share of its break-even rank."""
    options = []
    for site in sites:
        rank = max(2, round(share * break_even_rank("low_rank", site, site.bias)))
        options.append(replace(factorized_option("low_rank", [site], rank, site.bias), method="kfac"))
    return Plan(options=tuple(options), method="kfac")


def main() -> None:
    """Measure what is missing."""
    quiet()
    subject, results = Subject("pycode-llama"), Results("adaptive_rank")
    model = subject.load()
    sites = find_sites(model).select()
    statistics = calibrate(model, sites, subject.batches)
    losses = statistics.losses("kfac")
    nest(model, sites, statistics)
    nested = parameter_count(model)
    for keep in KEEPS:

        def cut(keep: float = keep) -> dict[str, Any]:
            late, early = copy.deepcopy(model), subject.load()
            plan = shrink(late, keep)
            choice = {"keep": keep, "method": "kfac", "form": "low_rank", "allocation": "knapsack", "losses": losses}
            factorize(early, allocate(sites, **choice), statistics)
            return {"nested": rise(subject, late), "static": rise(subject, early), "parameters": plan.parameters,
                    "checkpoint": nested}  # fmt: skip

        results.measure(subject.name, f"nested, keep {keep}", subject.context.also(keep=keep), cut)
    for share in (0.9, 0.6):

        def token(share: float = share) -> dict[str, Any]:
            adaptive, static = subject.load(), subject.load()
            plan = factorize(adaptive, at_share(sites, share), statistics)
            adapt(adaptive, plan, subject.batches, small=SMALL, share=SHARE)
            average = at_share(sites, share * (SMALL + SHARE * (1 - SMALL)))
            factorize(static, average, statistics)
            cost = relative_cost(static, adaptive, rounds=15)
            return {
                "adaptive": rise(subject, adaptive), "static": rise(subject, static), "parameters": plan.parameters,
                "average": average.parameters, "prefill": cost["prefill_ratio"], "decode": cost["decode_ratio"],
            }  # fmt: skip

        results.measure(
            subject.name, f"per token, {share:g} of break-even at most", subject.context.also(share=share), token
        )


if __name__ == "__main__":
    main()
