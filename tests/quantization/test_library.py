"""What a library quantizes is tested after it, since some shapes come out wrong without a word."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rankfold import allocate, factorize, find_sites
from rankfold.checkpoint import load_model, save
from rankfold.cost import parameter_count
from rankfold.modules import LowRankLinear
from rankfold.quantization import Grid, pad_ranks, quantize_blocks, quantize_by_library

IDS = torch.arange(3, 35).reshape(2, 16)


def llama(intermediate: int = 512, rank: int | None = 48) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=128, hidden_size=256, intermediate_size=intermediate, num_hidden_layers=1, num_attention_heads=4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    if rank:
        factorize(model, allocate(find_sites(model).select(), rank=rank, method="svd"))
    return model


def test_padding_changes_no_output_and_is_counted(tmp_path: Path) -> None:
    model = llama()
    before, numbers = model(IDS).logits, parameter_count(model)
    added = pad_ranks(model, 64)
    torch.testing.assert_close(model(IDS).logits, before, rtol=1e-4, atol=1e-5)
    assert parameter_count(model) - numbers == added > 0
    assert {m.rank for m in model.modules() if isinstance(m, LowRankLinear)} == {64}
    assert sum(option["parameters"] for option in model.config.rankfold["options"]) == sum(
        sum(p.numel() for p in m.parameters()) for m in model.modules() if isinstance(m, LowRankLinear)
    )
    save(model, None, tmp_path / "padded")
    torch.testing.assert_close(load_model(tmp_path / "padded")(IDS).logits, before, rtol=1e-4, atol=1e-5)
    assert pad_ranks(model, 64) == 0


@pytest.mark.parametrize(("scheme", "tolerance"), [("int8", 0.05), ("nf4", 0.3)])
def test_factors_of_any_rank_are_right_saved_and_loaded(scheme: str, tolerance: float, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'rankfold[quantization]'")
    model = llama(rank=48)
    save(model, None, tmp_path / "dense")
    made, summary = quantize_by_library(tmp_path / "dense", scheme)
    assert len(summary.quantized) == 14
    assert not summary.left
    assert (summary.padded > 0) == (scheme == "nf4")
    assert parameter_count(made) == parameter_count(model) + summary.padded
    with torch.no_grad():
        expected, found = model(IDS).logits, made(IDS).logits.float()
    assert float((found - expected).norm() / expected.norm()) < tolerance
    save(made, None, tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "out", device="cpu")(IDS).logits.float(), found)


@pytest.mark.parametrize("form", ["low_rank", "dense"])
@pytest.mark.parametrize("name", ["gpt_bigcode", "gpt2", "codegen", "mamba", "mixtral", "t5", "bert_masked"])
def test_every_kind_of_model_bears_int8(name: str, form: str, tmp_path: Path) -> None:
    """StarCoder draws some weights anew while it loads, Mamba reads others as numbers, experts lie in stacks."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'rankfold[quantization]'")
    model = tiny.build(name)
    if form == "low_rank":
        factorize(model, allocate(find_sites(model).select(), rank=4, method="svd"))
    save(model, None, tmp_path / "dense")
    made, summary = quantize_by_library(tmp_path / "dense", "int8")
    assert summary.quantized
    save(made, None, tmp_path / "out")
    inputs = tiny.inputs(model)
    with torch.no_grad():
        expected, found = model.eval()(**inputs)[0], made(**inputs)[0].float()
        assert float((found - expected).norm() / expected.norm()) < 0.05
        torch.testing.assert_close(load_model(tmp_path / "out")(**inputs)[0].float(), found)


def test_layers_that_come_out_wrong_are_found_and_left(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'rankfold[quantization]'")
    model = llama(intermediate=176, rank=None)
    save(model, None, tmp_path / "dense")
    made, summary = quantize_by_library(tmp_path / "dense", "nf4")
    with torch.no_grad():
        expected, found = model(IDS).logits, made(IDS).logits.float()
    assert float((found - expected).norm() / expected.norm()) < 0.3
    # Rows of 176 numbers are no whole number of blocks, and 176 rows none of 32: which kernels fail differs by CPU.
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {*summary.quantized, *summary.left} == linears - {"lm_head"}
    assert set(summary.left) <= {f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")}


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_what_is_stored_does_not_depend_on_whether_the_model_ran(scheme: str, tmp_path: Path) -> None:
    """Kernels of some CPUs repack the weights in the first pass."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'rankfold[quantization]'")
    save(llama(rank=None), None, tmp_path / "dense")
    made, _ = quantize_by_library(tmp_path / "dense", scheme)
    save(made, None, tmp_path / "out")
    model = load_model(tmp_path / "out")
    before = {name: part.clone() for name, part in model.state_dict().items()}
    with torch.no_grad():
        expected = model(IDS).logits
        for name, part in model.state_dict().items():
            assert torch.equal(part, before[name]), name
        # Looking at the state has changed nothing either.
        torch.testing.assert_close(model(IDS).logits, expected)
        save(model, None, tmp_path / "again")
        torch.testing.assert_close(load_model(tmp_path / "again")(IDS).logits, expected)


def test_a_layer_that_ran_before_anyone_watched_is_saved_as_it_computes(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'rankfold[quantization]'")
    save(llama(rank=None), None, tmp_path / "dense")
    made, _ = quantize_by_library(tmp_path / "dense", "nf4")
    save(made, None, tmp_path / "out")
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        expected = plain(IDS).logits
        save(plain, None, tmp_path / "again")
        torch.testing.assert_close(load_model(tmp_path / "again")(IDS).logits, expected, rtol=1e-2, atol=1e-2)


def test_an_unknown_scheme_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="quantizes to int8 or nf4"):
        quantize_by_library(tmp_path, "int3")


def test_what_is_quantized_is_not_quantized_again(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'rankfold[quantization]'")
    save(llama(), None, tmp_path / "dense")
    made, _ = quantize_by_library(tmp_path / "dense", "int8")
    save(made, None, tmp_path / "int8")
    model = llama()
    quantize_blocks(model, [{"input_ids": IDS}], "spqr", Grid(4))
    save(model, None, tmp_path / "spqr")
    for name in ("int8", "spqr"):
        with pytest.raises(ValueError, match="already quantized"):
            quantize_by_library(tmp_path / name, "nf4")
