"""Every linear layer of a model's blocks quantized, block after block, on what the quantized blocks before give it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.architectures import adopt
from rankfold.calibration import BlockStep, MomentAccumulator, walk_body
from rankfold.circumstances import versions
from rankfold.errors import InputError
from rankfold.factorization import Moments
from rankfold.modules import (
    QuantizedLinear,
    Quantizer,
    is_linear,
    linear_shape,
    quantizer_at,
    stored_matrix,
)
from rankfold.plan import Plan
from rankfold.precision import float64_device, widened
from rankfold.progress import Step, no_step


@torch.no_grad()
def quantize_blocks(
    model: Any,
    batches: Sequence[Mapping[str, Tensor]],
    scheme: str,
    settings: Any = None,
    *,
    on_step: Step = no_step,
) -> dict[str, float]:
    """Quantize the linear layers of all blocks, dense layers and factors alike, in place.

    The second factor of a pair is refitted to the rounded first one before it is rounded itself.

    A layer is left unchanged if quantization would not make it smaller.

    Args:
        model: A transformers model, dense or factorized.
        batches: Calibration batches on the model's device.
        scheme: A quantizer of layers: a key of `rankfold.modules.QUANTIZERS`.
        settings: Its settings, such as `Grid`; without them its defaults.
        on_step: Called after each layer.

    Returns:
        Average bits per weight, by the path of the layer.

    Raises:
        ValueError: If the scheme does not quantize layers, the model is already quantized or has no linear layer in
            its blocks, or a value is not finite.
    """
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise InputError("The model is already quantized. Quantize the checkpoint that it was made from.")
    entry = quantizer_at(scheme)
    if entry.quantize is None:
        raise InputError(f"The scheme {scheme!r} is applied by a library while the model loads, not block by block.")
    settings = entry.settings() if settings is None else settings
    training = model.training
    model.eval()
    bits: dict[str, float] = {}
    kept: dict[str, Any] = {}
    for step in walk_body(model, batches):
        layers = {f"{step.path}.{name}": layer for name, layer in _linears(model.get_submodule(step.path))}
        for name, moment in _inputs(step, layers):
            for path, layer in _with_its_partner(model, name, layers[name], moment, _quantizing(entry, settings)):
                if layer is not None:
                    model.set_submodule(path, layer)
                    bits[path], kept[path] = layer.bits_per_weight, layer.structure
                on_step()
    if not bits:
        raise InputError(f"{type(model).__name__}: quantization makes no linear layer in the model's blocks smaller.")
    if not hasattr(model.config, "rankfold"):
        adopt(model, Plan(options=(), method="", versions=versions()))
    stored = {"scheme": scheme, "settings": asdict(settings), "modules": kept}
    model.config.rankfold = {**model.config.rankfold, "quantization": [stored]}
    model.train(training)
    return bits


@torch.no_grad()
def each_layer(model: Any, batches: Sequence[Mapping[str, Tensor]]) -> Iterator[tuple[Any, Tensor]]:
    """Every linear layer of every block with its inputs' second moment; the next blocks see what is done to it."""
    for step in walk_body(model, batches):
        layers = dict(_linears(model.get_submodule(step.path)))
        for name, moment in _inputs(step, layers):
            yield layers[name], moment.second


_Quantize = Callable[[str, Any, Tensor], Any]
"""Path of a layer, the layer and its inputs' second moment to the layer in few bits, or nothing."""


def _linears(block: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in block.named_modules() if is_linear(module))


def _inputs(step: BlockStep, layers: Mapping[str, Any]) -> Iterator[tuple[str, Moments]]:
    """The moments of every layer's inputs, layers that read the same tensor sharing them."""
    readers: dict[int, str] = {}
    moments: dict[str, MomentAccumulator] = {}
    with _hooked(layers, lambda name, x: readers.setdefault(id(x), name), keep=True) as leaders:
        step.calls[0].run()
    for name in set(leaders.values()):
        layer = layers[name]
        moments[name] = MomentAccumulator(linear_shape(layer)[1], layer.weight.device)
    with _hooked({name: layers[name] for name in moments}, lambda name, x: moments[name].update(x)):
        for call in step.calls:
            call.run()
    measured: dict[str, Moments] = {}
    for name, layer in layers.items():
        # An expert that no token of the first batch reached is rounded without regard to its inputs.
        leader = leaders.get(name)
        if leader is None:
            identity = torch.eye(linear_shape(layer)[1], device=float64_device(layer.weight.device))
            yield name, Moments(0, torch.zeros_like(identity[0]), identity)
            continue
        if leader not in measured:
            measured[leader] = moments.pop(leader).moments()
        yield name, measured[leader]


@contextmanager
def _hooked(
    layers: Mapping[str, Any], take: Callable[[str, Tensor], Any], keep: bool = False
) -> Iterator[dict[str, Any]]:
    """Hand every layer's input to a function while the block runs; what it returns, by layer."""
    results: dict[str, Any] = {}
    alive: list[Tensor] = []

    def hook_for(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            # Holding the tensor keeps its identity from being given to another one.
            alive.extend(args[:1] if keep else ())
            results[name] = take(name, args[0])

        return hook

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(hook_for(name)).remove)
        yield results


def _with_its_partner(
    model: Any, name: str, layer: Any, inputs: Moments, quantized: _Quantize
) -> Iterator[tuple[str, Any]]:
    """A layer quantized; after the first factor of a pair the second, fitted to what the first has become."""
    owner_path, _, part = name.rpartition(".")
    owner = model.get_submodule(owner_path)
    if not getattr(owner, "is_pair", False):
        yield name, quantized(name, layer, inputs.second)
        return
    if part != "down":
        return
    S = inputs.second.double()
    target = widened(owner.up.weight) @ widened(layer.weight)
    made = quantized(name, layer, inputs.second)
    D = widened(layer.weight if made is None else made.dequantized())
    moment = D @ S @ D.T
    # A little damping keeps directions that no input reaches as they were.
    damped = moment + 1e-6 * moment.diagonal().mean() * torch.eye(len(D), dtype=D.dtype, device=D.device)
    old = widened(owner.up.weight)
    refitted = old + torch.linalg.solve(damped, ((target - old @ D) @ S @ D.T).T).T
    if layer.bias is not None:
        # `up` reads what `down` gives with its bias, as the pivots of a pivoted layer.
        b = widened(layer.bias)
        owner.up.bias.data += ((old - refitted) @ b).to(owner.up.bias)
        shift = torch.outer(D @ inputs.mean.double(), b)
        moment = moment + shift + shift.T + torch.outer(b, b)
    owner.up.weight.data = refitted.to(owner.up.weight.dtype).to(owner.up.weight.device)
    yield name, made
    yield f"{owner_path}.up", quantized(f"{owner_path}.up", owner.up, moment)


def _quantizing(entry: Quantizer, settings: Any) -> _Quantize:
    """What stores a layer, or nothing where that is no smaller."""
    assert entry.quantize is not None, "a quantizer of layers"
    quantize = entry.quantize

    def quantized(name: str, layer: Any, second: Tensor) -> Any:
        weight = stored_matrix(layer)
        weight = weight.to(float64_device(weight.device))
        try:
            made = quantize(weight, layer.bias, second, settings).to(layer.weight.device)
        except ValueError as error:
            error.args = (f"{name}: {error}",)
            raise
        return made if made.bits_per_weight < 8 * weight.element_size() else None  # type: ignore[operator]

    return quantized
