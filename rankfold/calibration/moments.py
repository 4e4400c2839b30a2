"""Moments of the inputs, outputs and gradients of every site, measured while the blocks are walked."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rankfold.calibration.accumulators import DiagonalAccumulator, MomentAccumulator
from rankfold.calibration.losses import Loss, usual_loss
from rankfold.calibration.statistics import Statistics
from rankfold.calibration.walk import (
    BlockStep,
    embeddings_with_gradients,
    is_chain,
    walk_blocks,
    walk_blocks_back,
    walk_body,
    without_cache,
    without_labels,
)
from rankfold.errors import InputError
from rankfold.factorization import METHODS, Moments, SiteMoments
from rankfold.modules import linear_at, restack, stored_matrix, use_eager_experts
from rankfold.progress import Step, no_step
from rankfold.shelf import Shelf, give_back
from rankfold.sites import Site

LARGEST = 32_768
"""Outputs above which of the gradients' moment only the diagonal is measured: the whole would take 8 GiB and more."""


class BlockMoments(NamedTuple):
    """What was measured of the sites of one block."""

    step: BlockStep | None
    """The block, through which the batches have passed; `None` for sites outside of those that were walked."""
    moments: dict[str, SiteMoments]


def calibrate(
    model: Any,
    sites: Sequence[Site],
    batches: Iterable[Mapping[str, Tensor]],
    *,
    method: str = "kfac",
    loss: Loss | None = None,
    shelf: Shelf | None = None,
    on_step: Step = no_step,
) -> Statistics:
    """Measure the moments of all sites at once, as a method needs them.

    Without a shelf all of them lie in memory together; `calibrate_blocks` yields them block by block.

    Args:
        model: The model, which is left as it was.
        sites: Sites to measure.
        batches: Keyword arguments of the model's forward call, without padding.
        method: A key of `rankfold.factorization.METHODS`: if it needs gradients, `usual_loss` is
            backpropagated, and the gradients' moments are measured too.
        loss: Another loss (`summed_loss`), whose gradients are measured whatever the method needs.
        shelf: Where hidden states and moments wait, on disk beyond its limit.
        on_step: Called after each batch has passed a block.

    Returns:
        Moments by the name of the site; sites that read the same input share one object.

    Raises:
        ValueError: If there is no batch, the method is unknown, or a value is not finite.
    """
    batches = list(batches)
    if loss is None and METHODS[method].needs_gradients:
        loss = usual_loss(model, batches)
    implementation = getattr(model.config, "_experts_implementation", None)
    moments: Any = {} if shelf is None else shelf
    for block in calibrate_blocks(model, sites, batches, on_step, loss, shelf):
        moments.update(block.moments)
        block.moments.clear()
    restack(model)
    if implementation:
        model.config._experts_implementation = implementation
    return Statistics(model, sites, moments)


def calibrate_blocks(
    model: Any,
    sites: Sequence[Site],
    batches: Iterable[Mapping[str, Tensor]],
    on_step: Step = no_step,
    loss: Loss | None = None,
    shelf: Shelf | None = None,
    *,
    products: bool = False,
) -> Iterator[BlockMoments]:
    """Moments block after block, each free to be dropped before the next is measured.

    When a block is given, its batches have passed it, for the last time where the model applies it repeatedly:
    the caller may factorize its weights, and the other blocks are still measured on what the dense model gives
    them. With a loss the blocks come last first, its gradient flowing back. Blocks that no batch passed come
    last, with moments of nothing. Stacked experts are taken apart (`rankfold.modules.LinearStack`), and stay so.

    Args:
        model: The model, which is left as it was but for its experts.
        sites: Sites to measure.
        batches: Keyword arguments of the model's forward call, without padding.
        on_step: Called after each batch has passed a block.
        loss: What is followed back, if anything.
        shelf: Where hidden states wait for the way back; without it in memory.
        products: Whether, with a loss, the moment of a matrix's wider side is only measured as its product with the
            matrix wherever that costs less (`Method.reads_products`).

    Raises:
        ValueError: If there is no batch or a value is not finite.
    """
    for step, observer in observed_blocks(model, sites, batches, on_step, loss, shelf, products=products):
        yield BlockMoments(step, observer.moments())
        give_back()


