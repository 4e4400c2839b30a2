"""How sites are found: a few tokens run through the model and show which layers are called, and on what."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.errors import InputError
from rankfold.modules import FactorizedLinear, LinearStack, QuantizedLinear, is_linear, linear_shape
from rankfold.sites.fused import fused_parts
from rankfold.sites.site import Site, Sites, Skipped
from rankfold.sites.text_inputs import example_ids, has_other_inputs, text_arguments, text_config

_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_ROUTER = "a router: its few outputs choose the experts"


def find_sites(model: Any, inputs: Mapping[str, Tensor] | None = None) -> Sites:
    """Every weight of a model that may be factorized, found by running a few tokens through it.

    The run shows which layers are called at all and which read the same tensor, so that no architecture needs
    code of its own; a model on the meta device is run there, without weights.

    Args:
        model: A transformers model, with or without weights.
        inputs: Keyword arguments of one forward call, for models that read something other than token ids.

    Returns:
        Sites in the order of the model's modules; and the matrices that are not sites, each with the reason.

    Raises:
        ValueError: If the model reads no token ids and `inputs` is not given, or if a model on the meta device
            cannot be run there, as some cannot with transformers 4.
    """
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    blocks = _blocks(model, linears)
    calls = _trace(model, linears, inputs)
    towers = _towers(model, linears, blocks, calls) if inputs is None and has_other_inputs(model) else set()
    called_kinds = {_siblings(name) for name, ids in calls.items() if ids or name in towers}
    tied = _tied(model)
    sites, skipped = [], []
    readers: dict[int, str] = {}
    for name, module in linears.items():
        shape = linear_shape(module)
        reason = _reason_against(model, name, module, shape, tied, called_kinds)
        if reason:
            skipped.append(Skipped(f"{name}.weight", shape, reason))
            continue
        reads = name
        if len(calls[name]) == 1:
            reads = readers.setdefault(calls[name][0], name)
        bias = getattr(module, "bias", None) is not None
        site = _site(model, name, shape, bias, module.weight.element_size(), blocks, reads)
        sites.append(replace(site, calls=max(1, len(calls[name])), reads_text=name not in towers))
    for name, parameter, reason in _other_matrices(model, set(linears)):
        if reason:
            skipped.append(Skipped(name, tuple(parameter.shape), reason))
            continue
        shape = (parameter.shape[1], parameter.shape[2])
        for index in range(len(parameter)):
            slice_name = f"{name}.{index}"
            sites.append(_site(model, slice_name, shape, False, parameter.element_size(), blocks, slice_name))
    order = {name: position for position, name in enumerate(_parameter_order(model))}
    sites.sort(key=lambda site: order.get(re.sub(r"\.\d+$", "", site.name), order.get(site.name, 0)))
    return Sites(tuple(sites), tuple(skipped))


def _parameter_order(model: nn.Module) -> list[str]:
    names = [name.removesuffix(".weight") for name, _ in model.named_parameters(remove_duplicate=False)]
    return list(dict.fromkeys(names))


def _site(
    model: Any,
    name: str,
    shape: tuple[int, int],
    bias: bool,
    bytes_per_parameter: int,
    blocks: list[str],
    reads: str,
) -> Site:
    block = next((path for path in blocks if name.startswith(f"{path}.")), None)
    kind = _star(name.removeprefix(f"{block}.") if block else name)
    parts = fused_parts(text_config(model), name, shape[0])
    return Site(name, shape[0], shape[1], bias, bytes_per_parameter, block, kind, reads, parts)


def _star(name: str) -> str:
    """The name with every index replaced by a star.

    >>> _star("layers.3.experts.12.w1")
    'layers.*.experts.*.w1'
    """
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _siblings(name: str) -> str:
    """What a layer has in common with those that another input may call instead, such as `expert_0` and `expert_1`."""
    return re.sub(r"(?<=[._])\d+(?=\.|$)", "*", name)


def _blocks(model: nn.Module, linears: Mapping[str, nn.Module]) -> list[str]:
    """Paths of the blocks: the members of the outermost module lists that hold linear layers."""
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and not isinstance(module, LinearStack)
    ]
    # A list of lists, as Funnel has, holds blocks only in its inner lists.
    lists = [name for name in lists if not isinstance(model.get_submodule(f"{name}.0"), nn.ModuleList)]
    # A list of layers, as Gemma 3n has them before and after its blocks, is none of blocks.
    lists = [name for name in lists if f"{name}.0" not in linears]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists if other != name)]
    holding = [name for name in outermost if any(linear.startswith(f"{name}.") for linear in linears)]
    return [f"{name}.{index}" for name in holding for index in range(len(model.get_submodule(name)))]  # type: ignore[arg-type]


def block_paths(model: nn.Module) -> list[str]:
    """Paths of the model's blocks, in the order in which it holds them."""
    linears = {
        name: module
        for name, module in model.named_modules()
        if is_linear(module) or isinstance(module, (FactorizedLinear, LinearStack, QuantizedLinear))
    }
    return _blocks(model, linears)


