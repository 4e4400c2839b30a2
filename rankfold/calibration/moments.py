"""Moments of the inputs or outputs of every site, measured while the blocks are walked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rankfold.calibration.walk import BlockStep, walk_blocks
from rankfold.factorization import Moments, SiteMoments
from rankfold.modules import linear_at, restack, use_eager_experts
from rankfold.sites import Site

_CHUNK = 1024
"""Rows multiplied in float32 before their sum joins the float64 total: rounding stays that of one chunk."""


class MomentAccumulator:
    """Streaming mean and second moment: products of chunks in float32, sums in float64."""

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        """An accumulator of vectors of `size` numbers."""
        self.count = 0
        self._sum = torch.zeros(size, dtype=torch.float64, device=device)
        self._second = torch.zeros(size, size, dtype=torch.float64, device=device)

    def update(self, x: Float[Tensor, "*batch size"]) -> None:
        """Take in every vector along the last axis."""
        rows = x.detach().reshape(-1, x.shape[-1])
        self.count += len(rows)
        for chunk in torch.split(rows, _CHUNK):
            exact = chunk if chunk.dtype == torch.float64 else chunk.float()
            self._second += exact.T @ exact
            self._sum += exact.sum(0, dtype=torch.float64)

    def moments(self) -> Moments:
        """Moments over everything taken in; the accumulator is used up.

        Raises:
            ValueError: If a value was NaN or infinite.
        """
        count = max(self.count, 1)
        second = self._second.div_(count)
        if not bool(torch.isfinite(second).all()):
            raise ValueError(
                "The values that flow through this layer must be finite, but some are NaN or infinite. Check that the "
                "weights are finite, and load a float16 model with --dtype bfloat16 or float32."
            )
        return Moments(self.count, self._sum / count, second)


class BlockMoments(NamedTuple):
    """What was measured of the sites of one block."""

    step: BlockStep | None
    """The block, through which the batches have passed; `None` for sites outside of those that were walked."""
    moments: dict[str, SiteMoments]


def calibrate(
    model: Any,
    sites: Sequence[Site],
    batches: Iterable[Mapping[str, Tensor]],
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, SiteMoments]:
    """Moments of all sites at once.

    For models whose moments fit into memory together; `calibrate_blocks` gives them block by block.

    Args:
        model: The model, which is left as it was.
        sites: Sites to measure.
        batches: Keyword arguments of the model's forward call, without padding.
        on_batch: Called after each batch has passed a block.

    Returns:
        Moments by the name of the site; sites that read the same input share one object.

    Raises:
        ValueError: If there is no batch or a value is not finite.
    """
    implementation = getattr(model.config, "_experts_implementation", None)
    statistics: dict[str, SiteMoments] = {}
    for block in calibrate_blocks(model, sites, batches, on_batch):
        statistics.update(block.moments)
    restack(model)
    if implementation:
        model.config._experts_implementation = implementation
    return statistics


def calibrate_blocks(
    model: Any,
    sites: Sequence[Site],
    batches: Iterable[Mapping[str, Tensor]],
    on_batch: Callable[[], None] = lambda: None,
) -> Iterator[BlockMoments]:
    """Moments block after block, each free to be dropped before the next is measured.

    When a block is given, its batches have passed it, for the last time where the model applies it repeatedly:
    the caller may factorize its weights, and the following blocks are still measured on the inputs of the dense
    model. Blocks that no batch passed come last, with moments of nothing. Stacked experts are taken apart
    (`rankfold.modules.LinearStack`), and stay so.
    """
    by_block: dict[str | None, list[Site]] = {}
    for site in sites:
        by_block.setdefault(site.block, []).append(site)
        linear_at(model, site.name)
    use_eager_experts(model)
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    inside = all(block is not None and block.startswith(prefix) for block in by_block)
    runner, prefix = (model.base_model, prefix) if inside else (model, "")
    observers = {block: _Observer(group) for block, group in by_block.items()}
    outer = observers.pop(None, _Observer([]))
    visits = {block: max(site.calls for site in group) for block, group in by_block.items()}
    training = model.training
    model.eval()
    try:
        with outer.watching(model):
            for step in walk_blocks(runner, batches, on_batch):
                block = prefix + step.path
                if block not in observers:
                    continue
                with observers[block].watching(model):
                    step.run()
                visits[block] -= 1
                if visits[block] == 0:
                    yield BlockMoments(step, observers.pop(block).moments())
        for observer in [*observers.values(), outer]:
            yield BlockMoments(None, observer.moments())
    finally:
        model.train(training)


class _Observer:
    """Accumulators of sites: one for each input that several read, or one for each output if that is smaller."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = sites
        self._groups: dict[str, list[Site]] = {}
        self._accumulators: dict[str, MomentAccumulator] = {}
        for site in sites:
            self._groups.setdefault(site.reads, []).append(site)

    @staticmethod
    def _reads_outputs(group: Sequence[Site]) -> bool:
        return sum(site.out_features**2 for site in group) < group[0].in_features ** 2

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Hooks on the layers while the block runs."""
        with ExitStack() as handles:
            for group in self._groups.values():
                for site in group if self._reads_outputs(group) else group[:1]:
                    handles.callback(self._watch(linear_at(model, site.name), site, self._reads_outputs(group)).remove)
            yield

    def _watch(self, linear: Any, site: Site, output: bool) -> Any:
        size = site.out_features if output else site.in_features
        if site.name not in self._accumulators:
            self._accumulators[site.name] = MomentAccumulator(size, linear.weight.device)
        accumulator = self._accumulators[site.name]
        if output:
            return linear.register_forward_hook(lambda _, args, result: accumulator.update(result))
        return linear.register_forward_pre_hook(lambda _, args: accumulator.update(args[0]))

    def moments(self) -> dict[str, SiteMoments]:
        """Moments by site; the accumulators are used up."""
        result: dict[str, SiteMoments] = {}
        for group in self._groups.values():
            if self._reads_outputs(group):
                result |= {site.name: SiteMoments(outputs=self._read(site)) for site in group}
            else:
                inputs = self._read(group[0])
                result |= {site.name: SiteMoments(inputs=inputs) for site in group}
        return {site.name: result[site.name] for site in self._sites}

    def _read(self, site: Site) -> Moments:
        accumulator = self._accumulators.pop(site.name, None) or MomentAccumulator(1)
        try:
            return accumulator.moments()
        except ValueError as error:
            error.args = (f"{site.name}: {error}",)
            raise
