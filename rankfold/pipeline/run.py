"""The front door: from a model, a text and a budget in the user's words to a compressed model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rankfold.allocation import BudgetError, WidthLosses, allocate, uniform_widths
from rankfold.calibration import BUNDLED, Corpus, Statistics, calibrate, summed_loss, usual_labels
from rankfold.circumstances import versions
from rankfold.compression import compress_in_rounds, factorize, factorize_blocks, nest, restore
from rankfold.errors import InputError
from rankfold.factorization import Factors, Moments, Ordered, SiteMoments
from rankfold.fingerprint import fingerprint
from rankfold.journal import Journal
from rankfold.modules import linear_at, use_eager_experts
from rankfold.pipeline.budget import Budget, parse_bytes
from rankfold.pipeline.reading import Reading, read_text
from rankfold.pipeline.settings import EFFORTS, UNTOUCHED, Settings
from rankfold.plan import DENSE, Option, Plan
from rankfold.progress import Stage, no_stage
from rankfold.quality import next_token_quality
from rankfold.quantization import Width, compress_in_bits, embedding_widths, find_embeddings, put_in_bits
from rankfold.recovery import predicts, refine_blocks, refine_predictions
from rankfold.shelf import Shelf, usual_limit
from rankfold.sites import Site, Sites, block_paths, find_sites

SEARCH_STEPS = 6
"""Halvings of the interval in which `keep` is searched for a limit on the loss."""

OPTIMISM = 2.0
"""How much more an optimized plan loses than is predicted of it (docs/log.md)."""

FEWEST_BYTES = 1 / 32
"""Share of the sites' bytes from which on a limit on the loss is searched where bits are shared out."""


