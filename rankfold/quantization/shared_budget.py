"""One budget over bits and ranks: what every site would lose is measured, and the plan carried out in order."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.allocation import WidthLosses
from rankfold.calibration import Loss, Statistics, calibrate_blocks, is_reached
from rankfold.compression import Streams, finish, fit_along
from rankfold.errors import InputError
from rankfold.factorization import SiteMoments
from rankfold.journal import Journal
from rankfold.modules import GroupEmbedding, GroupLinear, linear_at, matrix_of, set_matrix, use_eager_experts
from rankfold.plan import Plan
from rankfold.progress import Step, no_step
from rankfold.quantization.fitting import fit, width_losses
from rankfold.quantization.gptq import Groups
from rankfold.shelf import Shelf
from rankfold.sites import Site

Allocate = Callable[[Mapping[str, WidthLosses]], Plan]
"""From the predicted losses of every site to a plan."""

Source = Callable[[Sequence[Site]], Iterator[tuple[str, SiteMoments]]]
"""The moments of some sites of the dense model, by name, as they are measured."""


def compress_in_bits(  # noqa: PLR0913
    model: Any,
    sites: Sequence[Site],
    batches: Sequence[Mapping[str, Tensor]],
    *,
    loss: Loss,
    allocate: Allocate,
    rounds: int = 0,
    drift: float = 0.5,
    statistics: Statistics | None = None,
    source: Source | None = None,
    shelf: Shelf | None = None,
    journal: Journal | None = None,
    on_step: Step = no_step,
) -> Plan:
    """Share one budget over bits and ranks, in place, each layer fitted to what the compressed ones before it give.

    Args:
        model: A transformers model.
        sites: Its sites.
        batches: Calibration batches on the model's device.
        loss: What is followed back.
        allocate: Chooses among options by their predicted losses.
        rounds: Rounds after the first in which statistics are measured again, and options chosen anew.
        drift: Share of the drift that is corrected, 0 to 1.
        statistics: What `calibrate` measured of the dense model, in place of the first measuring; what is derived of
            it is kept there, so that the next budget costs less.
        source: Where the first round's moments come from; without it they are measured here.
        shelf: Where hidden states, the moments of every site and finished layers lie; without it in memory.
        journal: What an interrupted run has measured of the dense model, and this one does.
        on_step: Called after each batch has passed a block.

    Returns:
        The plan as it was carried out, with the losses of what is stored.

    Raises:
        ValueError: If a weight, an activation or a gradient is not finite, or the budget cannot be met.
    """
    dense: dict[str, Any] = {}
    plan = None
    for number in range(rounds + 1):
        losses: dict[str, WidthLosses] = {}
        known = statistics if number == 0 else None
        kept: MutableMapping[str, Any] = {} if known is None else known.kept
        measured: Any = known
        if known is None and journal is not None and number == 0:
            measured, kept = journal.of("moments"), journal.of("losses")
        elif known is None:
            measured = Shelf() if shelf is None else shelf
            measured.clear()
        found = (
            _measured(
                model,
                sites,
                batches,
                on_step,
                measured,
                (not number and source) or partial(_here, model, batches, on_step, loss, shelf),
            )
            if known is None
            else _given(model, sites, known)
        )
        for name, moments in found:
            dense.setdefault(name, linear_at(model, name))
            if is_reached(moments, gradients=True):
                W, b = matrix_of(dense[name])
                if name not in kept:
                    kept[name] = _named(name, partial(width_losses, W, moments, centred=b is not None))
                losses[name] = kept[name]
        plan = allocate(losses)
        for name, layer in dense.items():
            model.set_submodule(name, layer)
        share = drift if number == rounds else 0.0
        plan = _carried_out(
            model, sites, plan, batches, dense, measured, share, Shelf() if shelf is None else shelf, on_step
        )
    assert plan is not None, "there is at least one round"
    facts = {**plan.calibration, "rounds": rounds, "drift": drift}
    plan = finish(model, replace(plan, calibration=facts))
    store_quantizations(model)
    return plan


def _measured(
    model: Any,
    sites: Sequence[Site],
    batches: Sequence[Mapping[str, Tensor]],
    on_step: Step,
    kept: MutableMapping[Any, SiteMoments],
    source: Source,
) -> Iterator[tuple[str, SiteMoments]]:
    """Moments of one site after the other, which are kept; of those that are kept already nothing is measured."""
    done = [site.name for site in sites if site.name in kept]
    rest = [site for site in sites if site.name not in kept]
    use_eager_experts(model)
    for name in done:
        yield name, kept[name]
    if not rest:
        for _ in range(2 * len({site.block for site in sites}) * len(batches)):
            on_step()
    for name, moments in source(rest) if rest else ():
        kept[name] = moments
        # Not to be alive while the next block is measured, but where it is kept.
        del moments
        yield name, kept[name]


def _here(
    model: Any,
    batches: Sequence[Mapping[str, Tensor]],
    on_step: Step,
    loss: Loss,
    shelf: Shelf | None,
    sites: Sequence[Site],
) -> Iterator[tuple[str, SiteMoments]]:
    """Moments of sites, measured block by block."""
    for block in calibrate_blocks(model, sites, batches, on_step, loss, shelf):
        for name in list(block.moments):
            # Not to be alive while the next block is measured.
            yield name, block.moments.pop(name)


def _given(model: Any, sites: Sequence[Site], statistics: Statistics) -> Iterator[tuple[str, SiteMoments]]:
    """Moments that were measured before."""
    missing = [site.name for site in sites if site.name not in statistics]
    if missing or not statistics.have_gradients:
        raise InputError(
            f"{missing[0] if missing else sites[0].name}: the statistics must hold moments of inputs and gradients of "
            "every site, but do not. Calibrate these sites with a loss: calibrate(model, sites, batches)."
        )
    use_eager_experts(model)
    for site in sites:
        yield site.name, statistics[site.name]


def _named(name: str, make: Callable[[], Any]) -> Any:
    """What a function gives, errors saying at which site."""
    try:
        return make()
    except ValueError as error:
        error.args = (f"{name}: {error}",)
        raise


def _carried_out(  # noqa: PLR0913, PLR0917
    model: Any,
    sites: Sequence[Site],
    plan: Plan,
    batches: Sequence[Mapping[str, Tensor]],
    dense: Mapping[str, Any],
    measured: Mapping[Any, SiteMoments],
    drift: float,
    shelf: Shelf,
    on_step: Step,
) -> Plan:
    """Put the layers of a plan in place, walking along the compressed model, and price them as they are stored."""
    option_of = {name: option for option in plan.options for name in option.sites}
    losses: dict[str, float] = {}

    def place(site: Site, streams: Streams | None) -> nn.Module:
        layer: nn.Module
        linear, option = dense[site.name], option_of[site.name]
        W, bias = matrix_of(linear)
        target, moments = W, measured[site.name]
        if not is_reached(moments, gradients=True):
            moments = SiteMoments()
        if streams is not None:
            target = W + drift * streams.correction(W, centred=bias is not None)
            moments = moments._replace(inputs=streams.drifted)
        if not option.changes:
            layer, matrix = copy.deepcopy(linear), target
            set_matrix(layer, target)
        else:
            dtype = linear.weight.dtype
            layer, matrix, losses[site.name] = _named(
                site.name, partial(fit, target, moments, option, dtype, bias is not None)
            )
        if bias is not None:
            inputs = moments.inputs
            aim = read = torch.zeros(W.shape[1], dtype=torch.float64, device=W.device)
            if inputs is not None:
                read = inputs.mean.to(aim)
                aim = read if streams is None else drift * streams.mean + (1 - drift) * streams.drifted.mean
            bias = bias + (W.double() @ aim - matrix.double() @ read).to(bias.dtype)
            _set_bias(layer, bias.to(linear.weight.dtype))
        return shelf.hold(layer.to(linear.weight.device))

    made = fit_along(model, sites, batches, dense, place, on_step=on_step) if drift else set()
    rest = [site for site in sites if site.name not in made and option_of[site.name].changes]
    for site in rest:
        model.set_submodule(site.name, place(site, None))
    options = tuple(
        replace(option, loss=sum(losses.get(name, 0.0) for name in option.sites)) for option in plan.options
    )
    return replace(plan, options=options)


def _set_bias(layer: Any, bias: Tensor) -> None:
    owner = layer if isinstance(layer, (GroupLinear, nn.Linear)) or not hasattr(layer, "up") else layer.up
    owner.bias = nn.Parameter(bias)


def store_quantizations(model: Any) -> None:
    """Write into a model's configuration which of its layers lie in few bits, so that loading makes them so."""
    stored: dict[tuple[int, int], dict[str, Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, GroupLinear) and not isinstance(module, GroupEmbedding):
            settings = Groups(module.bits, module.group)
            entry = stored.setdefault(
                (module.bits, module.group), {"scheme": "gptq", "settings": asdict(settings), "modules": {}}
            )
            entry["modules"][name] = module.structure
    if stored:
        model.config.rankfold = {**model.config.rankfold, "quantization": list(stored.values())}