def observed_blocks(
    model: Any,
    sites: Sequence[Site],
    batches: Iterable[Mapping[str, Tensor]],
    on_step: Step = no_step,
    loss: Loss | None = None,
    shelf: Shelf | None = None,
    *,
    products: bool = False,
) -> Iterator[tuple[BlockStep | None, Observer]]:
    """`calibrate_blocks` with sums in place of moments: those of several shares of the batches can be added up."""
    by_block: dict[str | None, list[Site]] = {}
    for site in sites:
        by_block.setdefault(site.block, []).append(site)
        linear_at(model, site.name)
    use_eager_experts(model)
    batches = list(batches)
    if not batches:
        raise InputError("Calibration needs at least one batch, but got none.")
    read = "decoder_input_ids" if "decoder_input_ids" in batches[0] else "input_ids"
    tokens = sum(batch[read].numel() for batch in batches if read in batch)
    observer_of = partial(Observer, gradients=loss is not None, tokens=tokens, products=products)
    observers = {block: observer_of(group) for block, group in by_block.items()}
    outer = observers.pop(None, None) or observer_of([])
    visits = {block: max(site.calls for site in group) for block, group in by_block.items()}
    with _frozen(model), ExitStack() as stack:
        chain = loss is None or is_chain(model, batches[0])
        # After the trial, which must not be measured.
        stack.enter_context(outer.watching(model))
        if loss is not None and not chain:
            # Not one chain of blocks: the graph is built whole, one batch at a time.
            _backpropagate(model, [*observers.values()], batches, loss, on_step)
            visits = {}
        for block, step in _steps(model, list(by_block), batches, on_step, loss, shelf) if visits else ():
            if block not in observers:
                continue
            with observers[block].watching(model):
                step.run()
            visits[block] -= 1
            if visits[block] == 0:
                yield step, observers.pop(block)
        for observer in [*observers.values(), outer]:
            yield None, observer


def _backpropagate(
    model: Any,
    observers: Sequence[Observer],
    batches: Iterable[Mapping[str, Tensor]],
    loss: Loss,
    on_step: Step,
) -> None:
    """Ordinary backpropagation from the loss to the embeddings, all observers watching."""
    with ExitStack() as stack, torch.enable_grad(), embeddings_with_gradients(model), without_cache(model):
        for observer in observers:
            stack.enter_context(observer.watching(model))
        for batch in batches:
            loss(model(**batch), batch).backward()  # type: ignore[no-untyped-call]
            on_step()


def _steps(
    model: Any,
    blocks: Sequence[str | None],
    batches: Sequence[Mapping[str, Tensor]],
    on_step: Step,
    loss: Loss | None,
    shelf: Shelf | None,
) -> Iterator[tuple[str, BlockStep]]:
    """The walk that serves: through the body only where no head is measured, and back where there is a loss."""
    if loss is not None:
        for step in walk_blocks_back(model, batches, loss, on_step, shelf):
            yield step.path, step
        return
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    if all(block is not None and block.startswith(prefix) for block in blocks):
        walk = walk_body(model, batches, on_step)
    else:
        walk = walk_blocks(model, without_labels(batches), on_step)
    for step in walk:
        yield step.path, step


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """The model in evaluation mode, its parameters collecting no gradients of their own."""
    training = model.training
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for parameter in wanted:
            parameter.requires_grad_(True)


