"""Drift: a layer of a compressed model reads other inputs than the dense one did, and is fitted to them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rankfold.calibration import BlockStep, MomentAccumulator, walk_body
from rankfold.factorization import Moments, Ordered
from rankfold.modules import factorized_module, linear_at, matrix_of, put, set_matrix
from rankfold.plan import DENSE, Option, Plan
from rankfold.precision import widened
from rankfold.progress import Step, no_step
from rankfold.shelf import Shelf
from rankfold.sites import Site

DAMPING = 1e-3
"""Share of the mean input power at which a direction is too weak to be corrected."""


def correct_drift(  # noqa: PLR0913
    model: Any,
    sites: Sequence[Site],
    plan: Plan,
    batches: Sequence[Mapping[str, Tensor]],
    dense: Mapping[str, nn.Module],
    ordered: Mapping[Any, Ordered],
    *,
    share: float = 0.5,
    shelf: Shelf | None = None,
    on_step: Step = no_step,
) -> None:
    """Fit every site to what the compressed model feeds it, layer after layer, in place.

    Two streams walk side by side, one through the dense blocks and one through the compressed ones. Each site's
    target is the dense output: `W x` is predicted from the drifted input `x'` by `W C S'^-1` with
    `C = E[x x'^T]` (docs/mathematics.md, eq. 10), and this matrix is projected onto the site's factors in place
    of `W`. The full correction overfits the drift of the calibration text; half of it is best on held-out text.

    Layers that not every token reaches, and those that a pass calls repeatedly, are left alone.

    Args:
        model: The model, its compressed modules in place.
        sites: Its sites.
        plan: What was carried out.
        batches: Calibration batches.
        dense: The dense layer of every site.
        ordered: The factorization of every site.
        share: How much of the correction is applied, 0 to 1.
        shelf: What holds finished layers; without it they lie in memory.
        on_step: Called after each batch has passed a block.
    """
    option_of = {name: option for option in plan.options for name in option.sites}

    def fitted(site: Site, streams: Streams | None) -> nn.Module | None:
        if streams is None:
            return None
        W, bias = matrix_of(dense[site.name])
        correction = share * streams.correction(W, centred=bias is not None)
        factors = ordered.get(site.name)
        layer = _corrected(dense[site.name], option_of[site.name], factors, correction, streams, share)
        return layer if shelf is None else shelf.hold(layer)

    fit_along(model, sites, batches, dense, fitted, on_step=on_step)


Fit = Callable[[Site, "Streams | None"], "nn.Module | None"]
"""The layer of a site from what it reads in both models; nothing is known of it where rows do not correspond. Without a
layer the one in place stays."""


def fit_along(
    model: Any,
    sites: Sequence[Site],
    batches: Sequence[Mapping[str, Tensor]],
    dense: Mapping[str, nn.Module],
    fit: Fit,
    *,
    on_step: Step = no_step,
) -> set[str]:
    """Fit layer after layer to what the compressed model feeds it, in place, and give the names of those fitted.

    Args:
        model: The model; where a site is to be fitted its layer may be any, since nothing reads it before.
        sites: Its sites; those that a pass calls repeatedly are passed over.
        batches: Calibration batches.
        dense: The dense layer of every site.
        fit: Makes the layer of a site.
        on_step: Called after each batch has passed a block.
    """
    compressed = {name: linear_at(model, name) for name in dense}
    by_block: dict[str | None, list[Site]] = {}
    for site in sites:
        by_block.setdefault(site.block, []).append(site)
    done: set[str] = set()
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), closing(_both(model, batches, dense, compressed, on_step)) as steps:
            for straight, drifted in steps:
                group_of: dict[str, list[Site]] = {}
                for site in by_block.get(straight.path, ()):
                    if site.calls == 1:
                        group_of.setdefault(site.reads, []).append(site)
                for group in group_of.values():
                    streams = _streams(model, group[0].name, (straight, drifted), (dense, compressed), on_step)
                    for site in group:
                        layer = fit(site, streams)
                        if layer is not None:
                            compressed[site.name] = layer
                            done.add(site.name)
    finally:
        put(model, compressed)
        model.train(training)
    return done


class Streams(NamedTuple):
    """Moments of what one site reads in the dense and in the compressed model."""

    cross: Float[Tensor, "in in"]
    """`E[x x'^T]`."""
    mean: Float[Tensor, " in"]
    drifted: Moments
    """Of `x'`, what the compressed model feeds the site."""

    def correction(self, weight: Float[Tensor, "out in"], centred: bool) -> Float[Tensor, "out in"]:
        """What to add to a weight so that it predicts the dense output from drifted inputs."""
        cross, second = self.cross, self.drifted.second
        if centred:
            cross = cross - torch.outer(self.mean, self.drifted.mean)
            second = self.drifted.covariance
        damping = DAMPING * second.diagonal().mean().clamp(min=torch.finfo(second.dtype).tiny)
        second = second + damping * torch.eye(len(second), dtype=second.dtype, device=second.device)
        shift = torch.linalg.solve(second, (cross - second + damping * torch.eye(len(second)).to(second)).T).T
        corrected: Tensor = (weight.double() @ shift).to(weight.dtype)
        return corrected


def _both(
    model: Any,
    batches: Sequence[Mapping[str, Tensor]],
    dense: Mapping[str, nn.Module],
    compressed: Mapping[str, nn.Module],
    on_step: Step,
) -> Generator[tuple[BlockStep, BlockStep]]:
    """Two walks over one model whose layers are exchanged between them."""
    put(model, dense)
    with (
        closing(walk_body(model, batches, on_step)) as first,
        closing(walk_body(model, batches, on_step)) as second,
    ):
        for straight, drifted in zip(first, second, strict=True):
            yield straight, drifted
            put(model, dense)
            straight.run()
            put(model, compressed)
            drifted.run()


class _SeenError(Exception):
    """Ends a block's run at the layer that was waited for: what comes after it is not needed."""