def compress(  # noqa: PLR0913
    model: Any,
    tokenizer: Any = None,
    *,
    keep: float | None = None,
    bytes: int | str | None = None,
    bits: float | int | None = None,
    max_loss_increase: float | None = None,
    rank: int | None = None,
    plan: Plan | None = None,
    text: str | Path | Corpus | Sequence[str] | Tensor = BUNDLED[0],
    sequences: int | None = None,
    length: int | None = None,
    batch_size: int | None = None,
    sites: Sequence[str | Site] | None = None,
    method: str | None = None,
    allocation: str | None = None,
    form: str | None = None,
    allow: str | Sequence[str] | None = None,
    multiple: int = 1,
    effort: str = "default",
    rounds: int | None = None,
    drift: float | None = None,
    refine: int = 0,
    refine_toward: str = "predictions",
    embeddings: int | None = None,
    labels: str | None = None,
    nested: bool = False,
    statistics: Statistics | None = None,
    memory: int | str | None = None,
    seed: int = 0,
    stage: Stage = no_stage,
    work: Path | None = None,
) -> Plan:
    """Compress a model, in place, within a budget: the one call that the command line and all programs here make.

    The budget is one of `keep`, `bytes`, `bits`, `max_loss_increase`, `rank` and `plan`; without any, `keep=0.8`.
    Bytes, bits and a limit on the loss are shared out over bits and ranks, `keep` over ranks alone, unless `allow`
    says otherwise.

    Args:
        model: A transformers model, dense or already compressed.
        tokenizer: Its tokenizer; needed if `text` is text, not tokens.
        keep: Fraction of the sites' parameters to keep, in (0, 1].
        bytes: Bytes of the whole model, such as `120_000_000` or `"120MB"`.
        bits: Average bits of a weight of the sites, counting scales and everything else that is stored for them.
        max_loss_increase: Make the smallest model whose held-out loss increases by at most this, in nats per token.
        rank: One rank for all sites.
        plan: A plan whose forms and ranks are carried out as they are.
        text: What to calibrate on: a file, a data set name, a corpus, texts, or windows of token ids (windows,
            length), which are taken as they are.
        sequences: Number of windows of the text; by default that of the effort.
        length: Tokens per window; by default 512, or the model's limit if lower.
        batch_size: Windows per forward pass; by default 8, or fewer where their logits would take much memory.
        sites: Patterns or kinds of sites, or sites; by default all linear layers of the blocks that read text.
        method: A key of `rankfold.factorization.METHODS`; without it that of the plan, or `kfac`.
        allocation: A key of `rankfold.allocation.ALLOCATIONS`; by default the one that suits method and budget.
        form: A key of `rankfold.modules.FORMS`; by default the method's own.
        allow: What the budget may be spent on: `rank`, `bits`, or both (`"rank,bits"`).
        multiple: Ranks are rounded down to a multiple of this.
        effort: `quick` calibrates on 32 sequences and measures once; `default` on 128; `best` measures twice again on
            the compressed model and corrects its drift.
        rounds: Rounds after the first in which statistics are re-measured, for ordered methods; by default those of
            the effort, or none where bits are shared out.
        drift: Share of the drift that is corrected, 0 to 1, for ordered methods; by default that of the effort.
        refine: Gradient steps on each block after its factorization.
        refine_toward: `predictions` of the model, or each `block`'s own output.
        embeddings: Bits of the embeddings and the head, 2 to 8, or 16 to leave them; by default a budget of bytes
            chooses, where bits may be spent.
        labels: `text` or `sampled`; by default those of the text, if it has any.
        nested: Write one larger model that `rankfold.compression.shrink` cuts to any budget; the budget is ignored.
        statistics: What `calibrate` measured of the dense model, for several budgets over bits one after another.
        memory: Intermediate results and finished layers beyond this, in bytes or as `"8GB"`, lie in a temporary folder
            (`TMPDIR`) instead of memory; by default 3 % of what is free.
        seed: Random seed.
        stage: Opens a stage of work, for progress bars.
        work: Folder in which is kept what was worked out of sites and blocks, so that an interrupted run resumes; the
            caller removes it.

    Returns:
        The plan as it was carried out, also stored in the model's configuration.

    Raises:
        ValueError: If more than one budget is given or it cannot be met, a name is unknown, there is no text, or
            something that was read is not finite.
    """
    if isinstance(tokenizer, Plan):
        raise InputError(
            "A plan is carried out by factorize(model, plan, statistics), or by compress(model, tokenizer, plan=plan), "
            "which measures what it needs."
        )
    budget = Budget(keep=keep, bytes=bytes, bits=bits, max_loss_increase=max_loss_increase, rank=rank, plan=plan)
    if plan is not None:
        method, sites = _of_plan(plan, method, sites)
    ways = allow.split(",") if isinstance(allow, str) else allow
    settings = Settings(
        method=method or "kfac", allocation=allocation, form=form, allow=None if ways is None else tuple(ways),
        multiple=multiple, effort=effort, rounds=rounds, drift=drift, refine=refine, refine_toward=refine_toward,
        embeddings=embeddings, labels=labels, seed=seed,
        memory=parse_bytes(memory) if isinstance(memory, str) else memory,
    )  # fmt: skip
    chosen = _chosen(model, sites)
    settings.check(model, chosen, budget)
    reading = None
    if nested or settings.needs_text(budget):
        held_out = budget.max_loss_increase is not None
        reading = read_text(
            model, tokenizer, text, sequences=sequences or EFFORTS[effort].sequences, length=length,
            # Refinement takes a gradient step a batch, so its size is no matter of memory alone.
            batch_size=batch_size or (8 if refine else None), seed=seed, held_out=held_out,
        )  # fmt: skip
    if nested:
        assert reading is not None, "a nested model is measured"
        return _nest(model, chosen, settings, reading, stage)
    if statistics is not None and "bits" not in settings.ways(budget):
        raise InputError(
            "Statistics are taken over by a budget over bits (`bits`, or `allow`). With others, carry out the steps: "
            "allocate(sites, statistics, keep=...), factorize(model, plan, statistics)."
        )
    return _Compression(model, chosen, budget, settings, reading, stage, statistics).run(work)


def _chosen(model: Any, sites: Sequence[str | Site] | None) -> Sites:
    """The sites that patterns or sites name; without any those in the blocks that read text."""
    if isinstance(sites, Sites):
        return sites
    return find_sites(model).select([site.name if isinstance(site, Site) else site for site in sites or ()])


def _of_plan(
    plan: Plan, method: str | None, sites: Sequence[str | Site] | None
) -> tuple[str | None, Sequence[str | Site]]:
    """The method and the sites of a plan that is carried out as it is."""
    methods = {option.method or plan.method for option in plan.factorized}
    if method is not None and methods and methods != {method}:
        raise InputError(
            f"`plan` is filled by {', '.join(sorted(methods))}, but `method` is {method!r}. Leave `method` out."
        )
    names = [name for option in plan.options for name in option.sites]
    given = names if sites is None else sites
    return next(iter(methods), method), given


