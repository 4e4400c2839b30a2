"""A reordered matrix holds the same numbers: outputs, state, copies, casts and training say so."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rankfold
from rankfold.checkpoint import load_model
from rankfold.modules import PackedLinear, prefer
from rankfold.modules.packed_linear import can_pack
from rankfold.recovery import recover

MODEL = Path(__file__).parents[2] / "models" / "pycode-llama"
IDS = torch.arange(3, 35)[None]

pytestmark = pytest.mark.skipif(
    not can_pack(nn.Linear(16, 16).bfloat16()), reason="this CPU or this PyTorch has no bfloat16 kernels of oneDNN"
)


@pytest.fixture
def model() -> Any:
    return load_model(MODEL, dtype=torch.bfloat16)


def packed(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]


def test_logits_weights_and_state_stay(model: Any) -> None:
    state = {name: part.clone() for name, part in model.state_dict().items()}
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        prefer(model, "speed")
        found = model(input_ids=IDS).logits
    assert len(packed(model)) > 20
    # Kernels may add in another order; the numbers they add are the same.
    torch.testing.assert_close(found.float(), expected.float(), atol=0.05, rtol=0.05)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(part, state[name]) for name, part in model.state_dict().items())
    prefer(model, "balance")
    assert not packed(model)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in load_model(MODEL).named_parameters()]
    assert all(torch.equal(part, state[name]) for name, part in model.state_dict().items())


def test_a_model_that_was_made_small_is_saved_as_without_it(model: Any, tmp_path: Path) -> None:
    tokenizer = rankfold.load(MODEL)[1]
    rankfold.compress(model, tokenizer, keep=0.7, method="svd")
    rankfold.save(model, tokenizer, tmp_path / "plain")
    prefer(model, "speed")
    with torch.no_grad():
        found = model(input_ids=IDS).logits
    rankfold.save(model, tokenizer, tmp_path / "packed")
    assert packed(model), "saving leaves it fast"
    assert (tmp_path / "plain" / "model.safetensors").read_bytes() == (
        tmp_path / "packed" / "model.safetensors"
    ).read_bytes()
    again = load_model(tmp_path / "packed")
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=IDS).logits.float(), found.float(), atol=0.05, rtol=0.05)


def test_a_tied_head_stays_tied(model: Any) -> None:
    assert model.config.tie_word_embeddings
    prefer(model, "speed")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(head, PackedLinear)
    assert head.weight is embedding.weight
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        embedding.weight.mul_(2)
        after = model(input_ids=IDS).logits
    assert not torch.equal(before, after)
    twin = copy.deepcopy(model)
    assert twin.get_output_embeddings().weight is twin.get_input_embeddings().weight


def test_copies_casts_and_training(model: Any) -> None:
    prefer(model, "speed")
    other = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(other(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert len(packed(other)) == len(packed(model))
    with torch.no_grad():
        whole = load_model(MODEL, dtype=torch.float32)(input_ids=IDS).logits
        torch.testing.assert_close(other.float()(input_ids=IDS).logits, whole, atol=0.3, rtol=0.3)
    assert model.num_parameters() == load_model(MODEL).num_parameters()
    model.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in model.train().parameters())


def test_whoever_changes_the_matrix_is_heard(model: Any) -> None:
    peft = pytest.importorskip("peft", reason="needs rankfold[recovery]")
    prefer(model, "speed")
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        layer = model.model.layers[0].mlp.up_proj
        layer.weight.data.zero_()
        assert not torch.equal(model(input_ids=IDS).logits, before)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with torch.no_grad():
        expected = adapted(input_ids=IDS).logits
        merged = adapted.merge_and_unload()(input_ids=IDS).logits
        plain = model(input_ids=IDS).logits
    # Merging rounds to bfloat16.
    assert (merged - expected).norm() < 0.1 * (expected - before).norm()
    assert torch.equal(plain, merged), "merged in place"


def test_gradients_pass_a_packed_layer() -> None:
    plain = nn.Linear(16, 32).bfloat16()
    x = torch.randn(4, 16, dtype=torch.bfloat16, requires_grad=True)
    plain(x).sum().backward()
    expected, x.grad = x.grad, None
    prefer(plain, "speed")
    assert isinstance(plain, PackedLinear)
    plain(x).sum().backward()
    assert torch.equal(x.grad, expected)  # type: ignore[arg-type]
    plain.weight = nn.Parameter(torch.zeros(32, 16, dtype=torch.bfloat16))
    with torch.no_grad():
        assert not (plain(x) - plain.bias).any()


def test_compressing_and_recovering_reach_all_weights(model: Any) -> None:
    prefer(model, "speed")
    tokenizer = rankfold.load(MODEL)[1]
    plan = rankfold.compress(model, tokenizer, keep=0.7, method="svd")
    assert plan.factorized
    prefer(model, "speed")
    windows = torch.arange(64 * 8).reshape(8, 64) % 90 + 3
    before = {name: part.clone() for name, part in model.state_dict().items()}
    recover(model, None, windows, objective="next-token", steps=2, batch_size=2, rate=1e-2)
    changed = [name for name, part in model.state_dict().items() if not torch.equal(part, before[name])]
    assert any(name.endswith("down.weight") for name in changed)
