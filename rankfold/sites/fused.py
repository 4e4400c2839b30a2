"""Which rows of a fused projection are queries, keys, values, gates: the one table of architectures."""

from __future__ import annotations

from typing import Any

from rankfold.sites.site import Part


def _heads(config: Any) -> tuple[int, int, int]:
    """Attention heads, key-value heads and head size, by whichever names the architecture has for them."""
    heads = config.num_attention_heads
    key_value = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or heads
    return heads, key_value, getattr(config, "head_dim", None) or config.hidden_size // heads


def _sequence(out_features: int, groups: int, *parts: tuple[str, int]) -> tuple[Part, ...]:
    """Parts that follow each other in each of `groups` equal groups of rows; none where they do not fill a group."""
    period, offset, result = out_features // groups, 0, []
    for name, size in parts:
        result.append(Part(name, offset, size, period))
        offset += size
    return tuple(result) if offset == period else ()


def fused_parts(config: Any, name: str, out_features: int) -> tuple[Part, ...]:
    """What is fused into a matrix: no tensor tells, so this is the one table of architectures."""
    architecture = str(getattr(config, "model_type", "")).removeprefix("rankfold-")
    leaf = next(part for part in reversed(name.split(".")) if not part.isdigit())
    if leaf == "gate_up_proj":
        return _sequence(out_features, 1, ("gate", out_features // 2), ("up", out_features // 2))
    if (architecture, leaf) not in _FUSED_ATTENTION:
        return ()
    heads, kv, size = _heads(config)
    multi_query = getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False)
    if architecture == "codegen":
        quarter = heads * size // 4
        return _sequence(out_features, 4, ("q", quarter), ("v", quarter), ("k", quarter))
    if multi_query or architecture in {"gpt2", "phi3"}:
        kv = 1 if multi_query else kv
        return _sequence(out_features, 1, ("q", heads * size), ("k", kv * size), ("v", kv * size))
    return _sequence(out_features, kv, ("q", heads // kv * size), ("k", size), ("v", size))


_FUSED_ATTENTION = {
    ("gpt2", "c_attn"),
    ("gpt_bigcode", "c_attn"),
    ("codegen", "qkv_proj"),
    ("phi3", "qkv_proj"),
    ("gpt_neox", "query_key_value"),
    ("bloom", "query_key_value"),
    ("falcon", "query_key_value"),
}