def _streams(
    model: Any,
    name: str,
    steps: tuple[BlockStep, BlockStep],
    layers: tuple[Mapping[str, nn.Module], Mapping[str, nn.Module]],
    on_step: Step,
) -> Streams | None:
    """Run the block up to one layer on both streams and compare what it reads; nothing where rows do not correspond."""
    block = steps[0].path
    inside = [{n: m for n, m in side.items() if f".{block}." in f".{n}"} for side in layers]
    seen: list[Tensor] = []

    def look(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        raise _SeenError

    cross: Any = 0.0
    mean: Any = 0.0
    count = 0
    drifted: MomentAccumulator | None = None
    for calls in zip(*(step.calls for step in steps), strict=True):
        seen.clear()
        for call, modules in zip(calls, inside, strict=True):
            put(model, modules)
            hook = modules[name].register_forward_pre_hook(look)
            with suppress(_SeenError):
                call.run()
            hook.remove()
        call = calls[0]
        hidden = call.args[0] if call.args else call.kwargs["hidden_states"]
        if [x.numel() // x.shape[-1] for x in seen] != 2 * [hidden.shape[:-1].numel()]:
            return None
        drifted = drifted or MomentAccumulator(seen[1].shape[-1], seen[1].device)
        drifted.update(seen[1])
        x, y = (rows.reshape(-1, rows.shape[-1]).float() for rows in seen)
        count += len(x)
        cross = cross + widened(x.T @ y)
        mean = mean + widened(x.sum(0))
        on_step()
    assert drifted is not None, "there is at least one batch"
    return Streams(cross / count, mean / count, drifted.moments())


def _corrected(
    linear: Any, option: Option, ordered: Ordered | None, correction: Tensor, streams: Streams, share: float
) -> nn.Module:
    """The layer in its form, for the corrected weight; a bias keeps the mean output."""
    W, b = matrix_of(linear)
    kept = W + correction
    if option.form == DENSE or ordered is None:
        module = copy.deepcopy(linear)
        set_matrix(module, kept)
        product = kept
    else:
        factors = ordered.truncate(W, None, option.ranks[0], correction)
        product = factors.up @ factors.down
        module = None
    if b is not None:
        aim = share * streams.mean + (1 - share) * streams.drifted.mean
        b = b + (W.double() @ aim - product.double() @ streams.drifted.mean).to(b.dtype)
    if module is not None:
        if b is not None:
            module.bias.copy_(b)
        return module  # type: ignore[no-any-return]
    module = factorized_module(factors._replace(bias=b), option.form, linear.weight)
    return module.requires_grad_(linear.weight.requires_grad)
