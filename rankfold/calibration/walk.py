"""The one loop over a model's blocks: all batches stand still before a block until the caller lets them through."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from rankfold.sites import block_paths


class Call(NamedTuple):
    """What a block is about to be called with."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class BlockStep:
    """One block, before which every batch stands; `run` lets them through, once.

    Before `run` the block may be called on `calls` at will, and changed or replaced: what then runs is the
    changed one. The walk runs a block that its caller did not.
    """

    path: str
    calls: list[Call]
    _resume: Callable[[], None] = field(repr=False)
    done: bool = False

    def run(self) -> None:
        """Run every batch through the block and up to the next one."""
        if not self.done:
            self.done = True
            self.calls = []
            self._resume()


def walk_blocks(
    model: Any, batches: Iterable[Mapping[str, Tensor]], on_batch: Callable[[], None] = lambda: None
) -> Iterator[BlockStep]:
    """Walk over the blocks of a model in the order in which it calls them, all batches side by side.

    Each batch runs the model's own `forward` in a greenlet that stands still at the entrance of every block. So
    what happens between blocks (masks, positions, a decoder after an encoder) is the model's business and needs
    no knowledge of architectures; only one block is at work at a time, and of the others nothing but each
    batch's hidden states is alive. A block that the model calls again, as ALBERT does, comes again.

    Args:
        model: The model whose `forward` takes a batch's items as keyword arguments.
        batches: Token ids and whatever else the model reads; on the model's device.
        on_batch: Called after each batch has passed a block, for a progress bar.

    Raises:
        ValueError: If there is no batch, or the batches call the blocks in different orders.
    """
    paths = {model.get_submodule(path): path for path in block_paths(model)}
    cache = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    forwards = [greenlet(_forward(model, {**batch, **cache})) for batch in batches]
    if not forwards:
        raise ValueError("A walk over the blocks needs at least one batch, but got none.")
    running = set(forwards)

    def stand_still(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        current = getcurrent()
        if current in running:
            current.parent.switch(Call(module, args, kwargs))

    def resume_all() -> None:
        for index, forward in enumerate(forwards):
            with torch.no_grad():
                arrivals[index] = forward.switch()
            on_batch()

    arrivals: list[Any] = [None] * len(forwards)
    handles = [block.register_forward_pre_hook(stand_still, with_kwargs=True) for block in paths]
    try:
        resume_all()
        while not all(forward.dead for forward in forwards):
            if len({id(call.module) if call else None for call in arrivals}) != 1:
                raise ValueError("The batches call the model's blocks in different orders, so they cannot be walked.")
            step = BlockStep(paths[arrivals[0].module], list(arrivals), resume_all)
            yield step
            step.run()
    finally:
        for handle in handles:
            handle.remove()
        for forward in forwards:
            forward.throw()


def _forward(model: Any, batch: Mapping[str, Any]) -> Callable[[], None]:
    """The model's forward call with nothing returned, so that the outputs of a batch do not stay alive."""

    def call() -> None:
        model(**batch)

    return call
