"""Does a compressed checkpoint load in vLLM, without rankfold, and generate the same tokens?

    python experiments/vllm_check.py make FOLDER [FORM]    # where rankfold is installed: a checkpoint, its tokens
    python experiments/vllm_check.py run FOLDER            # where vLLM is installed and rankfold is not

The model is a small random Llama with heads of 32 dimensions, the least that vLLM's attention on CPUs takes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

PROMPT = "def read_lines(path):\n    with open(path) as"
TOKENS = 24


def make(folder: Path, form: str = "pivoted") -> None:
    """Compress a random Llama, save it, and write down what it generates."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rankfold import compress
    from rankfold.checkpoint import load_tokenizer, save
    from rankfold.cli.demo import bundled_model

    torch.manual_seed(0)
    tokenizer = load_tokenizer(bundled_model())
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=352, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=0, initializer_range=0.15,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    compress(model, keep=0.7, method="svd", allocation="parity", form=form)
    save(model, tokenizer, folder, overwrite=True)
    ids = tokenizer(PROMPT, return_tensors="pt")
    generated = model.generate(**ids, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
    tokens = generated[0, ids["input_ids"].shape[1] :].tolist()
    (folder / "expected.json").write_text(json.dumps(tokens))
    print("transformers:", tokens)


def run(folder: Path) -> None:
    """Generate with vLLM and compare."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; by default it asks for nearly all memory
    from vllm import LLM, SamplingParams

    assert "rankfold" not in sys.modules
    model = LLM(str(folder), trust_remote_code=True, dtype="float32", enforce_eager=True, max_model_len=256)
    output = model.generate([PROMPT], SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True))
    tokens = list(output[0].outputs[0].token_ids)
    print("vLLM:", tokens)
    if tokens != json.loads((folder / "expected.json").read_text()):
        raise SystemExit("the tokens differ")
    print("the same tokens")


if __name__ == "__main__":
    {"make": make, "run": run}[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
