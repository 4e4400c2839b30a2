"""The one loop over a model's blocks: all batches stand still before a block until the caller lets them through."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from rankfold.errors import InputError
from rankfold.progress import Step, no_step
from rankfold.shelf import Shelf
from rankfold.sites import block_paths


class Call(NamedTuple):
    """What a block is about to be called with."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self) -> Any:
        """What the block gives; to be had repeatedly, so a cache of keys and values is not added to."""
        fresh = {
            name: copy.deepcopy(value) if hasattr(value, "get_seq_length") else value
            for name, value in self.kwargs.items()
        }
        return self.module(*self.args, **fresh)


@dataclass
class BlockStep:
    """One block, before which every batch stands; `run` lets them through, once.

    Before `run` the block may be called on `calls` at will, and changed or replaced: what then runs is the
    changed one. The walk runs a block that its caller did not.
    """

    path: str
    calls: list[Call]
    _run: Callable[[list[Call]], None] = field(repr=False)
    done: bool = False

    def run(self) -> None:
        """Run every batch through the block and up to the next one; in a reverse walk, its gradient back."""
        if not self.done:
            self.done = True
            calls, self.calls = self.calls, []
            self._run(calls)


def walk_blocks(model: Any, batches: Iterable[Mapping[str, Tensor]], on_step: Step = no_step) -> Generator[BlockStep]:
    """Walk over the blocks of a model in the order in which it calls them, all batches side by side.

    Each batch runs the model's own `forward` in a greenlet that stands still at the entrance of every block. So
    what happens between blocks (masks, positions, a decoder after an encoder) is the model's business and needs
    no knowledge of architectures; only one block is at work at a time, and of the others nothing but each
    batch's hidden states is alive. A block that the model calls again, as ALBERT does, comes again.

    Args:
        model: The model whose `forward` takes a batch's items as keyword arguments.
        batches: Token ids and whatever else the model reads; on the model's device.
        on_step: Called after each batch has passed a block, for a progress bar.

    Raises:
        ValueError: If there is no batch, or the batches call the blocks in different orders.
    """
    with _Forwards(model, batches, lambda output, batch: None) as forwards:

        def resume_all(_: list[Call]) -> None:
            for index in range(len(forwards.arrivals)):
                forwards.resume(index)
                on_step()

        resume_all([])
        while path := forwards.path():
            step = BlockStep(path, list(forwards.arrivals), resume_all)
            yield step
            step.run()


def walk_body(model: Any, batches: Iterable[Mapping[str, Tensor]], on_step: Step = no_step) -> Generator[BlockStep]:
    """`walk_blocks` through the body of a model, without its head and its labels; paths are those in the whole model.

    Args:
        model: A model, with or without a head.
        batches: Keyword arguments of the forward call.
        on_step: Called after each batch has passed a block.
    """
    base = model.base_model
    prefix = "" if base is model else f"{model.base_model_prefix}."
    with closing(walk_blocks(base, without_labels(batches), on_step)) as steps:
        for step in steps:
            step.path = prefix + step.path
            yield step


