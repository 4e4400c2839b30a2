"""Block refinement: all parameters of a compressed block are trained against the outputs of the dense one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from rankfold.calibration import BlockStep, walk_blocks
from rankfold.calibration.walk import Call
from rankfold.modules import linear_at, put, restack, use_eager_experts

RATE = 0.016
"""Learning rate of a block of width 1; it falls with the square root of the width, as the size of weights does."""

CHECKS = 8
"""How often the held-out error of a block is looked at."""


@dataclass(frozen=True)
class Refined:
    """What refinement did to one block."""

    block: str
    before: float
    """Mean squared error of the block's outputs on held-out windows, over their mean square."""
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
    on_step: Callable[[], None] = lambda: None,
) -> list[Refined]:
    """Train every block in turn to give, on the compressed model's inputs, what the dense block gives on the dense's.

    Both streams of hidden states are kept for one block at a time, where the model computes. An eighth of the
    batches is held out: the parameters that did best on them stay.

    Args:
        model: The compressed model, in place.
        batches: At least two calibration batches.
        dense: The dense layer of every site.
        steps: AdamW steps a block, one batch each.
        rate: Learning rate; without it one that suits the width.
        seed: Seed of the order of batches.
        work: Folder in which finished blocks are kept, so that a killed run goes on; the caller removes it.
        on_step: Called after each step.

    Returns:
        The error before and after, of every block that was not done already.

    Raises:
        ValueError: If there are fewer than two batches.
    """
    if len(batches) < 2:
        raise ValueError(f"Refinement holds batches out and needs at least two, but got {len(batches)}.")
    base = model.base_model
    prefix = "" if base is model else f"{model.base_model_prefix}."
    compressed = {name: linear_at(model, name) for name in dense}
    use_eager_experts(model)
    training = model.training
    read = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    results: list[Refined] = []
    visited: set[str] = set()
    model.eval()
    with closing(walk_blocks(base, read)) as first, closing(walk_blocks(base, read)) as second:
        for straight, drifted in zip(first, second, strict=True):
            if straight.path in visited:
                raise ValueError(f"{type(model).__name__} applies a block repeatedly, so it cannot be refined alone.")
            visited.add(straight.path)
            put(model, dense)
            with torch.no_grad():
                targets = [_output(call) for call in straight.calls]
            straight.run()
            put(model, compressed)
            block = base.get_submodule(straight.path)
            file = work / f"{straight.path}.safetensors" if work else None
            if file is not None and file.exists():
                block.load_state_dict(load_file(file))
                for _ in range(steps):
                    on_step()
            else:
                settings = (steps, rate or RATE / math.sqrt(targets[0].shape[-1]), seed)
                before, after = _refine(block, drifted, targets, settings, on_step)
                results.append(Refined(prefix + straight.path, before, after))
                if file is not None:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    partial = file.with_suffix(".partial")
                    save_file({name: part.contiguous() for name, part in block.state_dict().items()}, partial)
                    partial.replace(file)
            drifted.run()
    restack(model)
    model.train(training)
    return results


def _output(call: Call, dtype: torch.dtype | None = None) -> Tensor:
    """The hidden states that a block gives, computed in another dtype if one is given."""
    args, kwargs = call.args, call.kwargs
    if dtype is not None:
        args, kwargs = tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, (args, kwargs))
    output = call.module(*args, **kwargs)
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _refine(
    block: nn.Module,
    step: BlockStep,
    targets: Sequence[Tensor],
    settings: tuple[int, float, int],
    on_step: Callable[[], None],
) -> tuple[float, float]:
    """Train one block, in float32 whatever its dtype; its held-out error before and after."""
    steps, rate, seed = settings
    generator = torch.Generator().manual_seed(seed)
    held = max(1, len(targets) // 8)
    power = sum(float(target.float().square().mean()) for target in targets[-held:]) / held or 1.0

    def error_on(index: int) -> Tensor:
        error = _output(step.calls[index], torch.float32) - targets[index].float()
        return error.square().mean() / power

    @torch.no_grad()
    def held_out_error() -> float:
        errors = [float(error_on(index)) for index in range(len(targets) - held, len(targets))]
        return sum(errors) / held

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
        index = int(torch.randint(len(targets) - held, (1,), generator=generator))
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
