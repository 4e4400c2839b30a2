"""Tiny models of every supported architecture, from config, with random weights."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import transformers
from transformers import AutoConfig

SMALL = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA_LIKE = {
    **SMALL,
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT_LIKE = {**SMALL, "n_embd": 32, "n_inner": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_ctx": 64}
BERT_LIKE = {
    **SMALL,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 80,
    "type_vocab_size": 2,
}

ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "llama", {**LLAMA_LIKE, "num_key_value_heads": 4}),
    "llama_gqa": ("LlamaForCausalLM", "llama", {**LLAMA_LIKE, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", "mistral", LLAMA_LIKE),
    "qwen2": ("Qwen2ForCausalLM", "qwen2", LLAMA_LIKE),
    "qwen3": ("Qwen3ForCausalLM", "qwen3", {**LLAMA_LIKE, "head_dim": 16}),
    "gemma": ("GemmaForCausalLM", "gemma", {**LLAMA_LIKE, "head_dim": 8}),
    "phi3": ("Phi3ForCausalLM", "phi3", LLAMA_LIKE),
    "gpt2": ("GPT2LMHeadModel", "gpt2", GPT_LIKE),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", "gpt_bigcode", {**GPT_LIKE, "multi_query": True}),
    "gpt_bigcode_mha": ("GPTBigCodeForCausalLM", "gpt_bigcode", {**GPT_LIKE, "multi_query": False}),
    "codegen": ("CodeGenForCausalLM", "codegen", {**GPT_LIKE, "rotary_dim": 4, "tie_word_embeddings": False}),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        "gpt_neox",
        {**BERT_LIKE, "intermediate_size": 64, "use_parallel_residual": True, "attention_bias": False},
    ),
    "opt": (
        "OPTForCausalLM",
        "opt",
        {**LLAMA_LIKE, "ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": True},
    ),
    "bloom": ("BloomForCausalLM", "bloom", {**SMALL, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": (
        "FalconForCausalLM",
        "falcon",
        {**LLAMA_LIKE, "multi_query": True, "parallel_attn": True, "new_decoder_architecture": False, "bias": False},
    ),
    "falcon_new": (
        "FalconForCausalLM",
        "falcon",
        {**LLAMA_LIKE, "num_kv_heads": 2, "new_decoder_architecture": True, "bias": False},
    ),
    "bert_masked": ("BertForMaskedLM", "bert", BERT_LIKE),
    "bert_classifier": ("BertForSequenceClassification", "bert", {**BERT_LIKE, "num_labels": 2}),
    "roberta": ("RobertaForMaskedLM", "roberta", {**BERT_LIKE, "pad_token_id": 1, "bos_token_id": 0}),
    "t5": (
        "T5ForConditionalGeneration",
        "t5",
        {
            "vocab_size": 128,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
            "eos_token_id": 1,
        },
    ),
    "mamba": (
        "MambaForCausalLM",
        "mamba",
        {**SMALL, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "time_step_rank": 4},
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "mixtral",
        {**LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        {
            **LLAMA_LIKE,
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "decoder_sparse_step": 1,
        },
    ),
}


def build(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Any:
    """A tiny model with weights large enough that errors show, loaded from a folder as users' models are."""
    class_name, model_type, settings = ARCHITECTURES[name]
    config = AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(seed)
    with torch.device(device):
        model = getattr(transformers, class_name)(config)
    if device != "meta":
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
                elif not bool((parameter == 1).all()):
                    parameter.normal_(std=0.1)
    if device != "meta":
        # transformers renames and merges weights while it loads: what it does then must not be missed here.
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model = type(model).from_pretrained(folder)
    if dtype == torch.float64:
        model.config._experts_implementation = "eager"  # the grouped kernels refuse it
    return model.to(dtype).eval()


def auto_class(model: Any) -> Any:
    """The Auto class that loads this kind of model."""
    names = ("CausalLM", "MaskedLM", "SequenceClassification", "Seq2SeqLM")
    architecture = type(model).__name__.removeprefix("Rankfold")
    head = next((name for name in names if name in architecture), "CausalLM")
    if "ConditionalGeneration" in architecture:
        head = "Seq2SeqLM"
    return getattr(transformers, f"AutoModelFor{head}")


def inputs(model: Any, length: int = 12, batch: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random token ids, also for a decoder where there is one."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 120, (batch, length), generator=generator)
    if model.config.is_encoder_decoder:
        return {"input_ids": ids, "decoder_input_ids": ids[:, : length // 2]}
    return {"input_ids": ids}


def albert() -> Any:
    """A model that applies its one block three times."""
    config = transformers.AlbertConfig(
        vocab_size=64,
        embedding_size=8,
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=3,
    )
    torch.manual_seed(0)
    return transformers.AlbertModel(config).eval()
