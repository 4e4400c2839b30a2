"""Compression in rounds: the statistics are measured again on the compressed model, and the ranks chosen anew."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.architectures import release
from rankfold.calibration import Loss, calibrate_blocks, is_reached
from rankfold.compression.drift import correct_drift
from rankfold.compression.replace import finish, split_off
from rankfold.errors import InputError
from rankfold.factorization import METHODS, Ordered, SiteMoments
from rankfold.fingerprint import fingerprint
from rankfold.journal import Journal
from rankfold.modules import factorized_module, linear_at, matrix_of, use_eager_experts
from rankfold.plan import DENSE, Option, Plan
from rankfold.progress import Step, no_step
from rankfold.shelf import Shelf
from rankfold.sites import Site

Allocate = Callable[[Mapping[str, Sequence[float]]], Plan]
"""From the predicted loss of every site at each rank to a plan."""

Source = Callable[[Sequence[Site]], Iterator[tuple[str, Ordered]]]
"""The factors of every rank of some sites of the dense model, by name, as they are worked out."""


def compress_in_rounds(  # noqa: PLR0913
    model: Any,
    sites: Sequence[Site],
    batches: Iterable[Mapping[str, Tensor]],
    *,
    loss: Loss,
    allocate: Allocate,
    method: str = "kfac",
    rounds: int = 2,
    drift: float = 0.5,
    shelf: Shelf | None = None,
    journal: Journal | None = None,
    known: dict[str, list[float]] | None = None,
    source: Source | None = None,
    on_step: Step = no_step,
) -> Plan:
    """Compress a model in place by two-sided weighting, re-measuring what compression has changed.

    The first round's moments belong to the dense model. Once compressed, the model sees different inputs and
    gradients; every further round measures those, and factorizes the dense weights again with them. Finally, the
    layers are corrected for the drift of their inputs (`correct_drift`). All of it is closed-form.

    Args:
        model: A transformers model; its dense weights stay in memory beside the compressed ones until the end.
        sites: What may be factorized.
        batches: Calibration batches on the model's device.
        loss: The loss whose gradients weight the outputs (`rankfold.calibration.summed_loss`).
        allocate: Chooses the plan of a round, usually `rankfold.allocate` with a budget.
        method: A method that gives the factors of every rank at once (`Method.ordered`).
        rounds: Rounds after the first.
        drift: Share of the drift that is corrected, 0 to 1.
        shelf: Where hidden states, the factors of every site and finished layers lie; without it in memory.
        journal: What an interrupted run has worked out of single sites, and this one does; the factors of every site
            lie there instead of on the shelf.
        known: Predicted losses of the dense model's sites. Empty ones are filled; those of an earlier call without
            rounds and with the same drift on the same shelf, where their factors are, save measuring them again.
        source: Where the first round's factors come from; without it they are worked out here.
        on_step: Called after each batch has passed a block.

    Returns:
        The plan as it was carried out.

    Raises:
        ValueError: If the method is not ordered, a weight, an activation or a gradient is not finite, or the budget
            cannot be met.
    """
    decompose = METHODS[method].ordered
    if decompose is None:
        raise InputError(
            f"Rounds re-choose ranks, for which a method must provide the factors of every rank at once, but {method} "
            "does not. Factorize once: calibrate, allocate, factorize. Methods that do: "
            f"{', '.join(_ordered_methods())}."
        )
    batches = list(batches)
    dense: dict[str, nn.Module] = {}
    shelf = Shelf() if shelf is None else shelf
    ordered: MutableMapping[Any, Ordered]
    losses = {} if known is None else known
    plan = None
    if losses:
        use_eager_experts(model)
        dense = {site.name: linear_at(model, site.name) for site in sites}
    for number in range(rounds + 1):
        ordered = shelf if journal is None else journal.of(_state(plan))
        if not losses or number:
            dense = dense or {site.name: linear_at(model, site.name) for site in sites}
            # Layers that are compressed already do not show what the dense ones would give.
            products = METHODS[method].reads_products and not number and not drift
            here = partial(_worked_out, model, batches, dense, decompose, loss, shelf, on_step, products)
            losses.update(_measured(model, sites, batches, ordered, (not number and source) or here, on_step))
        plan = allocate(losses)
        # Factors that nothing asks for again need not wait longer.
        used_up = known is None and not drift and number == rounds and journal is None
        plan = _carry_out(model, plan, dense, ordered, shelf, used_up)
    assert plan is not None, "there is at least one round"
    if drift:
        correct_drift(model, sites, plan, batches, dense, ordered, share=drift, shelf=shelf, on_step=on_step)
    return finish(model, replace(plan, calibration={**plan.calibration, "rounds": rounds, "drift": drift}))


def _state(plan: Plan | None) -> str:
    """A name for what a model has become by a plan, on which what is measured of it depends."""
    if plan is None:
        return "dense"
    return fingerprint([(option.sites, option.form, option.ranks) for option in plan.options])


def _measured(
    model: Any,
    sites: Sequence[Site],
    batches: Sequence[Mapping[str, Tensor]],
    ordered: MutableMapping[Any, Ordered],
    source: Source,
    on_step: Step,
) -> dict[str, list[float]]:
    """Predicted losses of every site that is reached, by its factorization, which is put down in `ordered`."""
    done = {site.name for site in sites if isinstance(ordered, Journal) and site.name in ordered}
    losses = {name: ordered[name].losses.tolist() for name in done}
    # Sites that read one input are measured together or not at all: what is measured of them depends on all of them.
    missing = {site.reads for site in sites if site.name not in done}
    rest = [site for site in sites if site.reads in missing]
    use_eager_experts(model)
    if not rest:
        for _ in range(2 * len({site.block for site in sites}) * len(batches)):
            on_step()
    for name, found in source(rest) if rest else ():
        ordered[name], losses[name] = found, found.losses.tolist()
    return losses


def _worked_out(  # noqa: PLR0913, PLR0917
    model: Any,
    batches: Sequence[Mapping[str, Tensor]],
    dense: Mapping[str, nn.Module],
    decompose: Callable[..., Ordered],
    loss: Loss,
    shelf: Shelf,
    on_step: Step,
    products: bool,
    sites: Sequence[Site],
) -> Iterator[tuple[str, Ordered]]:
    """The factors of sites, measured block by block."""
    for block in calibrate_blocks(model, sites, batches, on_step, loss, shelf, products=products):
        for name in list(block.moments):
            # Not to be alive while the next block is measured.
            moments = block.moments.pop(name)
            if is_reached(moments, gradients=True):
                yield name, decomposed(name, dense[name], moments, decompose)


def restore(model: Any, dense: Mapping[str, nn.Module], earlier: Mapping[str, Any] | None = None) -> None:
    """Put dense layers back, in place, for another try with another budget.

    Args:
        model: A model that was compressed.
        dense: The layers that stood where its factorized ones stand.
        earlier: The plan in its configuration before, if it had been compressed already.
    """
    for name, module in dense.items():
        linear_at(model, name)
        model.set_submodule(name, module)
    use_eager_experts(model)
    if earlier is None:
        release(model)
    else:
        model.config.rankfold = dict(earlier)


def with_layers(model: Any, layers: Mapping[str, nn.Module]) -> Any:
    """A copy of a model that shares all numbers with it, with other layers at some paths."""
    shared = {id(part): part for part in [*model.parameters(), *model.buffers()]}
    made = copy.deepcopy(model, shared)
    for name, layer in layers.items():
        linear_at(made, name)
        made.set_submodule(name, layer)
    return made


def _ordered_methods() -> list[str]:
    return [name for name, method in METHODS.items() if method.ordered is not None]


@torch.no_grad()
def decomposed(name: str, linear: nn.Module, moments: SiteMoments, decompose: Callable[..., Ordered]) -> Ordered:
    """The factors of every rank of one site, kept in the precision of the weight."""
    W, b = matrix_of(linear)
    try:
        found = decompose(W, b, moments)
    except ValueError as error:
        error.args = (f"{name}: {error}",)
        raise
    reader = None if found.reader is None else found.reader.to(W.dtype)
    return found._replace(up=found.up.to(W.dtype), down=found.down.to(W.dtype), reader=reader)


@torch.no_grad()
def _carry_out(
    model: Any,
    plan: Plan,
    dense: Mapping[str, nn.Module],
    ordered: MutableMapping[Any, Ordered],
    shelf: Shelf,
    used_up: bool,
) -> Plan:
    """Put the modules of a plan in place; sites without statistics stay dense."""
    take = ordered.pop if used_up else ordered.__getitem__
    options: list[Option] = []
    for option in plan.options:
        unreached = [name for name in option.sites if name not in ordered and option.form != DENSE]
        shrinkages: list[float] = []
        for name in option.sites:
            linear: Any = dense[name]
            if option.form == DENSE or name in unreached:
                model.set_submodule(name, linear)
                continue
            found = take(name)
            shrinkages.append(found.shrinkage)
            factors = found.truncate(*matrix_of(linear), option.ranks[0])
            module = factorized_module(factors, option.form, linear.weight)
            model.set_submodule(name, shelf.hold(module.requires_grad_(linear.weight.requires_grad)))
        noted = replace(option, shrinkage=max(shrinkages)) if shrinkages else option
        options.extend(split_off(model, noted, unreached))
    return replace(plan, options=tuple(options))
