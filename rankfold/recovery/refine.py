"""Block refinement: all parameters of one compressed block after the other are trained against the dense model."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from rankfold.calibration import BlockStep, walk_blocks, without_labels
from rankfold.calibration.walk import Call
from rankfold.errors import InputError
from rankfold.modules import linear_at, put, restack, use_eager_experts
from rankfold.progress import Step, no_step
from rankfold.recovery.divergence import divergence
from rankfold.sites import block_paths

RATE = 0.016
"""Learning rate of a block of width 1; it falls with the square root of the width, as the size of weights does."""

CHECKS = 8
"""How often the held-out error of a block is looked at."""


@dataclass(frozen=True)
class Refined:
    """What refinement did to one block."""

    block: str
    before: float
    """Held-out error: of the block's outputs, their mean squared error over their mean square; of the predictions,
    the divergence in nats, later blocks being dense."""
    after: float


def refine_blocks(  # noqa: PLR0913
    model: Any,
    batches: Sequence[Mapping[str, Tensor]],
    dense: Mapping[str, nn.Module],
    *,
    steps: int = 300,
    rate: float | None = None,
    seed: int = 0,
    work: Path | None = None,
    on_step: Step = no_step,
) -> list[Refined]:
    """Train every block in turn to give, on the compressed model's inputs, what the dense block gives on the dense's.

    Two streams of hidden states are kept for one block at a time: the targets in host memory, what the blocks read
    where the model computes. An eighth of the batches is held out: the parameters that did best on them stay.

    Args:
        model: The compressed model, in place.
        batches: At least two calibration batches.
        dense: The dense layer of every site.
        steps: AdamW steps a block, one batch each.
        rate: Learning rate; without it one that suits the width.
        seed: Seed of the order of batches.
        work: Folder in which finished blocks are kept, so that an interrupted run resumes; the caller removes it.
        on_step: Called after each step.

    Returns:
        The error before and after, of every block that was not done already.

    Raises:
        ValueError: If there are fewer than two batches.
    """
    if len(batches) < 2:
        raise InputError(f"Refinement holds batches out and needs at least two, but got {len(batches)}.")
    base = model.base_model
    prefix = "" if base is model else f"{model.base_model_prefix}."
    compressed = {name: linear_at(model, name) for name in dense}
    use_eager_experts(model)
    training = model.training
    read = without_labels(batches)
    results: list[Refined] = []
    visited: set[str] = set()
    model.eval()
    with closing(walk_blocks(base, read)) as first, closing(walk_blocks(base, read)) as second:
        for straight, drifted in zip(first, second, strict=True):
            if straight.path in visited:
                raise InputError(f"{type(model).__name__} applies a block repeatedly, so it cannot be refined alone.")
            visited.add(straight.path)
            put(model, dense)
            with torch.no_grad():
                targets = [_output(call).cpu() for call in straight.calls]
            straight.run()
            put(model, compressed)
            block = base.get_submodule(straight.path)
            if _resume(block, straight.path, work):
                for _ in range(steps):
                    on_step()
            else:
                settings = (steps, rate or RATE / math.sqrt(targets[0].shape[-1]), seed)
                before, after = _train(block, _distance(drifted, targets), len(targets), settings, on_step)
                results.append(Refined(prefix + straight.path, before, after))
                _keep(block, straight.path, work)
            drifted.run()
    restack(model)
    model.train(training)
    return results


def refine_predictions(  # noqa: PLR0913
    model: Any,
    teacher: Any,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    steps: int = 300,
    rate: float | None = None,
    seed: int = 0,
    work: Path | None = None,
    on_step: Step = no_step,
) -> list[Refined]:
    """Train every block in turn to give the dense model's predictions, the blocks after it being dense.

    A block's own output is not what matters: later blocks forgive some errors and amplify others. Here they are run
    dense, so that the divergence of the predictions says which. A step costs three passes through the model instead
    of three through one block; the optimizer still holds one block only.

    Args:
        model: The compressed model, in place.
        teacher: The dense model. It may share parameters with the compressed one.
        batches: At least two calibration batches.
        steps: AdamW steps a block, one batch each.
        rate: Learning rate; without it one that suits the width.
        seed: Seed of the order of batches.
        work: Folder in which finished blocks are kept, so that an interrupted run resumes; the caller removes it.
        on_step: Called after each step.

    Returns:
        The held-out divergence before and after, of every block that was not done already.

    Raises:
        ValueError: If there are fewer than two batches, or the model predicts no distribution.
    """
    if len(batches) < 2:
        raise InputError(f"Refinement holds batches out and needs at least two, but got {len(batches)}.")
    read = without_labels(batches)
    if not predicts(teacher, read[0]):
        raise InputError(f"A {type(model).__name__} predicts no distribution; refine it towards its blocks' outputs.")
    use_eager_experts(model)
    paths = block_paths(model)
    blocks = {path: model.get_submodule(path) for path in paths}
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = model.training, teacher.training
    _own_parameters(teacher, blocks.values())
    model.eval().requires_grad_(False)
    teacher.eval().requires_grad_(False)
    results: list[Refined] = []
    rate = rate or RATE / math.sqrt(model.get_input_embeddings().weight.shape[1])

    def error_on(index: int) -> Tensor:
        with torch.no_grad():
            expected = _predictions(teacher, read[index])
        return divergence(_predictions(model, read[index]), expected)

    try:
        for path in paths:
            model.set_submodule(path, teacher.get_submodule(path))
        for path, block in blocks.items():
            model.set_submodule(path, block)
            done = _resume(block, path, work)
            if done:
                for _ in range(steps):
                    on_step()
                continue
            with _in_float32(block):
                before, after = _train(block, error_on, len(read), (steps, rate, seed), on_step)
            results.append(Refined(path, before, after))
            _keep(block, path, work)
    finally:
        for path, block in blocks.items():
            model.set_submodule(path, block)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    restack(model)
    model.train(training[0])
    teacher.train(training[1])
    return results


@torch.no_grad()
def predicts(model: Any, batch: Mapping[str, Tensor]) -> bool:
    """Whether a model's output is a distribution, as of the next token or of a class."""
    logits = getattr(model(**{name: value[:1] for name, value in batch.items()}), "logits", None)
    return logits is not None and logits.shape[-1] > 1