class _Compression:
    """One compression of a model, in place."""

    def __init__(
        self,
        model: Any,
        sites: Sites,
        budget: Budget,
        settings: Settings,
        reading: Reading | None,
        stage: Stage,
        statistics: Statistics | None = None,
    ) -> None:
        self.statistics = statistics
        self.model, self.sites, self.budget, self.settings = model, sites, budget, settings
        self.reading, self.stage = reading, stage
        self.batches: list[dict[str, Tensor]] = [] if reading is None else reading.batches
        self.labels = settings.labels or usual_labels(model, self.batches)
        if settings.refine and (len(self.batches) < 2 or any(site.calls > 1 for site in sites)):
            raise InputError(
                f"Refinement needs at least two batches of calibration text, but got {len(self.batches)}, and blocks "
                "that each forward pass applies once. Raise `sequences`, or leave `refine` out."
            )
        self.shelf = Shelf(usual_limit() if settings.memory is None else settings.memory)
        # Predicted losses of the dense model, while the factors behind them lie on the shelf.
        searched = budget.max_loss_increase is not None and settings.rounds_for(budget) == 0
        self.known: dict[str, list[float]] | None = {} if searched else None
        self.journal: Journal | None = None
        self.blocks = len({site.block for site in sites if site.block})
        self.dense: dict[str, nn.Module] = {site.name: linear_at(model, site.name) for site in sites}
        use_eager_experts(model)

    def run(self, work: Path | None) -> Plan:
        """Factorize within the budget, then refine where that was asked for."""
        budget, refine = self.budget, self.settings.refine
        digest = "" if work is None else fingerprint(self.model)
        if work is not None:
            asked = {**vars(budget), "plan": budget.plan and budget.plan.to_dict()}
            names = [site.name for site in self.sites]
            run = fingerprint(digest, asked, asdict(self.settings), names, self.batches, versions())
            kinds = (Ordered, Factors, Moments, SiteMoments, WidthLosses)
            self.journal = Journal(work / run, *kinds)
        teacher = None
        if refine and self.settings.refine_toward == "predictions" and predicts(self.model, self.batches[0]):
            teacher = _teacher(self.model, self.dense.values())
        if budget.max_loss_increase is None:
            saved = self.settings.most_saved(self.model, budget)
            plan = self.attempt(budget.keep_of(self.model, self.sites, saved), "")
        else:
            plan = self.search(budget.max_loss_increase)
        return self.refined(plan, teacher, None if work is None else (work, digest)) if refine else plan

    def attempt(self, keep: float | None, title: str) -> Plan:
        """Compress once."""
        model, settings, batches = self.model, self.settings, self.batches
        rounds, drift = settings.rounds_for(self.budget), settings.drift_for(self.budget)
        blocks = self.blocks
        facts = {} if self.reading is None else dict(self.reading.facts)
        # Forward and back; what is known of the dense model is not measured again.
        visits = 2 * blocks * (rounds + (0 if self.statistics or self.known else 1))
        # Two walks and, in each block, once for each of the usual four inputs.
        visits += 6 * blocks + 2 if drift else 0
        gradients = settings.needs_gradients(self.budget)
        if gradients:
            facts |= {"labels": self.labels, "effort": settings.effort}

        def allocated(losses: Mapping[str, Sequence[float]] | None) -> Plan:
            return replace(self._allocated(keep, losses), calibration=facts)

        if "bits" in settings.ways(self.budget):
            return self._shared(keep, facts, f"{title}measuring inputs and gradients", visits * len(batches))
        if gradients and settings.entry.ordered is not None:
            return compress_in_rounds(
                model, self.sites, batches, loss=summed_loss(model, self.labels, settings.seed), allocate=allocated,
                method=settings.method, rounds=rounds, drift=drift, shelf=self.shelf, journal=self.journal,
                known=self.known, on_step=self.stage(f"{title}measuring inputs and gradients", visits * len(batches)),
            )  # fmt: skip
        if gradients:
            advance = self.stage(f"{title}measuring inputs and gradients", (2 * blocks + 1) * len(batches))
            loss = summed_loss(model, self.labels, settings.seed)
            statistics = calibrate(model, self.sites, batches, method=settings.method, loss=loss, on_step=advance)
            plan = allocated(statistics.losses(settings.method))
            advance = self.stage(f"{title}sites", len(self.sites))
            return factorize(model, plan, statistics, advance, self.shelf, self.journal)
        if settings.entry.needs_data:
            advance = self.stage(f"{title}blocks x batches", (blocks + 1) * len(batches))
            return factorize_blocks(model, allocated(None), self.sites, batches, advance, self.shelf, self.journal)
        advance = self.stage(f"{title}sites", len(self.sites))
        return factorize(model, allocated(None), None, advance, self.shelf, self.journal)

    def _shared(self, keep: float | None, facts: Mapping[str, Any], title: str, steps: int) -> Plan:
        """Compress once, the budget shared out over bits and ranks."""
        settings = self.settings
        rounds = settings.rounds_for(self.budget)
        ways = settings.ways(self.budget)
        widths = settings.embedding_bits(self.model, self.budget)
        embeddings = _Embeddings(self.model, self.batches, widths, self.stage) if widths else None
        advance = self.stage(title, steps)

        def within(keep: float | None, losses: Mapping[str, WidthLosses]) -> Plan:
            return allocate(
                self.sites, keep=keep, losses=losses, allow=ways, multiple=settings.multiple, seed=settings.seed
            )

        def allocated(losses: Mapping[str, WidthLosses]) -> Plan:
            if embeddings is None:
                chosen = within(keep, losses)
            else:
                chosen = embeddings.allocated(
                    lambda saved: within(self.budget.keep_of(self.model, self.sites, saved), losses)
                )
            more = {**facts, "allow": ",".join(ways), "uniform": uniform_widths(self.sites, losses)}
            return replace(chosen, calibration={**chosen.calibration, **more})

        loss = summed_loss(self.model, self.labels, settings.seed)
        return compress_in_bits(
            self.model, self.sites, self.batches, loss=loss, allocate=allocated, rounds=rounds,
            drift=settings.drift_for(self.budget), statistics=self.statistics, shelf=self.shelf, journal=self.journal,
            on_step=advance,
        )  # fmt: skip

    def _allocated(self, keep: float | None, losses: Mapping[str, Sequence[float]] | None) -> Plan:
        """The plan for a budget; a given plan with what is predicted of it now."""
        if self.budget.plan is None:
            return allocate(self.sites, **self.settings.choice(self.budget, keep), losses=losses)
        known = losses or {}

        def predicted(option: Option) -> float | None:
            if option.form == DENSE or not all(name in known for name in option.sites):
                return None
            return sum(known[name][option.ranks[0]] for name in option.sites)

        given = self.budget.plan.options
        options = tuple(replace(option, loss=predicted(option), structure={}) for option in given)
        return replace(self.budget.plan, options=options)

    def search(self, limit: float) -> Plan:
        """The smallest `keep` whose loss on held-out text rises by no more than the limit, by bisection."""
        model, dense = self.model, self.dense
        held_out = None if self.reading is None else self.reading.held_out
        assert held_out is not None, "a limit on the loss is verified on held-out text"
        before = next_token_quality(model, held_out).loss
        earlier = getattr(model.config, "rankfold", None)
        shares_bits = "bits" in self.settings.ways(self.budget)
        if shares_bits and self.statistics is None:
            advance = self.stage("measuring inputs and gradients", 2 * self.blocks * len(self.batches))
            loss = summed_loss(model, self.labels, self.settings.seed)
            self.statistics = calibrate(model, self.sites, self.batches, loss=loss, shelf=self.shelf, on_step=advance)
        # Bits are few or many by factors, parameters by differences.
        low, high = (FEWEST_BYTES if shares_bits else 0.0), 1.0
        best: float | None = None
        rise = 0.0
        tried: float | None = None
        plan: Plan | None = None
        for number in range(1, SEARCH_STEPS + 1):
            middle = math.sqrt(low * high) if shares_bits else (low + high) / 2
            try:
                plan, tried = self.attempt(middle, f"try {number} of {SEARCH_STEPS}, keep {middle:.3f}: "), middle
                rise = next_token_quality(model, held_out).loss - before
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
                f"No compression keeps the loss increase within {limit:g} nats per token: removing {high - low:.3f} "
                "of the sites already costs more. Raise `max_loss_increase`, or recover afterwards (rankfold "
                "recover)."
            )
        if plan is None or tried != best:
            plan = self.attempt(best, f"keep {best:.3f}: ")
            rise = next_token_quality(model, held_out).loss - before
        facts = {"max_loss_increase": limit, "measured_increase": round(rise, 5), "dense_loss": round(before, 5)}
        return note(model, plan, facts)

    def refined(self, plan: Plan, teacher: Any, work: tuple[Path, str] | None) -> Plan:
        """The plan after every block was trained towards the dense model."""
        model, settings = self.model, self.settings
        steps = settings.refine
        chosen = [(option.sites, option.form, option.ranks) for option in plan.options]
        folder = None
        if work is not None:
            folder = work[0] / fingerprint(work[1], chosen, asdict(settings), self.batches)
        advance = self.stage("refining blocks", steps * self.blocks)
        training: dict[str, Any] = {"steps": steps, "seed": settings.seed, "work": folder, "on_step": advance}
        if teacher is not None:
            refine_predictions(model, teacher, self.batches, **training)
        else:
            refine_blocks(model, self.batches, self.dense, **training)
        toward = "block" if teacher is None else "predictions"
        plan = note(model, plan, {"refine": steps, "refine_toward": toward})
        held_out = None if self.reading is None else self.reading.held_out
        if held_out is not None and "measured_increase" in plan.calibration:
            rise = next_token_quality(model, held_out).loss - plan.calibration["dense_loss"]
            plan = note(model, plan, {"measured_increase": round(rise, 5)})
        return plan


