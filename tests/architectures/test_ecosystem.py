"""PEFT, the Trainer and torch.compile take a compressed model as they take any other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import Trainer, TrainingArguments

from rankfold import allocate, factorize, find_sites
from rankfold.checkpoint import load_model, save


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tiny.build("llama_gqa")
    factorize(model, allocate(find_sites(model).select(), keep=0.6, method="svd"))
    return save(model, None, tmp_path / "out")


def rows(count: int = 8) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 120, (count, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def loss(model: Any) -> float:
    ids = torch.stack([row["input_ids"] for row in rows()])
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


def arguments(folder: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder), max_steps=8, learning_rate=1e-2, report_to="none", use_cpu=True, disable_tqdm=True
    )


def test_the_trainer_trains_the_factors(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    before = loss(model)
    trainer = Trainer(model=model, args=arguments(tmp_path / "run"), train_dataset=rows())
    trainer.train()
    model.eval()
    assert loss(model) < before
    trainer.save_model(str(tmp_path / "trained"))
    assert loss(load_model(tmp_path / "trained")) == pytest.approx(loss(model), rel=1e-6)


def test_lora_on_the_factors_trains_saves_loads_and_merges(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = load_model(folder)
    before = loss(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["down", "up"], lora_alpha=16))
    Trainer(model=adapted, args=arguments(tmp_path / "run"), train_dataset=rows()).train()
    adapted.eval()
    after = loss(adapted)
    assert after < before
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load_model(folder), tmp_path / "adapter").eval()
    assert loss(again) == pytest.approx(after, rel=1e-5)
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert loss(load_model(tmp_path / "merged")) == pytest.approx(after, rel=1e-5)


COMPILED = """
import sys, torch
import rankfold
from rankfold.checkpoint import load_model
from rankfold.modules import prefer
torch.set_num_threads(1)
model = load_model(sys.argv[1])
ids = torch.arange(3, 27).reshape(2, 12)
with torch.no_grad():
    expected = model(input_ids=ids).logits
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(input_ids=ids).logits, expected)
    prefer(model.bfloat16(), "speed")
    expected = model(input_ids=ids).logits
    found = torch.compile(model, backend="aot_eager")(input_ids=ids).logits
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)
"""


def test_a_compiled_model_gives_the_same_logits(folder: Path) -> None:
    run = subprocess.run([sys.executable, "-c", COMPILED, str(folder)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize("bits", [8, 4])
def test_the_quantization_slot_is_free_for_bitsandbytes(bits: int, tmp_path: Path) -> None:
    """On the factors, in 8 and in 4 bits; ranks are multiples of 64, as its 4-bit kernels on CPUs need."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: an extra of later work")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128, hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    factorize(model, allocate(find_sites(model).select(), rank=64, method="svd"))
    save(model, None, tmp_path / "out")
    settings = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=settings, device_map="cpu")
    ids = tiny.inputs(model)["input_ids"]
    with torch.no_grad():
        expected, found = model(ids).logits, quantized(ids).logits.float()
    factor = quantized.model.layers[0].mlp.up_proj.down
    assert factor.weight.dtype in {torch.int8, torch.uint8}
    assert float((found - expected).norm() / expected.norm()) < (0.05 if bits == 8 else 0.3)