def _predictions(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    cache = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    logits: Tensor = model(**batch, **cache).logits
    return logits


def _own_parameters(teacher: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """What is trained must not be the teacher's: layers that stayed dense may be."""
    trained = {id(parameter) for block in blocks for parameter in block.parameters()}
    for module in teacher.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in trained:
                setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))


@contextmanager
def _in_float32(block: nn.Module) -> Iterator[None]:
    """Let a block of a 16-bit model compute in float32: it reads what the others give, and gives what they read."""
    dtype = next((part.dtype for part in block.parameters() if part.is_floating_point()), torch.float32)

    def cast(to: torch.dtype, tree: Any) -> Any:
        return tree_map_only(Tensor, lambda part: part.to(to) if part.is_floating_point() else part, tree)

    handles = [
        block.register_forward_pre_hook(
            lambda _, args, kwargs: (cast(torch.float32, args), cast(torch.float32, kwargs)), with_kwargs=True
        ),
        block.register_forward_hook(lambda _, args, output: cast(dtype, output)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _resume(block: nn.Module, path: str, work: Path | None) -> bool:
    """Load a block that an earlier, interrupted run refined."""
    file = work / f"{path}.safetensors" if work else None
    if file is None or not file.exists():
        return False
    block.load_state_dict(load_file(file))
    return True


def _keep(block: nn.Module, path: str, work: Path | None) -> None:
    """Write a refined block, whole or not at all."""
    if work is None:
        return
    work.mkdir(parents=True, exist_ok=True)
    file = work / f"{path}.safetensors"
    partial = file.with_suffix(".partial")
    save_file({name: part.contiguous() for name, part in block.state_dict().items()}, partial)
    partial.replace(file)


def _output(call: Call, dtype: torch.dtype | None = None) -> Tensor:
    """The hidden states that a block gives, computed in another dtype if one is given."""
    args, kwargs = call.args, call.kwargs
    if dtype is not None:
        args, kwargs = tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, (args, kwargs))
    output = Call(call.module, args, kwargs).run()
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _distance(step: BlockStep, targets: Sequence[Tensor]) -> Callable[[int], Tensor]:
    """The squared error of a block's outputs on one batch, over their mean square on some."""
    sample = targets[-max(1, len(targets) // 8) :]
    power = sum(float(target.float().square().mean()) for target in sample) / len(sample) or 1.0

    def error_on(index: int) -> Tensor:
        output = _output(step.calls[index], torch.float32)
        error = output - targets[index].to(output)
        return error.square().mean() / power

    return error_on


def _train(
    block: nn.Module,
    error_on: Callable[[int], Tensor],
    count: int,
    settings: tuple[int, float, int],
    on_step: Step,
) -> tuple[float, float]:
    """Train one block, in float32 whatever its dtype; its error on the held-out eighth before and after."""
    steps, rate, seed = settings
    generator = torch.Generator().manual_seed(seed)
    held = max(1, count // 8)

    @torch.no_grad()
    def held_out_error() -> float:
        return sum(float(error_on(index)) for index in range(count - held, count)) / held

    dtypes = {name: part.dtype for name, part in [*block.named_parameters(), *block.named_buffers()]}
    block.float()
    wanted = [parameter for parameter in block.parameters() if parameter.is_floating_point()]
    trainable = [parameter.requires_grad for parameter in wanted]
    before = best = held_out_error()
    state = {name: part.clone() for name, part in block.state_dict().items()}
    for parameter in wanted:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(wanted, lr=rate, weight_decay=0.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min(1.0, (done + 1) / 20) * 0.5 * (1 + math.cos(math.pi * done / steps))
    )
    for number in range(1, steps + 1):
        index = int(torch.randint(count - held, (1,), generator=generator))
        with torch.enable_grad():
            error_on(index).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(wanted, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        on_step()
        if number % max(1, steps // CHECKS) == 0 or number == steps:
            current = held_out_error()
            if current < best:
                best, state = current, {name: part.clone() for name, part in block.state_dict().items()}
    block.load_state_dict(state)
    for name, part in [*block.named_parameters(), *block.named_buffers()]:
        part.data = part.data.to(dtypes[name])
    for parameter, flag in zip(wanted, trainable, strict=True):
        parameter.requires_grad_(flag)
    return before, best
