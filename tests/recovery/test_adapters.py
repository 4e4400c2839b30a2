"""Adapters over weights in few bits: trained, saved apart, and loaded again over the same checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rankfold import allocate, factorize, find_sites
from rankfold.checkpoint import load_model, quantized_by_library, save, save_adapters
from rankfold.quantization import Grid, quantize_blocks, quantize_by_library
from rankfold.recovery import is_quantized, recover

IDS = torch.arange(256).reshape(8, 32) % 64 + 3


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    factorize(model, allocate(find_sites(model).select(), rank=32, method="svd"))
    return model


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'rankfold[quantization]'")
    save(llama(), None, tmp_path / "low")
    made, _ = quantize_by_library(tmp_path / "low", "nf4")
    save(made, None, tmp_path / "nf4")
    return tmp_path / "nf4"


def test_adapters_over_factors_in_four_bits_are_trained_saved_and_loaded(quantized: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = load_model(quantized)
    assert is_quantized(model)
    assert quantized_by_library(quantized)
    frozen = {name: part.clone() for name, part in model.state_dict().items()}
    result = recover(
        model, None, IDS, IDS[:2], work=tmp_path / "work", objective="next-token", steps=12, batch_size=4, lora_rank=4
    )
    assert result.after < result.before - 0.05
    trained = {name.split(".lora_")[0] for name, _ in result.adapters.named_parameters() if "lora_A" in name}
    assert any(name.endswith("up_proj.down") for name in trained)
    assert any(name.endswith("up_proj.up") for name in trained)
    for name, part in result.adapters.get_base_model().state_dict().items():
        if "lora_" not in name:
            torch.testing.assert_close(part, frozen[name.replace(".base_layer", "")])
    save_adapters(result.adapters, None, tmp_path / "adapters", base=str(quantized))
    files = {path.suffix for path in (tmp_path / "adapters").iterdir()}
    assert ".bin" not in files
    with torch.no_grad():
        expected = result.adapters(IDS).logits
        again = load_model(tmp_path / "adapters")
        torch.testing.assert_close(again(IDS).logits, expected, rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match="exists and is not empty"):
        save_adapters(result.adapters, None, tmp_path / "adapters", base=str(quantized))
    save_adapters(result.adapters, None, tmp_path / "adapters", base=str(quantized), overwrite=True)


def test_weights_in_few_bits_alone_cannot_be_trained(quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train adapters over them"):
        recover(load_model(quantized), None, IDS, IDS, work=tmp_path / "w", objective="next-token", steps=2)


def test_spqr_says_which_scheme_takes_adapters(tmp_path: Path) -> None:
    model = llama()
    quantize_blocks(model, [{"input_ids": IDS}], "spqr", Grid(4))
    with pytest.raises(ValueError, match="nf4 or int8"):
        recover(model, None, IDS, IDS, work=tmp_path / "w", objective="next-token", steps=2, lora_rank=4)


def test_adapters_that_gain_nothing_are_taken_back(quantized: Path, tmp_path: Path) -> None:
    model = load_model(quantized)
    with torch.no_grad():
        before = model(IDS).logits
    held_out = torch.randint(3, 128, (4, 32), generator=torch.Generator().manual_seed(1))
    result = recover(
        model, None, IDS, held_out, work=tmp_path / "w", objective="next-token", steps=10, batch_size=8, lora_rank=4,
        rate=0.05,
    )  # fmt: skip
    assert result.after == result.before
    with torch.no_grad():
        torch.testing.assert_close(result.adapters(IDS).logits, before)
