"""Any model type of transformers, made tiny from its configuration by rules about names, not by a list of types."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rankfold.sites import text_part

HEADS = {
    "causal": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "masked": ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    "sequence to sequence": ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    "classification": ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"),
    "image-text-to-text": ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"),
    "speech": ("AutoModelForSpeechSeq2Seq", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES"),
}
"""Kinds of head: the Auto class and transformers' table of its model types."""

VOCABULARY = 160
LAYERS = re.compile(r"(^|_)(n|num|encoder|decoder|hidden|conf)?_?(hidden_)?(layers?|blocks)$|^depth$|^resampler_depth$")
NOT_LAYERS = re.compile(
    r"feature_layer|window_layers|shared_layers|dense_layers|nextn|predict_layers|residual_layers|lstm|rope_layers"
    r"|random_blocks|topk_blocks|local_blocks|first_n|global_layers|add_layers|vision_layer|adapter_layers"
)
RULES: tuple[tuple[str, int], ...] = (
    (r"(^|_)vocab_size(_per_layer_input)?$|^n_?words?$", VOCABULARY),
    (r"^mamba_(n|num)_heads$|^n_mamba_heads$", 8),
    (r"(qk_nope|qk_rope|v|index|linear_key|linear_value|mla|rope)_head_dim$", 8),
    (r"^qk_head_dim$", 16),
    (r"(^|_)(head_dim|d_kv|dim_head|d_head|head_size|kv_channels|linear_head_dim)$|^global_head_dim$", 8),
    (r"(kv_n|key_value|kv|num_key)_heads$|num_key_value_heads$|kv_n_heads", 2),
    (r"^rotary_dim$", 4),
    (r"^(mamba_d_ssm|mamba_intermediate)$", 64),
    (r"^(n_groups|mamba_n_groups|mamba_ngroups|o_groups)$", 1),
    (r"(^|_)(n|num|attention|num_attention|encoder_attention|decoder_attention|conf_num_attention|n)_?heads?$", 4),
    (r"^(linear_num_value|linear_num_key|linear_num|index_n)_heads$|^index_n_heads$", 4),
    (r"lora_rank$|^laurel_rank$|_rank$|_lowrank$", 8),
    (r"^(num|n_routed|num_local|moe_num)_experts$|^num_experts$|^n_experts$", 4),
    (r"^(num_experts_per_tok(en)?|moe_topk|moe_top_k|moe_k|top_k_experts|experts_per_token)$", 2),
    (r"^(n_group|topk_group|num_expert_group)$", 1),
    (r"(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|dff|dim_ff|n_inner|d_inner|mlp_dim|hidden_dim)(_mlp)?$", 48),
    (r"hidden_size(_per_layer_input|_global)?$|^d_model$|^n_embd$|^emb(ed)?_dim$|^dim$|^embedding_size$", 32),
    (r"^(word_embed_proj_dim|projection_dim|output_dim|vision_output_dim|projector_(in|out)put_dim)$", 32),
    (r"(^|_)d_state$|^state_size$|^ssm_state_size$", 8),
    (r"^(max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|seq_len)$", 128),
    (r"^(image_size|max_image_size|crop_size)$", 32),
    (r"^patch_size$", 8),
    (r"^(num_mel_bins|n_mel_bins|feature_size)$", 16),
    (r"^(sliding_window(_size)?|attention_chunk_size|local_attention)$", 16),
    (r"^(max_source_positions|max_target_positions)$", 64),
    (r"chunk_size$|^chunk_length$", 16),
)
"""Names of numbers, and what they become where they are larger."""

SIZE = re.compile(r"(size|dim|dims|channels?|width|features|hidden|n_state)$")
TOKEN = re.compile(r"(token_id|token_index|_token_ids?|_index|_id)$")
PLAIN_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "cls_token_id": 1}

DROPPED = {
    "architectures", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "id2label", "label2id",
    "model_type", "rope_scaling", "per_layer_config", "_attn_implementation",
    "attn_implementation", "_experts_implementation", "problem_type", "return_dict", "output_attentions",
}  # fmt: skip

