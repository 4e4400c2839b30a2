"""Moments of the inputs or outputs of every site, measured while the blocks are walked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rankfold.calibration.walk import BlockStep, walk_blocks
from rankfold.factorization import Moments, SiteMoments
from rankfold.modules import linear_at, use_eager_experts
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
    """The block, through which the batches have passed; `None` for the sites outside the blocks."""
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
        model: The model, whose stacked experts are taken apart into layers (`rankfold.modules.LinearStack`).
        sites: Sites to measure.
        batches: Keyword arguments of the model's forward call, without padding.
        on_batch: Called after each batch has passed a block.

    Returns:
        Moments by the name of the site; sites that read the same input share one object.

    Raises:
        ValueError: If there is no batch or a value is not finite.
    """
    statistics: dict[str, SiteMoments] = {}
    for block in calibrate_blocks(model, sites, batches, on_batch):
        statistics.update(block.moments)
    return statistics


def calibrate_blocks(
    model: Any,
    sites: Sequence[Site],
    batches: Iterable[Mapping[str, Tensor]],
    on_batch: Callable[[], None] = lambda: None,
) -> Iterator[BlockMoments]:
    """Moments block after block, each free to be dropped before the next is measured.

    When a block is given, its batches have passed it: the caller may factorize its weights, and the
    following blocks are still measured on the inputs of the dense model.
    """
    by_block: dict[str | None, list[Site]] = {}
    for site in sites:
        by_block.setdefault(site.block, []).append(site)
        linear_at(model, site.name)
    use_eager_experts(model)
    outside = by_block.get(None, [])
    runner = model if outside else model.base_model
    prefix = "" if runner is model else f"{model.base_model_prefix}."
    training = model.training
    model.eval()
    try:
        with _Observer(model, outside) as outer:
            for step in walk_blocks(runner, batches, on_batch):
                with _Observer(model, by_block.get(prefix + step.path, [])) as observer:
                    step.run()
                yield BlockMoments(step, observer.moments())
        if outside:
            yield BlockMoments(None, outer.moments())
    finally:
        model.train(training)


class _Observer(ExitStack):
    """Accumulators hooked to sites: one for each input that several read, or one for each output if that is smaller."""

    def __init__(self, model: Any, sites: Sequence[Site]) -> None:
        super().__init__()
        self._inputs: dict[str, MomentAccumulator] = {}
        self._outputs: dict[str, MomentAccumulator] = {}
        self._sites = sites
        groups: dict[str, list[Site]] = {}
        for site in sites:
            groups.setdefault(site.reads, []).append(site)
        for group in groups.values():
            if sum(site.out_features**2 for site in group) < group[0].in_features ** 2:
                for site in group:
                    self._watch_output(model, site)
            else:
                self._watch_input(model, group)

    def _watch_input(self, model: Any, group: Sequence[Site]) -> None:
        linear = linear_at(model, group[0].name)
        accumulator = MomentAccumulator(group[0].in_features, linear.weight.device)
        self._inputs |= {site.name: accumulator for site in group}
        self._hold(linear.register_forward_pre_hook(lambda _, args: accumulator.update(args[0])))

    def _watch_output(self, model: Any, site: Site) -> None:
        linear = linear_at(model, site.name)
        accumulator = self._outputs[site.name] = MomentAccumulator(site.out_features, linear.weight.device)
        self._hold(linear.register_forward_hook(lambda _, args, output: accumulator.update(output)))

    def _hold(self, handle: Any) -> None:
        self.callback(handle.remove)

    def moments(self) -> dict[str, SiteMoments]:
        """Moments by site; each accumulator is read once."""
        read: dict[int, Moments] = {}
        result = {}
        for site in self._sites:
            accumulator = self._inputs.get(site.name) or self._outputs[site.name]
            try:
                moments = read.setdefault(id(accumulator), None) or accumulator.moments()  # type: ignore[arg-type]
            except ValueError as error:
                _add_note(error, site.name)
                raise
            read[id(accumulator)] = moments
            inputs = moments if site.name in self._inputs else None
            result[site.name] = SiteMoments(inputs, None if inputs else moments)
        return result


def _add_note(error: ValueError, note: str) -> None:
    """Name the place of an error (`add_note` exists from Python 3.11 on)."""
    error.args = (f"{note}: {error}",)