def _towers(
    model: Any, linears: Mapping[str, nn.Module], blocks: Sequence[str], calls: Mapping[str, Sequence[int]]
) -> set[str]:
    """Layers that text does not reach: parts that it does not call, and layers whose input it does not change."""
    device = next(model.parameters()).device
    reached = {block for block in blocks if any(calls[name] for name in linears if name.startswith(f"{block}."))}
    lists = {block.rpartition(".")[0] for block in reached}
    named = {name: next((block for block in blocks if name.startswith(f"{block}.")), None) for name in linears}
    # In a list of blocks of which text reaches one, a layer that is not called is an expert, or is never called.
    apart = {
        name
        for name, block in named.items()
        if not calls[name] and (block is None or block.rpartition(".")[0] not in lists)
    }
    apart = {name for name in apart if not _is_read_directly(model, name)}
    if device.type == "meta":
        return apart
    first, second = (_inputs_of(model, linears, seed) for seed in (0, 1))
    same = {name for name in first.keys() & second.keys() if all(map(torch.equal, first[name], second[name]))}
    return apart | same


def _is_read_directly(model: nn.Module, name: str) -> bool:
    """Whether torch's own attention owns the layer, which hands its weight to a fused kernel."""
    return any(isinstance(owner, nn.MultiheadAttention) for owner in _owners(model, name))