SECTIONS = {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [2, 1, 1]}
BY_HAND: dict[str, dict[str, Any]] = {
    **{
        name: {"text_config.rope_parameters": SECTIONS}
        for name in (
            "glm4v",
            "glm46v",
            "glm4v_moe",
            "glm_ocr",
            "glmga",
            "paddleocr_vl",
            "qwen2_5_omni_thinker",
            "qwen2_5_vl",
            "qwen2_vl",
            "cosmos3_edge",
        )
    },
    "bamba": {"attn_layer_indices": [1], "layers_block_type": None, "layer_types": None},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "layers_block_type": None},
    "beam": {"rope_parameters": None},
    "cohere_compass_text": {"rope_parameters": None},
    "cohere_compass": {"text_config.rope_parameters": None},
    "neomme": {"rope_parameters": None},
    "moshi": {"audio_encoder_config.codebook_size": 64},
    "kyutai_speech_to_text": {"codec_config.codebook_size": 64},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dia": {"delay_pattern": [0] * 9},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": 3},
    "esmc": {"num_key_value_heads": 4, "vocab_size": VOCABULARY},
    "dots3_note": {"num_key_value_heads": 4},
    "hunyuan_vl": {"text_config.head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lilt": {"hidden_size": 48},
    "layoutlmv3": {"coordinate_size": 5, "shape_size": 6},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"n_routed_experts": 4},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 100,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xlnet": {"d_head": 8},
    "xlstm": {"qk_dim_factor": 1.0, "v_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_assistant": {"text_config": None},
    "recurrent_gemma": {"num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"]},
    "jamba": {"num_hidden_layers": 8, "attn_layer_period": 8, "attn_layer_offset": 4},
    "janus": {"vq_config": {"num_embeddings": 64, "embed_dim": 8, "base_channels": 32, "channel_multiplier": [1, 1]}},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "speecht5": {"conv_dim": [32] * 7, "hidden_size": 32},
    "step3p7": {"text_config.sliding_window": 16},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    "zamba2": {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid", "mamba", "hybrid"]},
}
"""Settings of the types for which the rules fail, over what they give; a `.` goes into a sub-configuration."""


class NotTinyError(Exception):
    """A model type that could not be made tiny, with the reason."""


def pairs() -> Iterator[tuple[str, str]]:
    """Every model type with every kind of head that transformers' tables give it."""
    for head, (_, table) in HEADS.items():
        for model_type in getattr(modeling_auto, table, {}):
            yield model_type, head


def tiny_config(model_type: str) -> Any:
    """A configuration of this type with every number shrunk.

    Raises:
        NotTinyError: If the configuration refuses.
    """
    try:
        config_class = CONFIG_MAPPING[model_type]
        settings = shrunk(config_class().to_dict())
        for path, value in BY_HAND.get(model_type, {}).items():
            place = settings
            *owners, name = path.split(".")
            for owner in owners:
                place = place.setdefault(owner, {})
            if value is None:
                place.pop(name, None)
            else:
                place[name] = value
        return config_class(**settings)
    except Exception as error:  # whatever a configuration raises is its reason
        raise NotTinyError(f"its configuration: {first_line(error)}") from error


def tiny_model(model_type: str, head: str, seed: int = 0) -> Any:
    """A model of this type and head with random weights, large enough that errors show.

    Raises:
        NotTinyError: If it cannot be made.
    """
    config = tiny_config(model_type)
    auto = getattr(transformers, HEADS[head][0])
    torch.manual_seed(seed)
    text = text_part(config)
    if getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = 0
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 1
    try:
        model = auto.from_config(config)
    except Exception as error:  # the same
        raise NotTinyError(f"its model: {first_line(error)}") from error
    size = sum(parameter.numel() for parameter in model.parameters())
    if size > 30_000_000:
        raise NotTinyError(f"{size:,} parameters are left after shrinking")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2 and parameter.is_floating_point():
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.eval()


