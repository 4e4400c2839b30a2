"""The engine on another device than the CPU, where there is none: every tensor's device is checked at every operation.

A pretended accelerator: tensors that say that they lie on the device `meta`, and hold their numbers on the CPU inside.
An operation between them and a tensor of the CPU fails as it would on CUDA. Where the accelerator has no float64, as
Apple's MPS has none, nothing may make such a tensor on it.
"""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import rankfold
from rankfold import precision
from rankfold.quality import next_token_quality
from rankfold.quantization import quantize_blocks

DEVICE = torch.device("meta")

pytestmark = pytest.mark.skipif(
    transformers.__version__.startswith("4."), reason="transformers 4 runs no model on tensors of this kind"
)


class OnDevice(torch.Tensor):
    """A tensor of the pretended accelerator."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=DEVICE,
            requires_grad=False,
        )  # fmt: skip
        made.inner = inner
        return made  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return f"OnDevice({self.inner!r})"

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert a tensor of an accelerator to numpy: copy it to the CPU first")

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), settings: Any = None) -> Any:
        return dispatched(function, arguments, settings or {})


def dispatched(function: Any, arguments: Any, settings: dict[str, Any]) -> Any:
    """An operation where its tensors lie."""
    leaves, _ = tree_flatten((arguments, settings))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    here = any(isinstance(tensor, OnDevice) for tensor in tensors)
    wanted = settings.get("device")
    name = function._schema.name
    moves = name in ("aten::_to_copy", "aten::copy_", "aten::to", "aten::item", "aten::_local_scalar_dense")
    indexes = name.startswith(("aten::index", "aten::_index_put"))
    if here and not moves:
        strangers = [t for t in tensors if not isinstance(t, OnDevice) and t.ndim > 0 and t.numel()]
        if strangers and not indexes:
            raise RuntimeError(
                f"{name}: tensors on two devices: {[(type(t).__name__, tuple(t.shape)) for t in tensors]}"
            )
    result_here = here if wanted is None else torch.device(wanted) == DEVICE
    inside = {**settings, **({"device": "cpu"} if wanted is not None else {})}

    def inner(leaf: Any) -> Any:
        if isinstance(leaf, OnDevice):
            return leaf.inner
        # Made without an operation, such as an empty list's.
        empty = isinstance(leaf, Tensor) and leaf.device == DEVICE and not leaf.numel()
        return torch.empty(leaf.shape, dtype=leaf.dtype) if empty else leaf

    plain_arguments, plain_settings = tree_map(inner, (arguments, inside))
    plain = function(*plain_arguments, **plain_settings)
    if function._schema.is_mutable and here and name.endswith("_"):
        return arguments[0]
    if not result_here:
        return plain
    if "meta" in precision.WITHOUT_FLOAT64 and any(
        isinstance(leaf, Tensor) and leaf.dtype == torch.float64 for leaf in tree_flatten(plain)[0]
    ):
        raise TypeError(f"{name}: the pretended accelerator has no float64")
    return tree_map(
        lambda leaf: OnDevice(leaf) if isinstance(leaf, Tensor) and not isinstance(leaf, OnDevice) else leaf, plain
    )


class Accelerator(TorchDispatchMode):
    """What is made on the pretended device is one of its tensors."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), settings: Any = None) -> Any:
        return dispatched(function, arguments, settings or {})


class FromLists(TorchFunctionMode):
    """Tensors of lists are made without an operation that could be seen."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), settings: Any = None) -> Any:
        settings = settings or {}
        if function is torch.tensor and torch.device(settings.get("device") or "cpu") == DEVICE:
            return OnDevice(torch.tensor(*arguments, **{**settings, "device": "cpu"}))
        return function(*arguments, **settings)


def moved(model: nn.Module) -> None:
    for module in model.modules():
        for name, part in list(module._parameters.items()):
            if part is not None:
                module._parameters[name] = nn.Parameter(OnDevice(part.detach()), requires_grad=part.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = OnDevice(buffer)


@pytest.fixture(params=["float64", "no float64"])
def float64(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the accelerator has float64."""
    has = request.param == "float64"
    if not has:
        monkeypatch.setattr(precision, "WITHOUT_FLOAT64", {"meta"})
    return has


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "settings",
    [
        {"keep": 0.6, "method": "svd"},
        {"keep": 0.6, "method": "whitened"},
        {"keep": 0.6, "method": "lord"},
        {"keep": 0.6, "method": "tucker"},
        {"keep": 0.6},
        {"keep": 0.6, "effort": "best"},
        {"bits": 3.5, "sites": ["v_proj"]},
    ],
    ids=str,
)
def test_nothing_is_left_on_the_cpu(settings: dict[str, Any]) -> None:
    model = tiny.build("llama")
    ids = torch.randint(0, 128, (4, 16))
    moved(model)
    with Accelerator(), FromLists():
        rankfold.compress(model, text=ids, batch_size=2, **settings)
    assert all(isinstance(part, OnDevice) for part in model.state_dict().values())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("scheme", ["gptq", "spqr"])
def test_quantized_layers_are_where_the_others_are(scheme: str) -> None:
    model = tiny.build("llama")
    ids = torch.randint(0, 128, (4, 16))
    moved(model)
    with Accelerator(), FromLists():
        rankfold.compress(model, text=ids, batch_size=2, keep=0.6, method="svd")
        quantize_blocks(model, [{"input_ids": OnDevice(ids)}], scheme)
    assert all(isinstance(part, OnDevice) for part in model.state_dict().values())


@pytest.mark.usefixtures("float64")
def test_loss_and_divergence_are_measured_on_it() -> None:
    model, other = tiny.build("llama"), tiny.build("llama")
    ids = torch.randint(0, 128, (4, 16))
    expected = next_token_quality(model, ids, dense=other)
    moved(model)
    moved(other)
    with Accelerator(), FromLists():
        found = next_token_quality(model, ids, dense=other)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)


def test_float64_is_missing_where_it_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "WITHOUT_FLOAT64", {"meta"})
    with Accelerator(), pytest.raises(TypeError, match="has no float64"):
        OnDevice(torch.ones(3)).double()


def test_what_is_compressed_where_there_is_no_float64_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(0, 128, (4, 16), generator=torch.Generator().manual_seed(0))
    expected = tiny.build("llama")
    rankfold.compress(expected, text=ids, batch_size=2, keep=0.6)
    monkeypatch.setattr(precision, "WITHOUT_FLOAT64", {"meta"})
    model = tiny.build("llama")
    moved(model)
    with Accelerator(), FromLists():
        rankfold.compress(model, text=ids, batch_size=2, keep=0.6)
    for name, part in expected.state_dict().items():
        assert torch.allclose(model.state_dict()[name].inner, part, atol=1e-5), name


def test_a_tensor_on_the_cpu_is_found() -> None:
    here = OnDevice(torch.ones(3))
    with Accelerator(), pytest.raises(RuntimeError, match="tensors on two devices"):
        here + torch.ones(3)
    model = tiny.build("llama")
    left = model.model.layers[1].mlp.down_proj.weight
    moved(model)
    model.model.layers[1].mlp.down_proj.weight = left
    with Accelerator(), FromLists(), pytest.raises((RuntimeError, rankfold.InputError), match="two devices"):
        rankfold.compress(model, text=torch.randint(0, 128, (4, 16)), batch_size=2, keep=0.6, method="whitened")