def without_labels(batches: Iterable[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Batches as a body reads them, which knows no labels."""
    return [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]


def walk_blocks_back(
    model: Any,
    batches: Iterable[Mapping[str, Tensor]],
    loss: Callable[[Any, Mapping[str, Tensor]], Tensor],
    on_step: Step = no_step,
    shelf: Shelf | None = None,
) -> Iterator[BlockStep]:
    """Walk over the blocks from the last to the first, the gradient of a loss flowing back, one block at a time.

    A forward walk keeps what every block was called with. Running a step then computes the block once more,
    with gradients, and passes back the gradient at its input; hooks on its layers see the gradients at their
    outputs, and parameters that require one collect theirs. Only the graph of one block and one batch is alive.

    Args:
        model: A model whose blocks form a chain: each reads the hidden states that the one before it gave.
        batches: Keyword arguments of the forward call.
        loss: A scalar from the model's output and its batch, such as `rankfold.calibration.summed_loss` gives.
        on_step: Called after each batch has passed a block, forward and back.
        shelf: Where hidden states at the entrance of every block wait for the way back.

    Raises:
        ValueError: If there is no batch, or the model has both an encoder and a decoder. Other models whose blocks
            form no chain are not noticed here: ask `is_chain`.
    """
    if model.config.is_encoder_decoder:
        raise InputError("A reverse walk follows one chain of blocks, but this model has an encoder and a decoder.")
    gradients: list[Tensor] = []

    def back(run: Callable[[int, Call], Tensor], calls: list[Call]) -> None:
        for index, call in enumerate(calls):
            leaf = call.args[0].detach().requires_grad_()
            with torch.enable_grad():
                run(index, call._replace(args=(leaf, *call.args[1:])))
            assert leaf.grad is not None, "a block's output must depend on its input"
            gradients[index] = leaf.grad
            on_step()

    def through_the_end(index: int, call: Call) -> Tensor:
        result: Tensor = forwards.resume(index, call)
        result.backward()  # type: ignore[no-untyped-call]
        return result

    def through_the_block(index: int, call: Call) -> Tensor:
        hidden = first_tensor(call.run())
        hidden.backward(gradients[index])  # type: ignore[no-untyped-call]
        return hidden

    batches = list(batches)
    states = Shelf() if shelf is None else shelf
    visits = sum(1 for _ in walk_blocks(model, batches[:1]))
    with _Forwards(model, batches, loss) as forwards:
        gradients = [torch.empty(0)] * len(batches)
        kept: list[tuple[str, list[Call]]] = []
        for visit in range(visits):
            for index in range(len(batches)):
                forwards.resume(index)
                on_step()
            states["states", visit] = [call.args[0] for call in forwards.arrivals]
            # What else a block is called with (masks, positions) is the same for all of them.
            kept.append((forwards.path(), [call._replace(args=call.args[1:]) for call in forwards.arrivals]))
        run = through_the_end
        while kept:
            path, rest = kept.pop()
            hidden = states.pop(("states", len(kept)))
            calls = [call._replace(args=(x, *call.args)) for x, call in zip(hidden, rest, strict=True)]
            del hidden
            step = BlockStep(path, calls, lambda calls, run=run: back(run, calls))  # type: ignore[misc]
            yield step
            step.run()
            run = through_the_block


def first_tensor(output: Any) -> Tensor:
    """The hidden states in what a block returns, alone or before other things."""
    while not isinstance(output, Tensor):
        output = output[0]
    return output


def is_chain(model: Any, batch: Mapping[str, Tensor]) -> bool:
    """Whether gradients that are handed from block to block are those of ordinary backpropagation.

    They are not where something else than hidden states passes between blocks (Gemma 3n's shared keys and values),
    or where hidden states change on their way (Funnel's pooling). Tried on a few tokens, with both.

    Args:
        model: A model in evaluation mode, whose parameters require no gradients.
        batch: Keyword arguments of the forward call, of which a few tokens are used.
    """
    if model.config.is_encoder_decoder:
        return False
    (read,) = without_labels([batch])
    few = {name: value[:1, :16] if value.ndim > 1 else value[:1] for name, value in read.items()}
    expected: dict[str, list[Tensor]] = {}
    found: dict[str, list[Tensor]] = {}
    with _gradients_at_blocks(model, expected), torch.enable_grad(), embeddings_with_gradients(model):
        try:
            _probe(model(**few, **_no_cache(model)), few).backward()  # type: ignore[no-untyped-call]
        except (RuntimeError, AssertionError) as error:
            raise InputError(
                f"{type(model).__name__} gives no gradients in evaluation mode ({error}), and this method needs them. "
                "Use one that does not, such as whitened."
            ) from error
    try:
        with _gradients_at_blocks(model, found):
            for step in walk_blocks_back(model, [few], _probe):
                step.run()
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, AssertionError):
        # Whatever a block makes of being called alone, it is no link of a chain.
        return False
    return all(
        len(found.get(path, ())) == len(gradients) and all(map(_alike, found[path], gradients))
        for path, gradients in expected.items()
    )


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and float((a.float() - b.float()).norm()) <= 0.05 * float(b.float().norm())


def _probe(output: Any, _: Any) -> Tensor:
    """A scalar on which every output has its own fixed influence."""
    values: Tensor = first_tensor(output.to_tuple())
    weights = torch.arange(values.numel(), device=values.device).sin().reshape(values.shape)
    return (values.float() * weights).sum()


@contextmanager
def _gradients_at_blocks(model: nn.Module, gradients: dict[str, list[Tensor]]) -> Iterator[None]:
    """Collect the gradients at the outputs of every block, in the order in which they come."""

    def hook_for(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            hidden = first_tensor(output)
            if hidden.requires_grad:
                hidden.register_hook(lambda gradient: gradients.setdefault(path, []).append(gradient.detach()))  # type: ignore[no-untyped-call]

        return hook

    with ExitStack() as stack:
        for path in block_paths(model):
            stack.callback(model.get_submodule(path).register_forward_hook(hook_for(path)).remove)
        yield


@contextmanager
def embeddings_with_gradients(model: nn.Module) -> Iterator[None]:
    """Let gradients flow through the whole model, whose parameters require none."""
    with ExitStack() as stack:
        for embedding in filter(lambda module: isinstance(module, nn.Embedding), model.modules()):
            stack.callback(embedding.register_forward_hook(_require_gradients).remove)
        yield


def _require_gradients(_: nn.Module, args: Any, result: Tensor) -> Tensor:
    if not isinstance(result, Tensor):
        return result
    # A copy, since some models change it in place afterwards, which a leaf must not be.
    return result if result.requires_grad else result.requires_grad_().clone()


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """A model that keeps no keys and values: a block that is called again would add to them."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    asked = [config for config in configs.values() if getattr(config, "use_cache", False)]
    for config in asked:
        config.use_cache = False
    try:
        yield
    finally:
        for config in asked:
            config.use_cache = True


def _no_cache(model: Any) -> dict[str, bool]:
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


class _Forwards(ExitStack):
    """The forward calls of all batches, each in a greenlet that stands still at the entrance of every block."""

    def __init__(self, model: Any, batches: Iterable[Mapping[str, Tensor]], finish: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self._paths = {model.get_submodule(path): path for path in block_paths(model)}
        self._greenlets = [greenlet(_forward(model, batch, finish)) for batch in batches]
        if not self._greenlets:
            raise InputError("A walk over the blocks needs at least one batch, but got none.")
        running = set(self._greenlets)
        self.enter_context(without_cache(model))
        self.arrivals: list[Any] = [None] * len(running)

        def stand_still(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            current = getcurrent()
            if current not in running:
                return None
            changed: Call | None = current.parent.switch(Call(module, args, kwargs))
            return None if changed is None else (changed.args, changed.kwargs)

        for block in self._paths:
            self.callback(block.register_forward_pre_hook(stand_still, with_kwargs=True).remove)
        for forward in self._greenlets:
            self.callback(forward.throw)

    def resume(self, index: int, changed: Call | None = None) -> Any:
        """Let one batch go on to its next block or its end, with other arguments (and gradients) if they are given."""
        forward = self._greenlets[index]
        with torch.set_grad_enabled(changed is not None):
            self.arrivals[index] = forward.switch(changed) if forward else forward.switch()
        return self.arrivals[index]

    def path(self) -> str:
        """The block before which all batches stand; empty when they are through."""
        if all(forward.dead for forward in self._greenlets):
            return ""
        if len({id(call.module) if call else None for call in self.arrivals}) != 1:
            raise InputError("The batches call the model's blocks in different orders, so they cannot be walked.")
        return self._paths[self.arrivals[0].module]


def _forward(model: Any, batch: Mapping[str, Any], finish: Callable[[Any, Any], Any]) -> Callable[[], Any]:
    """The model's forward call, of whose output only what `finish` makes of it stays alive."""
    settings = _no_cache(model)

    def call() -> Any:
        return finish(model(**batch, **settings), batch)

    return call