def shrunk(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a configuration, numbers lowered by the rules and lists of layers cut to match."""
    settings = copy.deepcopy({name: value for name, value in settings.items() if name not in DROPPED})
    layers = [value for name, value in settings.items() if _counts_layers(name) and _is_count(value)]
    kept = _kept_layers(settings, max(layers, default=0))
    tokens = iter(range(140, VOCABULARY))
    result = {name: _shrunk(name, value, layers, kept, tokens) for name, value in settings.items()}
    heads, kv = (
        next((name for name in settings if name.endswith(end)), "")
        for end in ("num_attention_heads", "key_value_heads")
    )
    if heads and kv and settings[heads] == settings[kv]:
        result[kv] = result[heads]
    known = {value: result[name] for name, value in settings.items() if _is_count(value) and result[name] != value}
    for name, value in settings.items():
        # A size that no rule names follows what it equals.
        if _is_count(value) and value > 64 and value == result[name] and value in known and SIZE.search(name):
            result[name] = known[value]
    return result


def _shrunk(name: str, value: Any, layers: list[int], kept: list[int], tokens: Iterator[int]) -> Any:
    if name == "rope_parameters" and isinstance(value, dict):
        return _shrunk_rope(value)
    if isinstance(value, dict) and (name.endswith("config") or "model_type" in value):
        return shrunk(value) | ({"model_type": value["model_type"]} if "model_type" in value else {})
    if isinstance(value, list):
        return _shrunk_list(name, value, layers, kept)
    return _shrunk_number(name, value, len(kept), tokens) if _is_count(value) else value


def _counts_layers(name: str) -> bool:
    return bool(LAYERS.search(name)) and not NOT_LAYERS.search(name)


def _shrunk_rope(value: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings without what depends on sizes; sections of several axes fill half of a head of 8."""
    nested = {name: _shrunk_rope(part) for name, part in value.items() if isinstance(part, dict)}
    if nested:
        return nested
    kept = {name: part for name, part in value.items() if not name.endswith("_factor")}
    if value.get("rope_type") in ("longrope", "llama3", "dynamic", "linear", "yarn"):
        kept["rope_type"] = "default"
    if "mrope_section" in value:
        kept["mrope_section"] = [2, 1, 1]
    return kept


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _kept_layers(settings: Mapping[str, Any], layers: int) -> list[int]:
    """Indices of the layers that stay: one of each kind, two at least."""
    lists = [value for value in settings.values() if isinstance(value, list) and layers and len(value) == layers]
    if not lists:
        return list(range(min(2, layers)))
    kinds: dict[tuple[str, ...], int] = {}
    for index, kind in enumerate(zip(*[[str(item) for item in value] for value in lists], strict=True)):
        kinds.setdefault(kind, index)
    first = sorted(kinds.values())[:4]
    return sorted({*first, *range(2)} if len(first) < 2 else first)


def _shrunk_list(name: str, value: list[Any], layers: list[int], kept: list[int]) -> list[Any]:
    if value and all(_is_count(item) for item in value) and not TOKEN.search(name):
        value = [_shrunk_number(name, item, len(kept), iter(())) for item in value]
    if layers and len(value) == max(layers):
        return [value[index] for index in kept]
    if TOKEN.search(name) and all(_is_count(item) for item in value):
        return [min(item, VOCABULARY - 1) for item in value]
    return value


def _shrunk_number(name: str, value: int, layers: int, tokens: Iterator[int]) -> int:
    if name in PLAIN_TOKENS:
        return PLAIN_TOKENS[name]
    if TOKEN.search(name):
        return value if value < 100 else next(tokens, 139)
    if _counts_layers(name):
        return min(value, max(layers, 2))
    for pattern, small in RULES:
        if re.search(pattern, name):
            return min(value, small)
    return value


def text_inputs(model: Any, length: int = 12, batch: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random token ids, also for a decoder where there is one."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 120, (batch, length), generator=generator)
    ids[:, -1] = 2
    if model.config.is_encoder_decoder:
        return {"input_ids": ids, "decoder_input_ids": ids[:, : length // 2]}
    return {"input_ids": ids}


def first_line(error: BaseException) -> str:
    """The kind of an error and the beginning of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:160]}"
