"""Ranks that are chosen late: one checkpoint for many budgets, and layers that choose for every token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankfold.allocation import Allowance, factorized_option, knapsack, site_options
from rankfold.architectures import to_conv1d
from rankfold.calibration import without_labels
from rankfold.compression.replace import finish
from rankfold.errors import InputError
from rankfold.factorization import METHODS, SiteMoments
from rankfold.modules import AdaptiveLinear, LowRankLinear, is_transposed, linear_at, matrix_of
from rankfold.plan import DENSE, Option, Plan
from rankfold.sites import Site

TABLE = 129
"""Ranks of a site whose predicted loss a nested checkpoint stores; between them it is interpolated."""


@torch.no_grad()
def nest(model: Any, sites: Sequence[Site], statistics: Mapping[str, SiteMoments], method: str = "kfac") -> Plan:
    """Write every site as ordered factors of its full rank, in place, so that any smaller rank is a part of them.

    The model computes what it did, in more numbers than before; `shrink` cuts it to a budget without any text. The
    factors are those of a method that is ordered, measured once; a bias stays as it is.

    Args:
        model: A transformers model.
        sites: What may be cut later.
        statistics: Moments of inputs and gradients, from `calibrate`.
        method: A method that gives the factors of every rank at once (`Method.ordered`).

    Returns:
        The plan, all sites at full rank.

    Raises:
        ValueError: If the method is not ordered, statistics lack gradients, or a weight is not finite.
    """
    decompose = METHODS[method].ordered
    if decompose is None:
        raise InputError(f"A nested model needs the factors of every rank at once, which {method} does not provide.")
    options: list[Option] = []
    tables: dict[str, dict[str, Any]] = {}
    for site in sites:
        linear = linear_at(model, site.name)
        W, _ = matrix_of(linear)
        try:
            ordered = decompose(W, None, statistics[site.name])
        except ValueError as error:
            error.args = (f"{site.name}: {error}",)
            raise
        full = min(W.shape)
        bias = None if linear.bias is None else linear.bias.detach()
        like = linear.weight
        module = LowRankLinear.from_factors(ordered.up.to(like), ordered.down.to(like), bias)
        model.set_submodule(site.name, module.requires_grad_(linear.weight.requires_grad))
        ranks = sorted({round(step * full / (TABLE - 1)) for step in range(TABLE)})
        tables[site.name] = {
            "ranks": ranks,
            "losses": [float(f"{ordered.losses[rank]:.7g}") for rank in ranks],
            "transposed": is_transposed(linear),
        }
        full_rank = factorized_option("low_rank", [site], full, bias is not None)
        options.append(replace(full_rank, method=method, loss=0.0))
    plan = finish(model, Plan(options=tuple(options), method=method, allocation="nested"))
    model.config.rankfold = {**model.config.rankfold, "nested": tables}
    return plan


@torch.no_grad()
def shrink(model: Any, keep: float) -> Plan:
    """Cut a nested model to a budget, in place, allocating ranks by the predicted losses that it stores.

    Args:
        model: A model made by `nest`, in memory or loaded again.
        keep: Fraction of the dense sites' parameters to keep.

    Raises:
        ValueError: If the model is not nested, or the budget is out of reach.
    """
    stored = getattr(model.config, "rankfold", None) or {}
    tables = stored.get("nested")
    if not tables:
        raise InputError("Only a nested model can be cut: make one with rankfold compress --nested.")
    if not 0 < keep <= 1:
        raise InputError(f"keep is the fraction of parameters kept and must lie in (0, 1], but got {keep:g}.")
    sites, losses = [], {}
    for name, table in tables.items():
        layer = linear_at(model, name)
        out, into, bias = layer.out_features, layer.in_features, layer.up.bias is not None
        sites.append(Site(name, out, into, bias, layer.up.weight.element_size(), None, name, name))
        losses[name] = np.interp(range(min(out, into) + 1), table["ranks"], table["losses"]).tolist()
    chosen = knapsack(site_options(sites, "low_rank", losses), Allowance(keep))
    method = str(stored["method"])
    options = []
    for option in chosen.options:
        (name,) = option.sites
        layer = linear_at(model, name)
        if option.form == DENSE:
            linear = layer.to_dense()
            model.set_submodule(name, to_conv1d(linear) if tables[name]["transposed"] else linear)
            options.append(option)
            continue
        (rank,) = option.ranks
        kept = None if layer.up.bias is None else layer.up.bias.detach()
        up, down = layer.up.weight[:, :rank].clone(), layer.down.weight[:rank].clone()
        model.set_submodule(name, LowRankLinear.from_factors(up, down, kept))
        options.append(replace(option, method=method))
    plan = Plan(options=tuple(options), method=method, allocation="knapsack", keep=keep, bound=chosen.bound)
    return finish(model, plan)


@torch.no_grad()
def adapt(
    model: Any, plan: Plan, batches: Iterable[Mapping[str, Tensor]], *, small: float = 0.5, share: float = 0.5
) -> Plan:
    """Let every low-rank site of a model choose its rank for each token, in place.

    Of the calibration text's tokens `share` take the whole rank of a site and the others `small` of it, so its average
    rank is `(small + share (1 - small))` of it. The factors must be ordered, as `nest`, `shrink` and `kfac` leave them.

    Args:
        model: A model with the plan's low-rank sites.
        plan: The plan of the model.
        batches: Text on which thresholds are set.
        small: Share of a site's rank that every token takes.
        share: Share of the tokens that take all of it.

    Raises:
        ValueError: If a share is out of range, or the plan has no low-rank site.
    """
    if not (0 < small < 1 and 0 <= share <= 1):
        raise InputError(f"Shares of the rank and of the tokens lie between 0 and 1, but got {small:g} and {share:g}.")
    chosen = [o for o in plan.factorized if o.form == "low_rank" and o.ranks[0] > 1]
    if not chosen:
        raise InputError("The plan has no low-rank site that could choose between ranks.")
    layers: dict[str, AdaptiveLinear] = {}
    options = {option.sites: option for option in plan.options}
    for option in chosen:
        (name,), (rank,) = option.sites, option.ranks
        first = max(1, round(small * rank))
        layers[name] = AdaptiveLinear.from_low_rank(linear_at(model, name), first)
        model.set_submodule(name, layers[name])
        options[option.sites] = replace(option, form="adaptive", ranks=(first, rank))
    _set_thresholds(model, layers, batches, share)
    return finish(model, replace(plan, options=tuple(options.values())))


def _set_thresholds(
    model: nn.Module, layers: Mapping[str, AdaptiveLinear], batches: Iterable[Mapping[str, Tensor]], share: float
) -> None:
    """The quantile of each layer's read shares below which tokens take the large rank."""
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}

    def watch(name: str) -> Any:
        def hook(layer: AdaptiveLinear, args: tuple[Tensor, ...]) -> None:
            first = nn.functional.linear(args[0], layer.down.weight[: layer.small])
            seen[name].append(layer.read_share(args[0], first).flatten().cpu())

        return hook

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        for batch in without_labels(batches):
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    for name, layer in layers.items():
        if not seen[name]:
            raise InputError(f"{name}: no token of the text reached it. Use other or more text.")
        ordered = torch.cat(seen[name]).sort().values
        place = min(int(share * len(ordered)), len(ordered) - 1)
        layer.threshold.fill_(float(ordered[place]) if share < 1 else float("inf"))
