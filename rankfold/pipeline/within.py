"""From text and budget to a compressed model: statistics, ranks, factors, refinement."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Int
from torch import Tensor, nn

from rankfold.allocation import BudgetError, allocate
from rankfold.calibration import Corpus, calibrate, calibration_windows, make_batches, masked_batches, summed_loss
from rankfold.compression import compress, compress_blocks, compress_in_rounds, nest, restore
from rankfold.errors import InputError
from rankfold.factorization import METHODS
from rankfold.fingerprint import digest_of, fingerprint
from rankfold.modules import linear_at, use_eager_experts
from rankfold.pipeline.budget import Budget
from rankfold.pipeline.settings import Settings
from rankfold.plan import DENSE, Option, Plan
from rankfold.quality import next_token_quality
from rankfold.recovery import predicts, refine_blocks, refine_predictions
from rankfold.sites import Site, block_paths

Stage = Callable[[str, int], Callable[[], None]]
"""Opens a stage of work with a title and a number of steps; what it returns is called after each step."""

ROUNDS = 2
"""Rounds after the first in which statistics are measured again."""

DRIFT = 0.5
"""Share of the drift that is corrected."""

SEARCH_STEPS = 6
"""Halvings of the interval in which `keep` is searched for a limit on the loss."""

HELD_OUT = 32
"""Windows at the end of the calibration text that are kept for verifying a limit on the loss."""


class Text(NamedTuple):
    """What a compression reads."""

    windows: Int[Tensor, "windows length"]
    held_out: Int[Tensor, "windows length"] | None
    facts: Mapping[str, Any]
    mask_token: int | None = None
    special: tuple[int, ...] = ()


def read_text(
    model: Any,
    tokenizer: Any,
    corpus: Corpus,
    settings: Settings,
    budget: Budget,
    *,
    sequences: int,
    length: int,
) -> Text:
    """Windows of a corpus to calibrate on, and others to verify a limit on the loss where one is asked for.

    Raises:
        ValueError: If the corpus is too short.
    """
    held_out = HELD_OUT if budget.max_loss_increase is not None else 0
    windows, held, facts = calibration_windows(
        model, tokenizer, corpus, sequences=sequences, length=length, seed=settings.seed, held_out=held_out
    )
    masked = "MaskedLM" in type(model).__name__ and tokenizer.mask_token_id is not None
    return Text(windows, held, facts, tokenizer.mask_token_id if masked else None, tuple(tokenizer.all_special_ids))


def compress_within(
    model: Any,
    sites: Sequence[Site],
    budget: Budget,
    settings: Settings,
    text: Text | None,
    *,
    stage: Stage,
    work: Path | None = None,
) -> Plan:
    """Compress a model in place, within a budget.

    Args:
        model: The dense model.
        sites: What may be factorized.
        budget: What is allowed.
        settings: How.
        text: What it reads, where the method or the budget needs it.
        stage: Opens a stage of work, for progress bars.
        work: Folder in which refined blocks are kept, so that a killed run goes on.

    Returns:
        The plan as it was carried out.

    Raises:
        ValueError: If the budget cannot be met, or something that was read is not finite.
    """
    batches, labels = _batches(model, text, settings)
    if settings.refine and (len(batches) < 2 or any(site.calls > 1 for site in sites)):
        raise InputError(
            f"Refinement needs at least two batches of calibration text, but got {len(batches)}, and blocks that a "
            "pass applies once. Raise --sequences, or leave --refine out."
        )
    dense: dict[str, nn.Module] = {site.name: linear_at(model, site.name) for site in sites}
    use_eager_experts(model)
    digest = digest_of(model)
    teacher = None
    if settings.refine and settings.refine_toward == "predictions" and predicts(model, batches[0]):
        teacher = _teacher(model, dense.values())

    def attempt(keep: float | None, title: str) -> Plan:
        choice = _choice(budget, settings, keep)
        facts = {} if text is None else dict(text.facts)
        if METHODS[settings.method].needs_gradients:
            facts["labels"] = labels
        return _attempt(model, sites, choice, settings, facts, batches, lambda name, steps: stage(title + name, steps))

    if budget.max_loss_increase is None:
        plan = attempt(budget.keep_of(model, sites), "")
    else:
        assert text is not None, "a limit on the loss is verified on text"
        plan = _search(model, dense, attempt, text, budget.max_loss_increase, stage)
    if settings.refine:
        advance = stage("refining blocks", settings.refine * len({site.block for site in sites if site.block}))
        chosen = [(option.sites, option.form, option.ranks) for option in plan.options]
        folder = None if work is None else work / fingerprint(digest, chosen, asdict(settings), batches)
        training: dict[str, Any] = {"steps": settings.refine, "seed": settings.seed, "work": folder, "on_step": advance}
        if teacher is not None:
            refine_predictions(model, teacher, batches, **training)
        else:
            refine_blocks(model, batches, dense, **training)
        toward = "block" if teacher is None else "predictions"
        plan = note(model, plan, {"refine": settings.refine, "refine_toward": toward})
        if text is not None and text.held_out is not None and "measured_increase" in plan.calibration:
            rise = next_token_quality(model, text.held_out).loss - plan.calibration["dense_loss"]
            plan = note(model, plan, {"measured_increase": round(rise, 5)})
    return plan


def nest_within(model: Any, sites: Sequence[Site], settings: Settings, text: Text, *, stage: Stage) -> Plan:
    """Write a model, in place, as one checkpoint for many budgets (`rankfold.compression.nest`).

    Raises:
        ValueError: If another method than kfac is asked for, or something that was read is not finite.
    """
    if settings.method != "kfac":
        raise InputError(
            f"A nested model needs ranks in the order of predicted losses: use kfac, not {settings.method}."
        )
    batches, labels = _batches(model, text, settings)
    passes = len({site.block for site in sites}) + 1
    advance = stage("measuring inputs and gradients", 2 * passes * len(batches))
    return nest(model, sites, calibrate(model, sites, batches, advance, summed_loss(model, labels, settings.seed)))


def _batches(model: Any, text: Text | None, settings: Settings) -> tuple[list[dict[str, Tensor]], str]:
    """What calibration reads, and where the labels of its loss come from."""
    batches = [] if text is None else make_batches(model, text.windows)
    masked = text is not None and text.mask_token is not None
    if text is not None and text.mask_token is not None:
        batches = masked_batches(batches, text.mask_token, text.special, settings.seed)
    return batches, "text" if model.can_generate() or masked else "sampled"


def _teacher(model: Any, shared: Iterable[nn.Module]) -> Any:
    """The dense model once more, sharing what compression leaves alone: the layers that it replaces, the embeddings."""
    inside = {id(part) for path in block_paths(model) for part in model.get_submodule(path).parameters()}
    parts = [part for part in model.parameters() if id(part) not in inside]
    parts += [part for layer in shared for part in layer.parameters()]
    return copy.deepcopy(model, {id(part): part for part in parts})


def _attempt(
    model: Any,
    sites: Sequence[Site],
    choice: Mapping[str, Any],
    settings: Settings,
    facts: Mapping[str, Any],
    batches: list[dict[str, Tensor]],
    stage: Stage,
) -> Plan:
    """Compress once."""
    method = METHODS[settings.method]
    blocks = len({site.block for site in sites if site.block})
    if method.needs_gradients:
        visits = (ROUNDS + 1) * 2 * blocks + 6 * blocks
        advance = stage("measuring inputs and gradients", visits * len(batches))
        return compress_in_rounds(
            model,
            sites,
            batches,
            loss=summed_loss(model, str(facts["labels"]), settings.seed),
            allocate=lambda losses: replace(_allocated(sites, choice, losses), calibration=facts),
            rounds=ROUNDS,
            drift=DRIFT,
            on_batch=advance,
        )
    plan = replace(_allocated(sites, choice, None), calibration=facts)
    if method.needs_data:
        advance = stage("blocks x batches", (blocks + 1) * len(batches))
        return compress_blocks(model, plan, sites, batches, on_batch=advance)
    return compress(model, plan, on_site=stage("sites", len(sites)))


def _choice(budget: Budget, settings: Settings, keep: float | None) -> dict[str, Any]:
    """What is handed to `allocate`, or the plan that takes its place."""
    if budget.plan is not None:
        return {"plan": budget.plan}
    choice: dict[str, Any] = {
        "keep": keep,
        "rank": budget.rank,
        "method": settings.method,
        "allocation": settings.ranks_by(budget),
        "multiple": settings.multiple,
        "form": settings.form,
        "seed": settings.seed,
    }
    if choice["allocation"] == "knapsack":
        choice["price"] = "bytes" if budget.bytes is not None else "parameters"
    return choice


def _allocated(sites: Sequence[Site], choice: Mapping[str, Any], losses: Mapping[str, Sequence[float]] | None) -> Plan:
    """The plan for a budget; a given plan with what is predicted of it now."""
    if "plan" not in choice:
        return allocate(sites, **choice, losses=losses)
    plan: Plan = choice["plan"]
    known = losses or {}

    def predicted(option: Option) -> float | None:
        if option.form == DENSE or not all(name in known for name in option.sites):
            return None
        return sum(known[name][option.ranks[0]] for name in option.sites)

    return replace(plan, options=tuple(replace(option, loss=predicted(option), pivots=()) for option in plan.options))


def _search(
    model: Any,
    dense: Mapping[str, nn.Module],
    attempt: Callable[[float | None, str], Plan],
    text: Text,
    limit: float,
    stage: Stage,
) -> Plan:
    """The smallest `keep` whose loss on held-out text rises by no more than the limit, by bisection."""
    assert text.held_out is not None, "a limit on the loss is verified on held-out text"
    before = next_token_quality(model, text.held_out).loss
    earlier = getattr(model.config, "rankfold", None)
    low, high = 0.0, 1.0
    best: float | None = None
    rise = 0.0
    tried: float | None = None
    plan: Plan | None = None
    for number in range(1, SEARCH_STEPS + 1):
        middle = (low + high) / 2
        try:
            plan, tried = attempt(middle, f"try {number} of {SEARCH_STEPS}, keep {middle:.3f}: "), middle
            rise = next_token_quality(model, text.held_out).loss - before
        except BudgetError:
            restore(model, dense, earlier)
            low = middle
            continue
        if rise <= limit:
            high, best = middle, middle
        else:
            low = middle
        if number < SEARCH_STEPS or rise > limit:
            restore(model, dense, earlier)
            plan = None
    if best is None:
        raise InputError(
            f"No compression keeps the rise of the loss within {limit:g} nats per token: keep {high - low:.3f} below "
            f"the whole model still costs more. Raise --max-loss-increase, or recover afterwards (rankfold recover)."
        )
    if plan is None or tried != best:
        plan = attempt(best, f"keep {best:.3f}: ")
        rise = next_token_quality(model, text.held_out).loss - before
    return note(
        model, plan, {"max_loss_increase": limit, "measured_increase": round(rise, 5), "dense_loss": round(before, 5)}
    )


def note(model: Any, plan: Plan, facts: Mapping[str, Any]) -> Plan:
    """The plan with more facts, which the model's configuration holds too, beside those of earlier compressions."""
    stored = dict(model.config.rankfold)
    model.config.rankfold = {**stored, "calibration": {**stored["calibration"], **facts}}
    return replace(plan, calibration={**plan.calibration, **facts})
