"""Checkpoints whose weights are in few bits already: made dense, or refused with the scheme's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from rankfold import allocate, factorize, find_sites
from rankfold.checkpoint import load_model, load_tokenizer, save
from rankfold.errors import InputError
from rankfold.quantization import quantize_by_library

IDS = torch.arange(3, 35).reshape(2, 16)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_weights_of_bitsandbytes_become_dense(scheme: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'rankfold[quantization]'")
    save(llama(), None, tmp_path / "dense")
    made, _ = quantize_by_library(tmp_path / "dense", scheme)
    save(made, None, tmp_path / "few")
    model = load_model(tmp_path / "few", dense=True)
    assert model.few_bits == f"bitsandbytes, {4 if scheme == 'nf4' else 8} bits"
    with torch.no_grad():
        expected, found = made(IDS).logits.float(), model(IDS).logits.float()
    assert float((found - expected).norm() / expected.norm()) < 0.05
    factorize(model, allocate(find_sites(model).select(), keep=0.6, method="svd"))
    save(model, None, tmp_path / "out")
    again = load_model(tmp_path / "out")
    assert not hasattr(again.config, "quantization_config")
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits)


def test_what_becomes_dense_has_the_dtype_that_was_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'rankfold[quantization]'")
    save(llama().to(torch.bfloat16), None, tmp_path / "dense")
    save(quantize_by_library(tmp_path / "dense", "nf4")[0], None, tmp_path / "few")
    model = load_model(tmp_path / "few", dtype=torch.float32, dense=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    save(model, None, tmp_path / "out")


def compressed_again(model: Any, folder: Path) -> None:
    """What was made dense is compressed, written and loaded like any other model."""
    factorize(model, allocate(find_sites(model).select(), keep=0.6, method="svd"))
    save(model, None, folder)
    with torch.no_grad():
        torch.testing.assert_close(load_model(folder)(IDS).logits, model(IDS).logits)


def test_compressed_tensors_become_dense(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")
    model, folder = llama(), tmp_path / "few"
    model.save_pretrained(folder)
    stored, expected = {}, {}
    for name, part in model.state_dict().items():
        stored[name] = part.clone()
        if name.endswith("proj.weight"):
            scale = part.abs().amax(1, keepdim=True) / 127
            stored[name], stored[f"{name}_scale"] = (part / scale).round().to(torch.int8), scale
            expected[name] = stored[name].float() * scale
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    quantized(folder, {
        "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    })  # fmt: skip
    found = load_model(folder, dense=True)
    assert found.few_bits == "compressed-tensors"
    for name, part in expected.items():
        torch.testing.assert_close(found.state_dict()[name], part)
    compressed_again(found, tmp_path / "out")


def test_four_bit_floats_become_dense(tmp_path: Path) -> None:
    """MXFP4, as gpt-oss stores its experts: blocks of 32 numbers of 4 bits that share a power of two."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    model, folder = GptOssForCausalLM(config).to(torch.bfloat16), tmp_path / "few"
    model.save_pretrained(folder)
    levels = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    levels = torch.cat([levels, -levels])
    stored, expected = {}, {}
    for name, part in model.state_dict().items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = part.clone()
            continue
        experts, into, out = part.shape
        blocks = torch.randint(0, 256, (experts, out, into // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 122, (experts, out, into // 32), dtype=torch.uint8)
        stored[f"{name}_blocks"], stored[f"{name}_scales"] = blocks, scales
        pairs = torch.stack([levels[(blocks & 15).long()], levels[(blocks >> 4).long()]], -1).flatten(-2)
        expected[name] = (pairs * torch.exp2(scales.float() - 127)[..., None]).flatten(-2).transpose(1, 2)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    left = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    quantized(folder, {"quant_method": "mxfp4", "modules_to_not_convert": left})
    found = load_model(folder, dense=True)
    assert found.few_bits == "mxfp4"
    for name, part in expected.items():
        torch.testing.assert_close(found.state_dict()[name].float(), part)
    compressed_again(found, tmp_path / "out")


def quantized(folder: Path, settings: dict[str, Any]) -> None:
    """Let a configuration say how the weights beside it are stored."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": settings}))


@pytest.mark.parametrize("scheme", ["gptq", "awq", "bitnet", "aqlm", "spqr"])
def test_other_schemes_are_refused_before_any_work(scheme: str, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "few")
    file = tmp_path / "few" / "config.json"
    settings = {"quant_method": scheme, "bits": 4, "group_size": 128}
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": settings}))
    with pytest.raises(InputError, match=rf"already quantized with {scheme}.*Use the checkpoint that it was made from"):
        load_model(tmp_path / "few", dense=True)


def test_a_gguf_file_is_read_through_transformers(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'rankfold[gguf]'")
    model = llama()
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    layer = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    names |= {f"model.layers.0.{name}": f"blk.0.{short}" for name, short in layer.items()}
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(2048)
    writer.add_embedding_length(128)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(128)
    for name, part in model.state_dict().items():
        short = names[name.removesuffix(".weight")]
        numbers = part
        if short.endswith(("attn_q", "attn_k")):
            # llama.cpp stores the halves of rotary heads interleaved.
            numbers = part.reshape(4, 2, 16, 128).transpose(1, 2).reshape(128, 128)
        writer.add_tensor(f"{short}.weight", numbers.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = load_model(tmp_path / "model.gguf", dtype=torch.float32, dense=True)
    assert loaded.name_or_path == str(tmp_path / "model.gguf")
    assert loaded.few_bits == "GGUF"
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    factorize(loaded, allocate(find_sites(loaded).select(), keep=0.6, method="svd"))
    save(loaded, None, tmp_path / "out", source=tmp_path / "model.gguf")
    assert type(load_model(tmp_path / "out")).__name__ == "RankfoldLlamaForCausalLM"
    (tmp_path / "bad.gguf").write_bytes(b"GGML")
    with pytest.raises(InputError, match="not a GGUF file"):
        load_model(tmp_path / "bad.gguf")
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "model.gguf").read_bytes()[:2000])
    with pytest.raises(InputError, match=r"cut\.gguf"):
        load_model(tmp_path / "cut.gguf")
    with pytest.raises(InputError, match="tokenizer|cannot load|needs a library"):
        load_tokenizer(tmp_path / "model.gguf")


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="transformers 4 asks for a GPU to read FP8")
def test_fp8_becomes_dense_while_it_is_loaded(tmp_path: Path) -> None:
    """Blocks of 128 x 128 with a scale each, as DeepSeek V3 stores them."""
    model = llama()
    model.save_pretrained(tmp_path / "few")
    state = {}
    for name, part in load_file(tmp_path / "few" / "model.safetensors").items():
        state[name] = part
        if name.endswith("_proj.weight"):
            blocks = part.reshape(part.shape[0] // 128, 128, part.shape[1] // 128, 128)
            scale = blocks.abs().amax((1, 3)) / 448
            state[name] = (blocks / scale[:, None, :, None]).reshape(part.shape).to(torch.float8_e4m3fn)
            state[f"{name}_scale_inv"] = scale
    save_file(state, tmp_path / "few" / "model.safetensors", {"format": "pt"})
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    file = tmp_path / "few" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": settings}))
    loaded = load_model(tmp_path / "few", dtype=torch.float32, dense=True)
    assert loaded.few_bits == "fp8"
    with torch.no_grad():
        expected, found = model(IDS).logits, loaded(IDS).logits
    assert float((found - expected).norm() / expected.norm()) < 0.05
    factorize(loaded, allocate(find_sites(loaded).select(), keep=0.6, method="svd"))
    save(loaded, None, tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "out")(IDS).logits, loaded(IDS).logits)
