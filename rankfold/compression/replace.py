"""The planned sites of a model are replaced by factorized modules, all at once or block by block inside the walk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rankfold.architectures import adopt
from rankfold.calibration import calibrate_blocks, is_reached
from rankfold.circumstances import versions
from rankfold.errors import InputError
from rankfold.factorization import METHODS, Factors, SiteMoments
from rankfold.journal import Journal
from rankfold.modules import (
    FORMS,
    FactorizedLinear,
    factorized_module,
    form_at,
    linear_at,
    matrix_of,
    restack,
    structure_of,
    use_eager_experts,
)
from rankfold.plan import DENSE, Option, Plan
from rankfold.progress import Step, no_step
from rankfold.shelf import Shelf
from rankfold.sites import Site


def factorize(
    model: Any,
    plan: Plan,
    statistics: Mapping[str, SiteMoments] | None = None,
    on_step: Step = no_step,
    shelf: Shelf | None = None,
    journal: Journal | None = None,
) -> Plan:
    """Replace the planned sites of a model, in place.

    Args:
        model: A transformers model.
        plan: What to do.
        statistics: Moments by site, from `calibrate`, where the plan's method needs data.
        on_step: Called after each site, for a progress bar.
        shelf: What holds finished layers; without it they lie in memory.
        journal: The factors that an interrupted run has worked out, and this one does.

    Returns:
        The plan as it was carried out: sites that no calibration token reached stay dense, with a note.

    Raises:
        ValueError: If the method needs statistics that are missing, or a weight is not finite.
    """
    options = _replace(model, plan, plan.options, statistics or {}, on_step, shelf, journal)
    return finish(model, replace(plan, options=options))


def factorize_blocks(
    model: Any,
    plan: Plan,
    sites: Sequence[Site],
    batches: Iterable[Mapping[str, Tensor]],
    on_step: Step = no_step,
    shelf: Shelf | None = None,
    journal: Journal | None = None,
) -> Plan:
    """Measure and replace block after block, in place, so that only one block's moments are alive at a time.

    Every block is measured on the inputs that the dense model gives it.

    Args:
        model: A transformers model.
        plan: What to do.
        sites: The sites of the plan.
        batches: Calibration batches on the model's device.
        on_step: Called after each batch has passed a block.
        shelf: What holds finished layers; without it they lie in memory.
        journal: The factors that an interrupted run has worked out, and this one does.

    Returns:
        The plan as it was carried out.

    Raises:
        ValueError: If a weight or an activation is not finite.
    """
    option_of = {name: option for option in plan.options for name in option.sites}
    planned = [site for site in sites if option_of[site.name].form != DENSE]
    # While blocks are measured nothing requires gradients; what replaces a weight gets its flag back at the end.
    wanted = {site.name: linear_at(model, site.name).weight.requires_grad for site in planned}
    done: dict[tuple[str, ...], tuple[Option, ...]] = {}
    known = {option for option in plan.options if option.form != DENSE and _is_known(plan, option, journal)}
    rest = [site for site in planned if option_of[site.name] not in known]
    for block in calibrate_blocks(model, rest, batches, on_step) if rest else ():
        options = tuple(dict.fromkeys(option_of[name] for name in block.moments))
        for option in options:
            done[option.sites] = _replace(model, plan, (option,), block.moments, shelf=shelf, journal=journal)
    # Last, since the others are measured on what the dense model gives them.
    for option in plan.options:
        if option in known:
            done[option.sites] = _replace(model, plan, (option,), {}, shelf=shelf, journal=journal)
    for name, flag in wanted.items():
        linear_at(model, name).requires_grad_(flag)
    options = tuple(result for option in plan.options for result in done.get(option.sites, (option,)))
    return finish(model, replace(plan, options=options))


def _replace(
    model: Any,
    plan: Plan,
    options: Iterable[Option],
    statistics: Mapping[str, SiteMoments],
    on_step: Step = no_step,
    shelf: Shelf | None = None,
    journal: Journal | None = None,
) -> tuple[Option, ...]:
    """Carry out some options of a plan."""
    results: list[Option] = []
    for option in options:
        if option.form == DENSE:
            results.append(option)
            continue
        unreached = []
        for name in option.sites:
            try:
                module = factorize_site(
                    model, name, option, option.method or plan.method, statistics.get(name), journal
                )
            except ValueError as error:
                error.args = (f"{name}: {error}",)
                raise
            if module is None:
                unreached.append(name)
            else:
                model.set_submodule(name, module if shelf is None else shelf.hold(module))
            on_step()
        results.extend(split_off(model, option, unreached))
    return tuple(results)


@torch.no_grad()
def factorize_site(
    model: Any,
    name: str,
    option: Option,
    method: str,
    moments: SiteMoments | None,
    journal: Journal | None = None,
) -> FactorizedLinear | None:
    """The module for one site of a model that stays as it is; nothing where no calibration token reached it.

    Factors that a journal holds are taken from there, others put down in it.

    Raises:
        ValueError: If form and method do not go together, statistics are missing, or a weight is not finite.
    """
    chosen = METHODS[method]
    if form_at(option.form).takes != FORMS[chosen.form].takes:
        raise InputError(
            f"The method {method!r} makes the form {chosen.form!r}, but the plan asks for {option.form!r}."
        )
    linear = linear_at(model, name)
    weight, bias = matrix_of(linear)
    known = None if journal is None else journal.get(_key(name, option, method))
    if known is None:
        if chosen.needs_data and moments is None:
            raise InputError(f"The method {method!r} needs statistics of this site: pass the result of calibrate(...).")
        if chosen.needs_data and moments is not None and not is_reached(moments):
            return None
        known = chosen.factorize(weight, bias, moments or SiteMoments(), option.ranks[0])
        if journal is not None:
            journal[_key(name, option, method)] = known
    factors: Factors = known
    module = factorized_module(factors, option.form, linear.weight)
    return module.requires_grad_(linear.weight.requires_grad)


def _key(name: str, option: Option, method: str) -> str:
    """What the factors of a site are put down under."""
    return f"{name} {method} {option.form} {option.ranks}"


def _is_known(plan: Plan, option: Option, journal: Journal | None) -> bool:
    """Whether a journal holds the factors of all sites of an option."""
    method = option.method or plan.method
    return journal is not None and all(_key(name, option, method) in journal for name in option.sites)


def split_off(model: Any, option: Option, unreached: list[str]) -> list[Option]:
    """The option without its unreached sites, and those as a dense option."""
    if not unreached:
        return [option]
    parameters = sum(p.numel() for name in unreached for p in linear_at(model, name).parameters())
    dense = Option(
        sites=tuple(unreached),
        bias=linear_at(model, unreached[0]).bias is not None,
        parameters=parameters,
        bytes=parameters * linear_at(model, unreached[0]).weight.element_size(),
        note="no calibration token reached it: calibrate on more or other text",
    )
    rest = tuple(name for name in option.sites if name not in unreached)
    if not rest:
        return [dense]
    parameters, stored = (total // len(option.sites) * len(rest) for total in (option.parameters, option.bytes))
    return [replace(option, sites=rest, parameters=parameters, bytes=stored), dense]


def _with_structure(model: Any, option: Option) -> Option:
    """The option with what its modules store besides numbers, without which they could not be built again."""
    if option.form not in FORMS:
        return option
    layers = [linear_at(model, name) for name in option.sites]
    return replace(option, structure=structure_of(option.form, layers))


def finish(model: Any, plan: Plan) -> Plan:
    """Leave a model of our class behind, whose plan also holds what was compressed earlier."""
    plan = replace(plan, options=tuple(_with_structure(model, option) for option in plan.options))
    restack(model)
    use_eager_experts(model)
    plan = replace(plan, versions=plan.versions or versions())
    stored = getattr(model.config, "rankfold", None)
    if stored:
        earlier = Plan.from_dict(stored)
        calibration = {**plan.calibration, "earlier": dict(earlier.calibration)}
        anew = {name for option in plan.options for name in option.sites}
        kept = [option for option in earlier.factorized if not anew & set(option.sites)]
        adopt(model, replace(plan, options=(*kept, *plan.options), calibration=calibration))
    else:
        adopt(model, plan)
    return plan