class _Embeddings:
    """The embeddings of one compression: in the width that leaves the whole model the smallest predicted loss."""

    def __init__(self, model: Any, batches: Sequence[Mapping[str, Tensor]], bits: Sequence[int], stage: Stage) -> None:
        self.model, self.batches = model, batches
        self.dense_bytes = find_embeddings(model).bytes
        few = [width for width in bits if width != UNTOUCHED]
        self.widths = embedding_widths(model, batches, few, stage("measuring embeddings in few bits", len(few)))
        if UNTOUCHED in bits:
            self.widths.append(Width(UNTOUCHED, self.dense_bytes, 0.0))
        self.facts: dict[str, Any] = {}

    def allocated(self, within: Callable[[int], Plan]) -> Plan:
        """The plan of the sites, given the bytes that embeddings save of the whole; these are then put in place."""
        plans: list[tuple[float, Plan, Width]] = []
        refused: list[InputError] = []
        for width in self.widths:
            try:
                plan = within(self.dense_bytes - width.bytes)
            except InputError as error:
                refused.append(error)
            else:
                plans.append((OPTIMISM * (plan.predicted_loss or 0.0) + width.loss, plan, width))
        if not plans:
            raise refused[0]
        _, plan, chosen = min(plans, key=lambda each: each[0])
        if chosen.bits != UNTOUCHED and not self.facts:
            stored = put_in_bits(self.model, chosen.bits, self.batches)
            self.facts = {"embeddings": {**stored, "divergence": float(f"{chosen.loss:.4g}")}}
        # Later rounds only choose the sites anew.
        self.widths = [chosen]
        return replace(plan, calibration={**plan.calibration, **self.facts})


