"""The difference between two models of one kind as an adapter: what a quantized model lost, or a fine-tune learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rankfold.allocation import Allowance, SiteOptions, knapsack
from rankfold.errors import InputError
from rankfold.factorization import SiteMoments, ordered_kfac
from rankfold.modules import LinearStack, is_transposed, linear_at, stored_matrix
from rankfold.plan import Option, Plan
from rankfold.quality import next_token_quality
from rankfold.sites import Site

SERVED_RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that one rank for all sites is chosen from; vLLM serves those from 8 on as they are, smaller ones filled up."""

STEPS = 64
"""Ranks that are tried at each site, at even distances up to the full one."""

SAME = 0.005
"""Relative distance up to which weights count as the same: conversion between 16-bit formats moves them by less."""

BYTES = 2
"""Bytes of a number of an adapter."""

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""`(B, A)` by site, of shapes (out, rank) and (rank, in)."""


def check_relatives(base: Any, target: Any, sites: Sequence[Site], leave_others: bool = False) -> list[str]:
    """Whether an adapter can turn one model into the other, and what else differs.

    Args:
        base: The model that will carry the adapter.
        target: The model that it shall come near to.
        sites: The layers that get an adapter.
        leave_others: Whether what differs outside of the sites' matrices may stay as the base has it.

    Raises:
        ValueError: If the models are of different kinds or sizes, layers stand in a stack of experts, or something
            differs that an adapter does not hold.
    """
    if type(base) is not type(target):
        raise InputError(
            f"Base and target must be of one kind, but are {type(base).__name__} and {type(target).__name__}."
        )
    ours, theirs = dict(base.named_parameters()), dict(target.named_parameters())
    foreign = [name for name in theirs if name not in ours or ours[name].shape != theirs[name].shape]
    if foreign or len(ours) != len(theirs):
        first = foreign[0] if foreign else next(name for name in ours if name not in theirs)
        shapes = [tuple(side[first].shape) if first in side else "missing" for side in (ours, theirs)]
        raise InputError(
            f"{first}: base and target must hold the same weights, but the base's is {shapes[0]} and the target's "
            f"{shapes[1]}. An adapter does not resize embeddings: give both models the same tokens first."
        )
    stacked = next((s.name for s in sites if isinstance(_owner(target, s.name), (LinearStack, nn.Parameter))), None)
    if stacked is not None:
        raise InputError(f"{stacked}: adapters are not made for experts in a stack. Leave them out with --sites.")
    matrices = {id(linear_at(target, site.name).weight) for site in sites}
    differing = [
        name for name, part in theirs.items() if id(part) not in matrices and not _alike(ours[name], part)
    ]  # fmt: skip
    if differing and not leave_others:
        raise InputError(
            f"{differing[0]}: {len(differing)} weights that an adapter does not hold differ between base and target "
            "(embeddings, norms, biases, heads). Pass --leave-others to make the adapter without them, which stays "
            "as far from the target as they are."
        )
    return differing


def _owner(model: Any, name: str) -> Any:
    owner: Any = model
    for part in name.split(".")[:-1]:
        owner = getattr(owner, part)
    return owner


def _alike(a: Tensor, b: Tensor) -> bool:
    x, y = a.detach().float(), b.detach().float().to(a.device)
    return float((x - y).norm()) <= SAME * float(y.norm()) + 1e-8


class Difference(NamedTuple):
    """What one layer of two models differs by: `B A`, columns and rows in the order in which they are worth most."""

    B: Float[Tensor, "out full"]
    A: Float[Tensor, "full in"]
    losses: Float[Tensor, " ranks"]
    """What is predicted to remain of the loss at every rank from 0."""


@torch.no_grad()
def differences(
    base: Any, target: Any, sites: Sequence[Site], statistics: Mapping[str, SiteMoments]
) -> dict[str, Difference]:
    """The difference of two models at every site, ordered by what each rank is worth.

    The difference `D` of a site is weighed on both sides: the best adapter of rank `r` is the truncated SVD of
    `G^(1/2) D S^(1/2)`, and what it leaves is predicted loss, comparable across sites (docs/mathematics.md, eq. 12).

    Args:
        base: The model that will carry the adapter, dense.
        target: The model that it shall come near to, dense.
        sites: Layers of both.
        statistics: Moments of the target's inputs and gradients.

    Raises:
        ValueError: If no token reached a site.
    """
    found = {}
    for site in sites:
        D = stored_matrix(linear_at(target, site.name)).float() - stored_matrix(linear_at(base, site.name)).float()
        moments = statistics[site.name]
        if moments.inputs is None or moments.gradients is None or not moments.inputs.vectors:
            raise InputError(
                f"{site.name}: no token of the text reached this layer. Use other or more text, or leave it out."
            )
        trusted = moments._replace(
            inputs=moments.inputs._replace(second=moments.inputs.trusted),
            gradients=moments.gradients._replace(second=moments.gradients.trusted),
        )
        ordered = ordered_kfac(D, None, trusted)
        found[site.name] = Difference(ordered.up.float(), ordered.down.float(), ordered.losses)
    return found


def difference_plan(
    sites: Sequence[Site],
    differences: Mapping[str, Difference],
    *,
    bytes: int | None = None,
    rank: int | None = None,
    compact: bool = False,
    judge: Callable[[Factors], float] | None = None,
) -> tuple[Plan, dict[str, tuple[Tensor, Tensor]]]:
    """Ranks for the difference at every site within one budget of bytes, and its factors.

    Args:
        sites: Layers of both models.
        differences: What `differences` found.
        bytes: Bytes of the adapter's numbers, in 16 bits, over all sites.
        rank: One rank for all sites, instead.
        compact: Whether sites may have different ranks. Runtimes scale these differently: PEFT by a pattern of alphas,
            vLLM by one alpha over one rank, llama.cpp by the rank of each tensor. So by default each site has the one
            rank that is best for all, or none, with alpha equal to it, which is right in all of them.
        judge: Measures what remains with some factors (`remaining_divergence`). Where one rank for all is chosen it
            decides between a few, in place of predicted losses: these prefer larger ranks at fewer sites, and are wrong
            where the models are far apart.

    Returns:
        The plan, whose options have ranks from 0 and the predicted loss that remains, and in its facts that without an
        adapter and, by rank, what was measured; and `(B, A)` by site.

    Raises:
        ValueError: If not exactly one of `bytes` and `rank` is given, or it is out of range.
    """
    if (bytes is None) == (rank is None) or (bytes or rank or 0) < 1:
        raise InputError(f"An adapter needs one of bytes and rank, 1 or more, but got {bytes} and {rank}.")
    losses = {name: each.losses for name, each in differences.items()}
    facts: dict[str, Any] = {"loss_without": sum(float(curve[0]) for curve in losses.values())}

    def cut(options: Sequence[Option]) -> dict[str, tuple[Tensor, Tensor]]:
        kept = {option.sites[0]: option.ranks[0] for option in options}
        return {name: _balanced(differences[name].B[:, :r], differences[name].A[:r]) for name, r in kept.items() if r}

    if rank is not None:
        chosen = [_option(site, min(rank, len(losses[site.name]) - 1), losses[site.name]) for site in sites]
    else:
        assert bytes is not None, "one of both"
        served = [one for one in SERVED_RANKS if one <= max(map(len, losses.values())) - 1]
        if judge is not None and not compact:
            fitting = [one for one in served if _everywhere(sites, losses, one) <= bytes]
            first = max(len(fitting) - 1, 0)
            served = served[first:]
        tried = [_within(sites, losses, bytes, step) for step in ([None] if compact else served)]
        tried = [options for options in tried if any(option.ranks[0] for option in options)]
        if not tried:
            raise InputError("The budget holds no rank of any site. Raise it.")
        if judge is None or len(tried) == 1:
            chosen = min(tried, key=lambda options: sum(option.loss or 0.0 for option in options))
        else:
            # Ever larger ranks at ever fewer sites, from what all can have, until that helps no more.
            remaining: list[float] = []
            for options in tried:
                remaining.append(judge(cut(options)))
                if remaining[-1] > min(remaining):
                    break
            chosen = tried[remaining.index(min(remaining))]
            facts["measured"] = {
                max(o.ranks[0] for o in found): left for found, left in zip(tried, remaining, strict=False)
            }
    factors = cut(chosen)
    plan = Plan(
        options=tuple(chosen),
        method="kfac",
        allocation="knapsack" if rank is None else "uniform",
        rank=rank,
        calibration=facts,
    )
    return plan, factors


def _everywhere(sites: Sequence[Site], losses: Mapping[str, Tensor], rank: int) -> int:
    """Bytes of one rank at every site, or the full one where that is less."""
    return sum(BYTES * min(rank, len(losses[site.name]) - 1) * (site.out_features + site.in_features) for site in sites)


def _option(site: Site, rank: int, losses: Tensor) -> Option:
    numbers = rank * (site.out_features + site.in_features)
    return Option(
        sites=(site.name,),
        form="low_rank",
        method="kfac",
        ranks=(rank,),
        parameters=numbers,
        bytes=BYTES * numbers,
        loss=float(losses[rank]),
    )


def _within(sites: Sequence[Site], losses: Mapping[str, Tensor], bytes: int, one: int | None) -> list[Option]:
    """The least predicted loss within some bytes: of any ranks, or with one rank or none at each site."""
    offered = [_options(site, losses[site.name], one) for site in sites]
    total = sum(options.dense_price("bytes") for options in offered)
    return list(knapsack(offered, Allowance(min(1.0, bytes / total), "bytes")).options)


def _options(site: Site, losses: Tensor, one: int | None) -> SiteOptions:
    full = len(losses) - 1
    if one is not None:
        ranks = [0, min(one, full)]
    else:
        ranks = sorted({round(step * full / STEPS) for step in range(STEPS + 1)} | set(range(min(9, full + 1))))
    made = [_option(site, rank, losses) for rank in ranks]
    return SiteOptions(
        site.name,
        np.ones(len(made)),
        np.array([option.parameters for option in made], dtype=float),
        np.array([option.bytes for option in made], dtype=float),
        np.array([option.loss for option in made], dtype=float),
        made.__getitem__,
        full,
        (site.out_features, site.in_features),
        by_rank=False,
    )


def remaining_divergence(base: Any, target: Any, windows: Int[Tensor, "windows length"]) -> Callable[[Factors], float]:
    """A measure of how far a base's next-token predictions remain from the target's with some factors added.

    Args:
        base: The model that will carry the adapter; it is left as it was.
        target: The model that it shall come near to.
        windows: Token ids that no moment was measured on.

    Returns:
        A function from factors to nats per token.
    """

    def remaining(factors: Factors) -> float:
        with ExitStack() as hooks:
            for name, (B, A) in factors.items():
                hooks.callback(linear_at(base, name).register_forward_hook(partial(_added, B, A)).remove)
            return next_token_quality(base, windows, dense=target).kl or 0.0

    return remaining


def _added(B: Tensor, A: Tensor, _: Any, args: tuple[Tensor, ...], result: Tensor) -> Tensor:
    """What a layer gives with an adapter."""
    x = args[0].to(A.dtype)
    return result + (x @ A.to(x.device).T @ B.to(x.device).T).to(result.dtype)


@torch.no_grad()
def difference_adapter(base: Any, factors: Factors) -> Any:
    """A PEFT model of the base with these factors as its adapter, in bfloat16.

    Args:
        base: The model that carries the adapter.
        factors: `(B, A)` by site, of shapes (out, rank) and (rank, in).

    Raises:
        ValueError: If PEFT is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise InputError("Adapters need PEFT: pip install 'rankfold[recovery]'") from error
    ranks = {name: len(A) for name, (_, A) in factors.items()}
    largest = max(ranks.values())
    mixed = {} if min(ranks.values()) == largest else ranks
    settings = LoraConfig(
        r=largest,
        lora_alpha=largest,
        target_modules=sorted(ranks),
        lora_dropout=0.0,
        fan_in_fan_out=is_transposed(linear_at(base, min(ranks))),
        rank_pattern=dict(mixed),
        alpha_pattern=dict(mixed),
    )
    adapted: Any = get_peft_model(base, settings)
    for name, (B, A) in factors.items():
        layer = adapted.base_model.model.get_submodule(name)
        for part, value in ((layer.lora_A["default"], A), (layer.lora_B["default"], B)):
            part.weight.data = value.to(part.weight.device, torch.bfloat16).contiguous()
    return adapted


def _balanced(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with factors of one size in each direction, so that 16 bits hold both well."""
    size = (A.norm(dim=1) / B.norm(dim=0).clamp(min=1e-30)).sqrt().clamp(min=1e-30)
    return B * size, A / size[:, None]
