"""The front door: from a model, a text and a budget in the user's words to a compressed model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rankfold.calibration import BUNDLED, Corpus, Statistics, calibrate, summed_loss, usual_labels
from rankfold.compression import nest
from rankfold.errors import InputError
from rankfold.pipeline.budget import Budget, parse_bytes
from rankfold.pipeline.reading import Reading, read_text
from rankfold.pipeline.run import Run, note
from rankfold.pipeline.settings import EFFORTS, Settings
from rankfold.plan import Plan
from rankfold.progress import Stage, no_stage
from rankfold.sites import Site, Sites, find_sites


def compress(  # noqa: PLR0913
    model: Any,
    tokenizer: Any = None,
    *,
    keep: float | None = None,
    bytes: int | str | None = None,
    bits: float | int | None = None,
    max_loss_increase: float | None = None,
    speedup: float | int | None = None,
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
    multiple: int | None = None,
    effort: str = "default",
    rounds: int | None = None,
    drift: float | None = None,
    refine: int = 0,
    refine_toward: str = "predictions",
    embeddings: int | None = None,
    speed_of: str = "decode",
    labels: str | None = None,
    nested: bool = False,
    statistics: Statistics | None = None,
    memory: int | str | None = None,
    workers: int = 0,
    ray: str | None = None,
    seed: int = 0,
    stage: Stage = no_stage,
    work: Path | None = None,
) -> Plan:
    """Compress a model, in place, within a budget: the one call that the command line and all programs here make.

    The budget is one of `keep`, `bytes`, `bits`, `max_loss_increase`, `speedup`, `rank` and `plan`; without any,
    `keep=0.8`. Bytes, bits, seconds and a limit on the loss are shared out over bits and ranks, `keep` over ranks
    alone, unless `allow` says otherwise.

    Args:
        model: A transformers model, dense or already compressed.
        tokenizer: Its tokenizer; needed if `text` is text, not tokens.
        keep: Fraction of the sites' parameters to keep, in (0, 1].
        bytes: Bytes of the whole model, such as `120_000_000` or `"120MB"`.
        bits: Average bits of a weight of the sites, counting scales and everything else that is stored for them.
        max_loss_increase: Make the smallest model whose held-out loss increases by at most this, in nats per token.
        speedup: How many times as fast the whole model shall be on this machine: a layer's options are priced by their
            seconds, which are measured here.
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
        multiple: Ranks are rounded down to a multiple of this; by default a knapsack over ranks alone (`keep`) chooses
            among multiples of about a 32nd of the full rank, since many different shapes are slow, and one over bits
            too among multiples of 8.
        effort: `quick` calibrates on 32 sequences and measures once; `default` on 128; `best` measures twice again on
            the compressed model and corrects its drift.
        rounds: Rounds after the first in which statistics are re-measured, for ordered methods; by default those of
            the effort, or none where bits are shared out.
        drift: Share of the drift that is corrected, 0 to 1, for ordered methods; by default that of the effort.
        refine: Gradient steps on each block after its factorization.
        refine_toward: `predictions` of the model, or each `block`'s own output.
        embeddings: Bits of the embeddings and the head, 2 to 8, or 16 to leave them; by default a budget of bytes or
            a limit on the loss chooses, where bits may be spent.
        speed_of: What `speedup` is of: `decode`, one token after the other, or `prompt`, of 128 tokens.
        labels: `text` or `sampled`; by default those of the text, if it has any.
        nested: Write one larger model that `rankfold.compression.shrink` cuts to any budget; the budget is ignored.
        statistics: What `calibrate` measured of the dense model, for several budgets over bits one after another.
        memory: Intermediate results and finished layers beyond this, in bytes or as `"8GB"`, lie in a temporary folder
            (`TMPDIR`) instead of memory; by default 3 % of what is free.
        workers: Workers of a Ray cluster that share the measuring of inputs and gradients, each with one processor or
            accelerator; they load the model from where it came from. Without any all is done in this process.
        ray: Address of a running cluster, `auto` for the one of this machine; without it one is started here.
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
    budget = Budget(
        keep=keep, bytes=bytes, bits=bits, max_loss_increase=max_loss_increase, speedup=speedup, rank=rank, plan=plan
    )
    if plan is not None:
        method, sites = _of_plan(plan, method, sites)
    ways = allow.split(",") if isinstance(allow, str) else allow
    settings = Settings(
        method=method or "kfac", allocation=allocation, form=form, allow=None if ways is None else tuple(ways),
        multiple=multiple, effort=effort, rounds=rounds, drift=drift, refine=refine, refine_toward=refine_toward,
        embeddings=embeddings, speed_of=speed_of, labels=labels, seed=seed,
        memory=parse_bytes(memory) if isinstance(memory, str) else memory,
    )  # fmt: skip
    if (workers and nested) or (ray is not None and not workers):
        raise InputError(
            "A Ray cluster is used by `workers` (1 or more), which share the measuring for one budget: pass them with "
            "`ray`, and not with `nested`."
        )
    places = set(getattr(model, "hf_device_map", {}).values())
    if len(places) > 1 or "disk" in places:
        raise InputError(
            "A model that is spread over devices, or lies on disk, is measured as it is but not compressed. Load it on "
            "one device: compression maps weights from their files and works on one block at a time."
        )
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
    run = Run(model, chosen, budget, settings, reading, stage, statistics)
    if workers:
        run.share(workers, ray)
    return run.run(work)


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