def _inputs_of(model: Any, linears: Mapping[str, nn.Module], seed: int) -> dict[str, list[Tensor]]:
    """What every layer reads in one forward pass on a few tokens, thinned out."""
    read: dict[str, list[Tensor]] = {}

    def hook_for(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            numbers = args[0].detach().flatten()
            # From all tokens: the first alone may be the same in both texts.
            read.setdefault(name, []).append(numbers[:: max(1, len(numbers) // 4096)].clone())

        return hook

    with ExitStack() as stack, torch.no_grad():
        for name, module in linears.items():
            stack.callback(module.register_forward_pre_hook(hook_for(name)).remove)
        device = next(model.parameters()).device
        model(**text_arguments(model, example_ids(model, device, seed)))
    return read


def _trace(model: Any, linears: Mapping[str, nn.Module], inputs: Mapping[str, Tensor] | None) -> dict[str, list[int]]:
    """For every linear layer the identities of the tensors it was called with, in one forward pass."""
    device = next(model.parameters()).device
    seen: dict[str, list[int]] = {name: [] for name in linears}
    alive: list[Tensor] = []

    def hook_for(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            # Holding the tensor keeps its identity from being given to another one.
            alive.append(args[0])
            seen[name].append(id(args[0]))

        return hook

    training, implementation = model.training, getattr(model.config, "_experts_implementation", None)
    model.eval()
    read = {name: value.to(device) for name, value in (inputs or _default_inputs(model, device)).items()}
    handles = [module.register_forward_pre_hook(hook_for(name)) for name, module in linears.items()]
    if device.type == "meta" and implementation:
        # Only this implementation has no control flow that depends on data.
        model.config._experts_implementation = "batched_mm"
    try:
        with torch.no_grad():
            model(**read)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise InputError(_cannot_run(model, device, error, inputs is None)) from error
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
        if implementation:
            model.config._experts_implementation = implementation
    return seen


def _cannot_run(model: Any, device: torch.device, error: Exception, on_text: bool) -> str:
    name, reason = type(model).__name__, (str(error).strip() or type(error).__name__).splitlines()[0]
    if device.type == "meta":
        return (
            f"{name}: this version of transformers cannot run the model without weights ({reason}). Load the weights, "
            "or install transformers 5."
        )
    if on_text:
        return (
            f"{name} must run on text alone, from which its layers are found and measured, but does not ({reason}). "
            "Save the language model inside it, or pass an example of its arguments as inputs= in Python."
        )
    return f"{name} cannot be run on the inputs that were given: {reason}"


def _default_inputs(model: Any, device: torch.device) -> dict[str, Tensor]:
    """A few token ids; embeddings where there are no weights, since masks and padding are checked by value."""
    if device.type != "meta":
        return text_arguments(model, example_ids(model, device))
    table = model.get_input_embeddings()
    embeddings = torch.empty(1, 4, table.embedding_dim, dtype=table.weight.dtype, device=device)
    decoder = {"decoder_inputs_embeds": embeddings} if model.config.is_encoder_decoder else {}
    return {"inputs_embeds": embeddings, **decoder}


def _tied(model: nn.Module) -> dict[int, list[str]]:
    """Names of every parameter that has more than one, by identity."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {key: value for key, value in names.items() if len(value) > 1}


def _reason_against(
    model: Any,
    name: str,
    module: Any,
    shape: tuple[int, int],
    tied: Mapping[int, list[str]],
    called_kinds: set[str],
) -> str:
    """Why a linear layer is no site, or nothing."""
    weight = module.weight
    experts = {
        getattr(text_config(model), key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts")
    }
    others = [other for other in tied.get(id(weight), ()) if other != f"{name}.weight"]
    reasons = {
        f"stored as {weight.dtype}: already quantized": weight.dtype not in _DTYPES or weight.ndim != 2,
        "a factor of a factorized layer": any(isinstance(owner, FactorizedLinear) for owner in _owners(model, name)),
        f"tied to {', '.join(others)}": bool(others),
        _ROUTER: name.rpartition(".")[2] in {"gate", "router"} and shape[0] in experts,
        "not called as a layer: the model reads its weight directly, or not at all": _siblings(name)
        not in called_kinds,
        "a vector": min(shape) < 2,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _owners(model: nn.Module, name: str) -> Iterator[nn.Module]:
    path = name.rpartition(".")[0]
    while path:
        yield model.get_submodule(path)
        path = path.rpartition(".")[0]


def _other_matrices(model: Any, linears: set[str]) -> Iterator[tuple[str, nn.Parameter, str]]:
    """Parameters of two and more dimensions that belong to no linear layer; no reason marks a stack of experts."""
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim < 2 or path in linears:
                continue
            full_name = f"{path}.{name}" if path else name
            yield full_name, parameter, _reason_against_matrix(module, parameter)


def _reason_against_matrix(module: nn.Module, parameter: nn.Parameter) -> str:
    if isinstance(module, nn.Embedding):
        return "an embedding: its rows are looked up"
    if type(module).__name__.startswith("Conv"):
        return "a convolution"
    if parameter.ndim == 3 and hasattr(module, "is_transposed"):
        if module.is_transposed or module.has_bias:
            return "experts stored transposed or with biases, which the eager loop does not read through F.linear"
        return ""
    if "Router" in type(module).__name__:
        return _ROUTER
    return f"a parameter of {type(module).__name__}, not the weight of a linear layer"
