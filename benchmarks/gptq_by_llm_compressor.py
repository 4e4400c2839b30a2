"""GPTQ by llm-compressor, the maintained library, for `one_budget.py --llm-compressor PYTHON`.

    python benchmarks/gptq_by_llm_compressor.py MODEL WINDOWS OUT --bits 3

It runs in an environment of its own (`pip install torch llmcompressor`), since it pins another transformers. WINDOWS is
a safetensors file with the windows' tokens as `input_ids`. Groups of 64, asymmetric, the library's own settings
otherwise; head and embedding stay as they are. OUT holds the rounded weights in 16 bits.
"""

from __future__ import annotations

import argparse

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Round the weights and save them dense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("windows")
    parser.add_argument("out")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--actorder", choices=["static", "group"], default=None)
    arguments = parser.parse_args()
    ids = load_file(arguments.windows)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)
    weights = {
        "num_bits": arguments.bits, "type": "int", "symmetric": False, "strategy": "group",
        "group_size": arguments.group, "actorder": arguments.actorder,
    }  # fmt: skip
    recipe = GPTQModifier(config_groups={"all": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids.tolist()]
    oneshot(
        model=model, dataset=Dataset.from_list(rows), recipe=recipe,
        max_seq_length=ids.shape[1], num_calibration_samples=len(ids),
    )  # fmt: skip
    plain = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)
    kept = plain.state_dict()
    rounded = {name: weight for name, weight in model.state_dict().items() if name in kept}
    plain.load_state_dict(rounded, strict=False)
    plain.save_pretrained(arguments.out)
    AutoTokenizer.from_pretrained(arguments.model).save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
