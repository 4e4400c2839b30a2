"""The planned sites of a model are replaced by factorized modules, all at once or block by block inside the walk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankfold.architectures import adopt
from rankfold.calibration import calibrate_blocks
from rankfold.errors import InputError
from rankfold.factorization import METHODS, Factors, SiteMoments, ordered_kfac, pivoted, predicted_loss
from rankfold.modules import (
    FactorizedLinear,
    LowRankLinear,
    PivotedLinear,
    TuckerLinear,
    linear_at,
    restack,
    use_eager_experts,
)
from rankfold.plan import DENSE, Option, Plan
from rankfold.record import versions
from rankfold.sites import Site


def compress(
    model: Any,
    plan: Plan,
    statistics: Mapping[str, SiteMoments] | None = None,
    on_site: Callable[[], None] = lambda: None,
) -> Plan:
    """Replace the planned sites of a model, in place.

    Args:
        model: A transformers model.
        plan: What to do.
        statistics: Moments by site, from `calibrate`, where the plan's method needs data.
        on_site: Called after each site, for a progress bar.

    Returns:
        The plan as it was carried out: sites that no calibration token reached stay dense, with a note.

    Raises:
        ValueError: If the method needs statistics that are missing, or a weight is not finite.
    """
    options = _replace(model, plan, plan.options, statistics or {}, on_site)
    return finish(model, replace(plan, options=options))


def compress_blocks(
    model: Any,
    plan: Plan,
    sites: Sequence[Site],
    batches: Iterable[Mapping[str, Tensor]],
    on_batch: Callable[[], None] = lambda: None,
    on_site: Callable[[], None] = lambda: None,
) -> Plan:
    """Measure and replace block after block, in place, so that only one block's moments are alive at a time.

    Every block is measured on the inputs that the dense model gives it.

    Args:
        model: A transformers model.
        plan: What to do.
        sites: The sites of the plan.
        batches: Calibration batches on the model's device.
        on_batch: Called after each batch has passed a block.
        on_site: Called after each site.

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
    for block in calibrate_blocks(model, planned, batches, on_batch):
        options = tuple(dict.fromkeys(option_of[name] for name in block.moments))
        for option in options:
            done[option.sites] = _replace(model, plan, (option,), block.moments, on_site)
    for name, flag in wanted.items():
        linear_at(model, name).requires_grad_(flag)
    options = tuple(result for option in plan.options for result in done.get(option.sites, (option,)))
    return finish(model, replace(plan, options=options))


def predicted_losses(
    model: Any, sites: Sequence[Site], statistics: Mapping[str, SiteMoments], method: str = "kfac", steps: int = 64
) -> dict[str, list[float]]:
    """Predicted rise of the loss, in nats per token, for every site at each rank from 0 to full.

    `kfac` knows all ranks at once; for other methods those between `steps` evenly spaced ones are interpolated.
    Sites that no calibration token reached are left out.

    Raises:
        ValueError: If the statistics lack moments of gradients, or a weight is not finite.
    """
    losses = {}
    for site in sites:
        moments = statistics[site.name]
        if moments.inputs is None or moments.gradients is None:
            raise InputError(f"{site.name}: predicted losses need moments of gradients: pass a loss to calibrate(...).")
        if moments.inputs.vectors == 0 or not bool(moments.gradients.second.any()):
            continue
        W, b = matrix_of(linear_at(model, site.name))
        if method == "kfac":
            losses[site.name] = ordered_kfac(W, b, moments).losses.tolist()
            continue
        full = min(W.shape)
        ranks = sorted({round(step * full / steps) for step in range(1, steps + 1)} - {0} | {full})
        centred = METHODS[method].adds_bias
        values = [predicted_loss(W, torch.zeros_like(W), moments, centred)]
        for rank in ranks:
            factors = METHODS[method].factorize(W, b, moments, rank)
            values.append(predicted_loss(W, factors.product(), moments, centred) if rank < full else 0.0)
        losses[site.name] = np.interp(range(full + 1), [0, *ranks], values).tolist()
    return losses


def matrix_of(linear: Any) -> tuple[Tensor, Tensor | None]:
    """Weight (out, in) and bias of an `nn.Linear` or of GPT-2's transposed `Conv1D`, 16-bit weights in float32."""
    weight, bias = linear.weight.detach(), linear.bias
    if type(linear).__name__ == "Conv1D":
        weight = weight.T
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(dtype), None if bias is None else bias.detach().to(dtype)


def factorized_module(factors: Factors, form: str = "low_rank", dtype: torch.dtype | None = None) -> FactorizedLinear:
    """The module that holds these factors, in a form and dtype."""
    dtype = dtype or factors.up.dtype
    if form == "pivoted":
        parts = pivoted(factors.up, factors.down, dtype)
        return PivotedLinear.from_pivoted(*parts, None if factors.bias is None else factors.bias.to(dtype))
    up, down, core, bias = (None if part is None else part.to(dtype) for part in factors[:4])
    assert up is not None, "factors always have an up"
    assert down is not None, "factors always have a down"
    factors = Factors(up, down, core, bias, factors.error)
    if factors.core is None:
        return LowRankLinear.from_factors(factors.up, factors.down, factors.bias)
    return TuckerLinear.from_factors(factors.up, factors.core, factors.down, factors.bias)


def _replace(
    model: Any,
    plan: Plan,
    options: Iterable[Option],
    statistics: Mapping[str, SiteMoments],
    on_site: Callable[[], None],
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
                module = factorize_site(model, name, option, option.method or plan.method, statistics.get(name))
            except ValueError as error:
                error.args = (f"{name}: {error}",)
                raise
            if module is None:
                unreached.append(name)
            else:
                model.set_submodule(name, module)
            on_site()
        results.extend(split_off(model, option, unreached))
    return tuple(results)


@torch.no_grad()
def factorize_site(
    model: Any, name: str, option: Option, method: str, moments: SiteMoments | None
) -> FactorizedLinear | None:
    """The module for one site of a model that stays as it is; nothing where no calibration token reached it.

    Raises:
        ValueError: If form and method do not go together, statistics are missing, or a weight is not finite.
    """
    chosen = METHODS[method]
    if option.form != chosen.form and "tucker" in (option.form, chosen.form):
        raise InputError(
            f"The method {method!r} makes the form {chosen.form!r}, but the plan asks for {option.form!r}."
        )
    if chosen.needs_data and moments is None:
        raise InputError(f"The method {method!r} needs statistics of this site: pass the result of calibrate(...).")
    if chosen.needs_data and moments is not None:
        measured = moments.inputs or moments.outputs
        if measured is None or measured.vectors == 0:
            return None
    linear = linear_at(model, name)
    weight, bias = matrix_of(linear)
    factors = chosen.factorize(weight, bias, moments or SiteMoments(), option.ranks[0])
    module = factorized_module(factors, option.form, linear.weight.dtype)
    return module.requires_grad_(linear.weight.requires_grad)


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


def _with_pivots(model: Any, option: Option) -> Option:
    """The option with the pivots that its modules have, without which they could not be built again."""
    if option.form != "pivoted":
        return option
    return replace(option, pivots=tuple(linear_at(model, name).pivots for name in option.sites))


def finish(model: Any, plan: Plan) -> Plan:
    """Leave a model of our class behind, whose plan also holds what was compressed earlier."""
    plan = replace(plan, options=tuple(_with_pivots(model, option) for option in plan.options))
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