def _nest(model: Any, sites: Sequence[Site], settings: Settings, reading: Reading, stage: Stage) -> Plan:
    """Write a model, in place, as one for many budgets."""
    if settings.entry.ordered is None:
        raise InputError(
            f"A nested model needs the factors of every rank at once, which {settings.method} does not "
            "provide. Use kfac."
        )
    blocks = len({site.block for site in sites if site.block})
    advance = stage("measuring inputs and gradients", 2 * blocks * len(reading.batches))
    labels = settings.labels or usual_labels(model, reading.batches)
    loss = summed_loss(model, labels, settings.seed)
    statistics = calibrate(model, sites, reading.batches, method=settings.method, loss=loss, on_step=advance)
    plan = nest(model, sites, statistics, settings.method)
    model.config.rankfold = {**model.config.rankfold, "seed": settings.seed}
    return replace(note(model, plan, {**reading.facts, "labels": labels}), seed=settings.seed)


def _teacher(model: Any, shared: Iterable[nn.Module]) -> Any:
    """The dense model once more, sharing what compression leaves alone: the layers that it replaces, the embeddings."""
    inside = {id(part) for path in block_paths(model) for part in model.get_submodule(path).parameters()}
    parts = [part for part in model.parameters() if id(part) not in inside]
    parts += [part for layer in shared for part in layer.parameters()]
    return copy.deepcopy(model, {id(part): part for part in parts})


def note(model: Any, plan: Plan, facts: Mapping[str, Any]) -> Plan:
    """The plan with more facts, which the model's configuration holds too, beside those of earlier compressions."""
    stored = dict(model.config.rankfold)
    model.config.rankfold = {**stored, "calibration": {**stored["calibration"], **facts}}
    return replace(plan, calibration={**plan.calibration, **facts})
