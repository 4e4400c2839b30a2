"""Embeddings and heads in few bits: looked up as stored, tied ones stored once, priced on other text than they read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from torch.nn import functional as F

import rankfold
from rankfold.calibration import make_batches
from rankfold.checkpoint import export_dense, load_model
from rankfold.cost import memory_bytes, parameter_count
from rankfold.errors import InputError
from rankfold.modules import GroupEmbedding, GroupLinear, TiedHead, stored_embeddings
from rankfold.pipeline.settings import UNTOUCHED
from rankfold.quantization import EMBEDDING_BITS, Embeddings, embedding_widths, find_embeddings, put_in_bits


def windows(model: Any, count: int = 8, length: int = 24) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (count, length), generator=torch.Generator().manual_seed(0))


def build(tied: bool) -> Any:
    return tiny.build("llama_gqa" if tied else "llama")


def compressed(model: Any, **settings: Any) -> Any:
    return rankfold.compress(model, **{"text": windows(model), "batch_size": 4, **settings})


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("size", [(50, 48), (64, 64), (33, 20)])
def test_rows_are_those_of_the_matrix(bits: int, size: tuple[int, int]) -> None:
    dense = torch.nn.Embedding(*size, padding_idx=3)
    layer, _ = Embeddings(dense, None, tied=False).in_bits(bits)
    ids = torch.tensor([[0, 5, size[0] - 1], [3, 3, 1]])
    matrix = layer.dequantized()
    assert torch.equal(layer(ids), matrix[ids])
    assert torch.equal(F.linear(torch.eye(size[1]), layer.weight), layer.product(torch.eye(size[1])))
    # No rounding is off by more than a step.
    steps = layer.statistics()[0].repeat_interleave(layer.group, 1)[:, : size[1]]
    assert ((matrix - dense.weight).abs() <= (0.5 if bits == 8 else 2.0) * steps * 1.01).all()
    assert torch.equal(layer.to_dense()(ids), layer(ids))
    assert layer.to_dense().padding_idx == 3


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_in_few_bits_is_loaded_as_it_was_made(tied: bool, tmp_path: Path) -> None:
    model = build(tied)
    before = memory_bytes(model), parameter_count(model)
    plan = compressed(model, bits=6, embeddings=4)
    facts = plan.calibration["embeddings"]
    assert facts["bits"] == 4
    assert facts["tied"] is tied
    assert isinstance(model.get_input_embeddings(), GroupEmbedding)
    assert isinstance(model.get_output_embeddings(), TiedHead if tied else GroupLinear)
    assert parameter_count(model) <= before[1] * 1.2
    rankfold.save(model, None, tmp_path / "small")
    ids = windows(model, 2)
    with torch.no_grad():
        expected = model(ids).logits
    loaded = load_model(tmp_path / "small")
    assert loaded.get_output_embeddings().weight.shape == model.get_input_embeddings().weight.shape
    assert facts["bytes"] == sum(
        part.numel() * part.element_size()
        for part in {
            id(part): part
            for layer in (loaded.get_input_embeddings(), loaded.get_output_embeddings())
            for part in layer.buffers()
        }.values()
    )
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected)
    # And again, from what was loaded.
    rankfold.save(loaded, None, tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "again")(ids).logits, expected)
    body = transformers.AutoModel.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(body(ids).last_hidden_state, model.base_model(ids).last_hidden_state)


def test_it_loads_without_rankfold(tmp_path: Path) -> None:
    model = build(tied=True)
    compressed(model, bits=6, embeddings=3)
    rankfold.save(model, None, tmp_path / "small")
    ids = windows(model, 2)
    with torch.no_grad():
        torch.save(model(ids).logits, tmp_path / "expected.pt")
    code = (
        "import sys, torch, transformers\n"
        f"folder = {str(tmp_path / 'small')!r}\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n"
        "assert 'rankfold' not in sys.modules\n"
        f"ids = torch.tensor({ids.tolist()})\n"
        f"expected = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        "assert torch.equal(model(ids).logits, expected)\n"
        "assert model.generate(ids[:1, :4], max_new_tokens=3, do_sample=False).shape[1] > 4\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_it_is_made_dense_again(tied: bool, tmp_path: Path) -> None:
    model = build(tied)
    compressed(model, bits=8, embeddings=5)
    rankfold.save(model, None, tmp_path / "small")
    ids = windows(model, 2)
    with torch.no_grad():
        expected = model(ids).logits
    export_dense(load_model(tmp_path / "small"), None, tmp_path / "dense")
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert type(dense).__name__ == "LlamaForCausalLM"
    assert dense.config.tie_word_embeddings is tied
    assert (dense.get_input_embeddings().weight is dense.get_output_embeddings().weight) is tied
    with torch.no_grad():
        torch.testing.assert_close(dense(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_budget_of_bytes_chooses_and_the_file_keeps_within_it(tmp_path: Path) -> None:
    model = build(tied=True)
    found = find_embeddings(model)
    budget = memory_bytes(model) // 5
    # Embeddings alone as they are would take most of it.
    plan = compressed(model, bytes=budget)
    facts = plan.calibration["embeddings"]
    assert facts["bytes"] < found.bytes
    assert memory_bytes(model) <= budget
    rankfold.save(model, None, tmp_path / "small")
    weights = (tmp_path / "small" / "model.safetensors").stat().st_size
    assert weights <= budget + 64_000
    # With room for everything nothing is rounded.
    again = build(tied=True)
    roomy = compressed(again, bytes=memory_bytes(again) + 1)
    assert "embeddings" not in roomy.calibration
    assert stored_embeddings(again) is None


@pytest.mark.parametrize("tied", [True, False])
def test_a_limit_on_the_loss_is_shared_with_the_embeddings(tied: bool, tmp_path: Path) -> None:
    dense, alone, model = build(tied), build(tied), build(tied)
    text, limit = windows(dense, 40), 2e-3
    layers = compressed(alone, text=text, max_loss_increase=limit, embeddings=UNTOUCHED)
    plan = compressed(model, text=text, max_loss_increase=limit)
    facts = plan.calibration["embeddings"]
    assert facts["bits"] in EMBEDDING_BITS
    assert facts["tied"] is tied
    assert "embeddings" not in layers.calibration
    assert memory_bytes(model) < memory_bytes(alone)
    with torch.no_grad():
        before, after = (float(m.eval()(input_ids=text[32:], labels=text[32:]).loss) for m in (dense, model))
    assert after - before <= limit
    assert plan.calibration["measured_increase"] == pytest.approx(after - before, abs=2e-5)
    rankfold.save(model, None, tmp_path / "small")
    with torch.no_grad():
        torch.testing.assert_close(rankfold.load(tmp_path / "small")[0](text[:2]).logits, model(text[:2]).logits)


def test_more_bits_move_predictions_less_and_nothing_stays_behind() -> None:
    model = build(tied=True)
    ids = windows(model)
    with torch.no_grad():
        before = model(ids).logits
    widths = embedding_widths(model, make_batches(model, ids, 4), (2, 4, 8))
    assert [width.loss for width in widths] == sorted((width.loss for width in widths), reverse=True)
    assert [width.bytes for width in widths] == sorted(width.bytes for width in widths)
    assert model.config.tie_word_embeddings
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


def test_the_dtype_of_a_model_is_that_of_its_embeddings() -> None:
    model = build(tied=True)
    put_in_bits(model, 4, make_batches(model, windows(model), 4))
    assert model.bfloat16().get_input_embeddings()(torch.tensor([1])).dtype == torch.bfloat16
    with torch.no_grad():
        assert model(windows(model, 1)).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_other_architectures_round_trip_or_are_refused(name: str, tmp_path: Path) -> None:
    model = tiny.build(name)
    try:
        put = find_embeddings(model)
    except InputError as error:
        assert "Leave them as they are" in str(error)  # noqa: PT017
        return
    assert put.bytes_in(4) < put.bytes
    compressed(model, bits=8, embeddings=4)
    ids = windows(model, 2)
    with torch.no_grad():
        expected = model(ids).logits
    rankfold.save(model, None, tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "small")(ids).logits, expected)


def test_what_cannot_be_rounded_is_refused_before_any_work() -> None:
    model = build(tied=True)
    with pytest.raises(InputError, match="2 to 8 bits, or 16"):
        compressed(model, bits=4, embeddings=9)
    with pytest.raises(InputError, match="go with a budget over bits"):
        compressed(model, keep=0.8, embeddings=4)
    with pytest.raises(InputError, match="causal language models"):
        find_embeddings(tiny.build("bert_masked"))
    with pytest.raises(InputError, match="causal language models"):
        find_embeddings(tiny.build("t5"))
    put_in_bits(model, 4, make_batches(model, windows(model), 4))
    with pytest.raises(InputError, match="in few bits already"):
        find_embeddings(model)
