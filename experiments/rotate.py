"""A folder with the same function and other weights: python experiments/rotate.py FOLDER OUT.

Weights read from a GGUF file lie on the grid of its few bits, which a quantizer with the same blocks finds again
without loss. Here norms are folded into the layers that read them, the residual stream and the values of each head are
rotated, so that the grid is gone and the logits stay. Rotated weights are easier to round than real ones. For Llama and
Qwen2.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rankfold


def rotation(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix."""
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q


def multiply(layer: Any, left: Tensor | None = None, right: Tensor | None = None) -> None:
    """Multiply a layer's weight from either side, in float64, and its bias from the left."""
    weight = layer.weight.double()
    weight = weight if left is None else left @ weight
    layer.weight = nn.Parameter((weight if right is None else weight @ right).to(layer.weight.dtype))
    if left is not None and layer.bias is not None:
        layer.bias = nn.Parameter((left @ layer.bias.double()).to(layer.bias.dtype))


@torch.no_grad()
def rotate(model: Any, seed: int = 0) -> None:
    """Rotate a model in float32, in place; its head is stored apart from its embedding afterwards."""
    generator = torch.Generator().manual_seed(seed)
    config, body = model.config, model.model
    heads, values = config.num_attention_heads, config.num_key_value_heads
    stream = rotation(config.hidden_size, generator)
    head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    head.weight.copy_(model.get_output_embeddings().weight)
    model.lm_head, config.tie_word_embeddings = head, False
    embedding = nn.Embedding(config.vocab_size, config.hidden_size)
    embedding.weight.copy_(body.embed_tokens.weight.double() @ stream)
    body.embed_tokens = embedding
    readers = [(body.norm, [head])]
    for block in body.layers:
        attention, mlp = block.self_attn, block.mlp
        readers += [
            (block.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
            (block.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
        ]
        turns = [rotation(attention.v_proj.out_features // values, generator) for _ in range(values)]
        multiply(attention.v_proj, left=torch.block_diag(*turns))
        of_heads = torch.block_diag(*(turns[number * values // heads].T for number in range(heads)))
        multiply(attention.o_proj, left=stream.T, right=of_heads)
        multiply(mlp.down_proj, left=stream.T)
    for norm, layers in readers:
        for layer in layers:
            multiply(layer, right=norm.weight.double()[:, None] * stream)
        norm.weight.fill_(1)


def main() -> None:
    """Read, rotate, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, a .gguf file or a name on the hub")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    model, tokenizer = rankfold.load(arguments.model, dtype=torch.float32)
    ids = torch.arange(10, 74)[None]
    with torch.no_grad():
        before = model(ids).logits
        rotate(model)
        change = float((model(ids).logits - before).abs().max())
    print(f"largest change of a logit: {change:.2g} of {float(before.abs().max()):.2g}")
    rankfold.save(model.to(torch.bfloat16), tokenizer, arguments.out)


if __name__ == "__main__":
    main()
