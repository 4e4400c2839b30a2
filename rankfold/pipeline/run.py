"""One run of the engine over a model: tries within a budget, then refinement where that was asked for."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor, get_num_threads, nn

from rankfold.allocation import FACTOR_BITS, BudgetError, WidthLosses, allocate, form_for, uniform_widths
from rankfold.calibration import Statistics, calibrate, summed_loss, usual_labels
from rankfold.circumstances import versions
from rankfold.compression import compress_in_rounds, factorize, factorize_blocks, restore
from rankfold.cost import SPEED_OF, OptionSeconds, model_seconds, seconds_of_layers, share_for, timed_layers
from rankfold.errors import InputError
from rankfold.factorization import Factors, Moments, Ordered, SiteMoments
from rankfold.fingerprint import fingerprint
from rankfold.journal import Journal
from rankfold.modules import linear_at, use_eager_experts
from rankfold.pipeline.budget import Budget
from rankfold.pipeline.embeddings import EmbeddingWidths
from rankfold.pipeline.reading import Reading
from rankfold.pipeline.search import smallest_within
from rankfold.pipeline.settings import Settings
from rankfold.pipeline.workers import Workers
from rankfold.plan import DENSE, Option, Plan
from rankfold.progress import Stage
from rankfold.quality import next_token_quality
from rankfold.quantization import WIDTHS, compress_in_bits
from rankfold.recovery import predicts, refine_blocks, refine_predictions
from rankfold.shelf import Shelf, usual_limit
from rankfold.sites import Sites, block_paths

FEWEST_BYTES = 1 / 32
"""Share of the bytes from which on a limit on the loss is searched where bits are shared out."""


class Run:
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
        self.workers: Workers | None = None
        self.journal: Journal | None = None
        self.embeddings: EmbeddingWidths | None = None
        self.price: OptionSeconds | None = None
        self.blocks = len({site.block for site in sites if site.block})
        self.dense: dict[str, nn.Module] = {site.name: linear_at(model, site.name) for site in sites}
        use_eager_experts(model)

    def share(self, count: int, ray: str | None) -> None:
        """Let workers of a cluster share the measuring of the dense model."""
        settings = self.settings
        if not settings.needs_gradients(self.budget) or settings.entry.ordered is None:
            raise InputError(
                "Workers share the measuring of inputs and gradients, from which the method "
                f"{settings.method!r} does not factorize. Leave `workers` out, or use kfac."
            )
        memory = usual_limit() // count if settings.memory is None else settings.memory
        self.workers = Workers(
            self.model, self.batches, self.labels, settings.seed, count=count, address=ray, memory=memory
        )

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
        if budget.speedup is not None:
            plan = self.faster(budget.speedup)
        elif budget.max_loss_increase is None:
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
            advance = self.stage(f"{title}measuring inputs and gradients", visits * len(batches))
            workers = self.workers
            products = settings.entry.reads_products and not drift
            source = (
                None
                if workers is None
                else lambda rest: workers.factors(rest, settings.method, advance, products=products)
            )
            return compress_in_rounds(
                model, self.sites, batches, loss=summed_loss(model, self.labels, settings.seed), allocate=allocated,
                method=settings.method, rounds=rounds, drift=drift, shelf=self.shelf, journal=self.journal,
                known=self.known, source=source, on_step=advance,
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
        if widths and self.embeddings is None:
            self.embeddings = EmbeddingWidths(self.model, self.batches, widths, self.stage)
        embeddings = self.embeddings
        advance = self.stage(title, steps)

        def within(keep: float | None, losses: Mapping[str, WidthLosses]) -> Plan:
            return allocate(
                self.sites, keep=keep, losses=losses, allow=ways, multiple=settings.multiple, price=self.price,
                seed=settings.seed,
            )  # fmt: skip

        def allocated(losses: Mapping[str, WidthLosses]) -> Plan:
            if embeddings is None:
                chosen = within(keep, losses)
            else:
                chosen = embeddings.allocated(lambda saved: within(self._keep_of(keep, saved), losses))
            more = {**facts, "allow": ",".join(ways), "uniform": uniform_widths(self.sites, losses)}
            return replace(chosen, calibration={**chosen.calibration, **more})

        loss = summed_loss(self.model, self.labels, settings.seed)
        workers = self.workers
        source = None if workers is None else lambda rest: workers.moments(rest, advance)
        return compress_in_bits(
            self.model, self.sites, self.batches, loss=loss, allocate=allocated, rounds=rounds,
            drift=settings.drift_for(self.budget), statistics=self.statistics, source=source, shelf=self.shelf,
            journal=self.journal, on_step=advance,
        )  # fmt: skip

    def _keep_of(self, share: float | None, saved: int) -> float | None:
        """The fraction of the sites' bytes that is left where embeddings save some; `share` is a try's, if any."""
        if self.price is not None:
            # In seconds, of which embeddings save none that was predicted.
            return share
        if self.budget.max_loss_increase is None:
            return self.budget.keep_of(self.model, self.sites, saved)
        assert share is not None, "a search tries shares"
        assert self.embeddings is not None, "what saves bytes"
        sites = sum(site.parameters * site.bytes_per_parameter for site in self.sites)
        both = sites + self.embeddings.dense_bytes
        left = (share * both - (self.embeddings.dense_bytes - saved)) / sites
        if left <= 0:
            raise BudgetError(f"{share:.3f} of the bytes of layers and embeddings do not hold the embeddings.")
        return min(1.0, left)

    def _allocated(self, keep: float | None, losses: Mapping[str, Sequence[float]] | None) -> Plan:
        """The plan for a budget; a given plan with what is predicted of it now."""
        if self.budget.plan is None:
            chosen = self.settings.choice(self.budget, keep)
            return allocate(self.sites, **(chosen | ({"price": self.price} if self.price else {})), losses=losses)
        known = losses or {}

        def predicted(option: Option) -> float | None:
            if option.form == DENSE or not all(name in known for name in option.sites):
                return None
            return sum(known[name][option.ranks[0]] for name in option.sites)

        given = self.budget.plan.options
        options = tuple(replace(option, loss=predicted(option), structure={}) for option in given)
        return replace(self.budget.plan, options=options)

    def faster(self, speedup: float | int) -> Plan:
        """Compress until the model is predicted to be so many times as fast, then time it beside the dense one."""
        model, settings, names = self.model, self.settings, [site.name for site in self.sites]
        dense = _twin(model)
        found = self._timed(dense)
        whole, self.price = found["whole"], OptionSeconds(self.sites, found["layers"])
        layers = sum(self.price(Option(sites=(name,))) for name in names)
        most = whole / max(whole - layers + self.price.fastest(names), 1e-9)
        if speedup >= most:
            raise InputError(
                f"`speedup` must lie below {most:.2f} here, but got {speedup:g}: the layers take {layers * 1e3:.1f} of "
                f"{whole * 1e3:.1f} ms, and what can be made of them takes {self.price.fastest(names) * 1e3:.1f} at "
                "least. Ask for less, or allow more (`allow`)."
            )
        plan = self.attempt(share_for(speedup, whole, layers), "")
        seconds = model_seconds({"dense": dense, "compressed": model}, settings.speed_of)
        measured = round(seconds["dense"] / seconds["compressed"], 3)
        return note(model, plan, {"speedup": speedup, "speed_of": settings.speed_of, "measured_speedup": measured})

    def _timed(self, dense: Any) -> dict[str, Any]:
        """Seconds of the dense model and of its layers in every kind, measured once in a resumed run."""
        settings, ways = self.settings, self.settings.ways(self.budget)
        weight = next(dense.parameters())
        kept = None if self.journal is None else self.journal.of("seconds")
        # Another device would take other times, and the same run must choose the same after a kill.
        place = f"{weight.device} {get_num_threads()}"
        if kept is not None and place in kept:
            return kept[place]  # type: ignore[no-any-return]
        whole = model_seconds({"dense": dense}, settings.speed_of)["dense"]
        kinds = timed_layers(
            self.sites,
            form_for(settings.method, settings.form),
            WIDTHS if "bits" in ways else (),
            FACTOR_BITS if len(ways) > 1 else (),
        )
        listed = [*kinds]
        advance = self.stage("timing layers", len(listed))
        found = {"whole": whole, "layers": seconds_of_layers(dense, listed, SPEED_OF[settings.speed_of], advance)}
        if kept is not None:
            kept[place] = found
        return found

    def search(self, limit: float) -> Plan:
        """Compress as far as the loss on held-out text rises by no more than a limit."""
        model = self.model
        held_out = None if self.reading is None else self.reading.held_out
        assert held_out is not None, "a limit on the loss is verified on held-out text"
        before = next_token_quality(model, held_out).loss
        earlier = getattr(model.config, "rankfold", None)
        shares_bits = "bits" in self.settings.ways(self.budget)
        if shares_bits and self.statistics is None:
            self.statistics = self._measured()

        def back() -> None:
            if self.embeddings is not None:
                self.embeddings.restore()
            restore(model, self.dense, earlier)

        def rise() -> float:
            return next_token_quality(model, held_out).loss - before

        fewest = FEWEST_BYTES if shares_bits else 0.0
        plan, measured = smallest_within(limit, self.attempt, rise, back, fewest)
        facts = {"max_loss_increase": limit, "measured_increase": round(measured, 5), "dense_loss": round(before, 5)}
        return note(model, plan, facts)

    def _measured(self) -> Statistics:
        """The moments of the dense model, measured here or by the workers."""
        advance = self.stage("measuring inputs and gradients", 2 * self.blocks * len(self.batches))
        if self.workers is not None:
            moments: Any = self.shelf
            moments.update(self.workers.moments(self.sites, advance))
            return Statistics(self.model, self.sites, moments)
        loss = summed_loss(self.model, self.labels, self.settings.seed)
        return calibrate(self.model, self.sites, self.batches, loss=loss, shelf=self.shelf, on_step=advance)

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


def _twin(model: Any) -> Any:
    """The model once more, sharing all that is stored, so that it stays as it is while the other's layers change."""
    return copy.deepcopy(model, {id(part): part for part in (*model.parameters(), *model.buffers())})


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