class Observer:
    """Accumulators of sites: one for each input that several read, or one for each output if that is smaller.

    Where gradients are followed, the inputs always, and the gradient at every output; with `products`, of the wider
    side of a matrix only the diagonal, beside the moment of the outputs or of the gradients at the inputs.
    """

    def __init__(self, sites: Sequence[Site], gradients: bool, tokens: int, products: bool = False) -> None:
        self._sites = sites
        self._gradients = gradients
        self._products = gradients and products
        self._tokens = tokens
        self._groups: dict[str, list[Site]] = {}
        self._accumulators: dict[tuple[str, str], MomentAccumulator | DiagonalAccumulator] = {}
        for site in sites:
            self._groups.setdefault(site.reads, []).append(site)

    def _reads_outputs(self, group: Sequence[Site]) -> bool:
        """Whether the moments of what some sites give are smaller than that of the input that they share."""
        may = self._products or not self._gradients
        return may and sum(site.out_features**2 for site in group) < group[0].in_features ** 2

    def _reads_input_gradients(self, site: Site) -> bool:
        """Whether passing the gradients back through the matrix costs less than their moment."""
        out, into = site.out_features, site.in_features
        return self._products and out**2 > out * into + into**2

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Hooks on the layers while the block runs."""
        with ExitStack() as handles:
            for group in self._groups.values():
                outputs = self._reads_outputs(group)
                for site in group if outputs else ():
                    handles.callback(self._watch_outputs(linear_at(model, site.name), site).remove)
                if self._gradients or not outputs:
                    first = group[0]
                    handles.callback(self._watch_inputs(linear_at(model, first.name), first, outputs).remove)
                for site in group if self._gradients else ():
                    handles.callback(self._watch_gradients(linear_at(model, site.name), site).remove)
            yield

    def _accumulator(
        self, site: Site, what: str, size: int, linear: Any, diagonal: bool = False
    ) -> MomentAccumulator | DiagonalAccumulator:
        if (what, site.name) not in self._accumulators:
            # A layer in few bits has no parameters, only buffers.
            device = next(itertools.chain(linear.parameters(), linear.buffers())).device
            kind = DiagonalAccumulator if diagonal else MomentAccumulator
            self._accumulators[what, site.name] = kind(size, device)
        return self._accumulators[what, site.name]

    def _counts(self, x: Tensor) -> bool:
        """Whether a pass is measured: a walk back first runs forward without gradients."""
        return x.requires_grad or not self._gradients

    def _watch_outputs(self, linear: Any, site: Site) -> Any:
        accumulator = self._accumulator(site, "outputs", site.out_features, linear)

        def take(_: Any, args: tuple[Tensor, ...], result: Tensor) -> None:
            if not self._counts(result):
                return
            if self._gradients and site.bias and result.dtype.itemsize < 4:
                # Rounded to 16 bits beside a bias, outputs would say little of how they vary.
                W, b = stored_matrix(linear).detach().float(), linear.bias.detach().float()
                result = nn.functional.linear(args[0].detach().float(), W, b)
            accumulator.update(result)

        return linear.register_forward_hook(take)

    def _watch_inputs(self, linear: Any, site: Site, diagonal: bool) -> Any:
        accumulator = self._accumulator(site, "inputs", site.in_features, linear, diagonal)

        def take(_: Any, args: tuple[Tensor, ...]) -> None:
            if self._counts(args[0]):
                accumulator.update(args[0])

        return linear.register_forward_pre_hook(take)

    def _watch_gradients(self, linear: Any, site: Site) -> Any:
        through = self._reads_input_gradients(site)
        diagonal = through or site.out_features > LARGEST
        at_outputs = self._accumulator(site, "gradients", site.out_features, linear, diagonal)
        at_inputs = self._accumulator(site, "input_gradients", site.in_features, linear) if through else None

        def take(gradient: Tensor) -> None:
            at_outputs.update(gradient)
            if at_inputs is not None:
                wide = torch.promote_types(gradient.dtype, torch.float32)
                W = stored_matrix(linear).detach().to(wide)
                sequences = gradient.reshape(-1, *gradient.shape[-2:]) if gradient.ndim > 2 else [gradient]
                for sequence in sequences:
                    at_inputs.update(sequence.to(wide) @ W)

        def follow(_: Any, args: Any, result: Tensor) -> None:
            if result.requires_grad:
                result.register_hook(take)  # type: ignore[no-untyped-call]

        return linear.register_forward_hook(follow)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sites."""
        return tuple(site.name for site in self._sites)

    def to_cpu(self) -> Observer:
        """The same observer, its sums in ordinary memory."""
        for accumulator in self._accumulators.values():
            for name, value in vars(accumulator).items():
                if isinstance(value, Tensor):
                    setattr(accumulator, name, value.cpu())
        return self

    def add(self, other: Observer) -> None:
        """Take in what another one saw of the same sites; it is used up."""
        self._tokens += other._tokens
        for key, accumulator in other._accumulators.items():
            if key in self._accumulators:
                self._accumulators[key].add(accumulator)  # type: ignore[arg-type]
            else:
                self._accumulators[key] = accumulator
        other._accumulators = {}

    def moments(self) -> dict[str, SiteMoments]:
        """Moments by site; the accumulators are used up."""
        result: dict[str, SiteMoments] = {}
        for group in self._groups.values():
            outputs = self._reads_outputs(group)
            inputs = self._read(group[0], "inputs") if self._gradients or not outputs else None
            share = inputs.vectors / self._tokens if inputs is not None and self._tokens else 1
            for site in group:
                result[site.name] = SiteMoments(
                    inputs=inputs,
                    outputs=self._read(site, "outputs") if outputs else None,
                    gradients=self._read(site, "gradients") if self._gradients else None,
                    share=share,
                    input_gradients=self._read(site, "input_gradients") if self._reads_input_gradients(site) else None,
                )
        return {site.name: result[site.name] for site in self._sites}

    def _read(self, site: Site, what: str) -> Moments:
        accumulator = self._accumulators.pop((what, site.name), None) or MomentAccumulator(1)
        try:
            return accumulator.moments()
        except ValueError as error:
            error.args = (f"{site.name}, {what}: {error}",)
            raise
