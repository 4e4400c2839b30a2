"""Recovery with rounding held: scales are trained, codes and bytes stay, and another process loads the result."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from rankfold import allocate, find_sites
from rankfold.calibration import make_batches, summed_loss
from rankfold.checkpoint import load_model, save
from rankfold.modules import CompensatedLinear, GroupLinear, linear_at
from rankfold.plan import Option
from rankfold.quality import next_token_quality
from rankfold.quantization import compress_in_bits
from rankfold.recovery import recover

IDS = torch.randint(3, 128, (48, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def few(tmp_path: Path) -> tuple[Path, Any]:
    """A folder of a model in 2 bits with compensations in 8, and its dense model."""
    model, teacher = tiny.build("llama").eval(), tiny.build("llama").eval()
    sites = find_sites(model).select()

    def choose(losses: Any) -> Any:
        plan = allocate(sites, keep=1.0, losses=losses)
        option = {"form": "compensated", "ranks": (8,), "bits": 2, "group": 64, "factor_bits": 8}
        return replace(plan, options=tuple(Option(sites=(site.name,), **option) for site in sites))  # type: ignore[arg-type]

    batches = make_batches(model, IDS, 8)
    compress_in_bits(model, sites, batches, loss=summed_loss(model, "text", 0), allocate=choose)
    assert all(isinstance(linear_at(model, site.name), CompensatedLinear) for site in sites)
    save(model, None, tmp_path / "few")
    return tmp_path / "few", teacher


def divergence(model: Any, teacher: Any) -> float:
    kl = next_token_quality(model, IDS, dense=teacher).kl
    assert kl is not None
    return kl


def codes(model: Any) -> dict[str, torch.Tensor]:
    return {name: part.clone() for name, part in model.state_dict().items() if name.endswith(("codes", "zeros"))}


def test_scales_are_trained_and_codes_are_held(few: tuple[Path, Any], tmp_path: Path) -> None:
    folder, teacher = few
    model = load_model(folder)
    held, before, stored = codes(model), divergence(model, teacher), model.state_dict()
    sizes = {name: part.numel() * part.element_size() for name, part in stored.items()}
    scales = {name: part.clone() for name, part in stored.items() if name.endswith("scales")}
    result = recover(model, teacher, IDS, IDS, work=tmp_path / "w", steps=30, batch_size=8)
    assert result.adapters is None
    assert result.after < 0.8 * result.before
    # What was reached is that of the scales as they are stored.
    assert divergence(model, teacher) == pytest.approx(result.after, rel=0.02)
    assert divergence(model, teacher) < before
    after = model.state_dict()
    assert {name: part.numel() * part.element_size() for name, part in after.items()} == sizes
    for name, part in codes(model).items():
        assert torch.equal(part, held[name]), name
    assert any(not torch.equal(after[name], part) for name, part in scales.items())
    save(model, None, tmp_path / "recovered")
    program = (
        "import torch, sys; from transformers import AutoModelForCausalLM as A;"
        "model = A.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32);"
        "torch.save(model(torch.arange(3, 27)[None]).logits.detach(), sys.argv[2])"
    )
    logits = tmp_path / "logits"
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "recovered"), str(logits)], check=True)
    with torch.no_grad():
        expected = model(torch.arange(3, 27)[None]).logits
    torch.testing.assert_close(torch.load(logits), expected, rtol=1e-3, atol=1e-3)


def test_an_interrupted_recovery_of_scales_resumes(few: tuple[Path, Any], tmp_path: Path) -> None:
    folder, teacher = few

    def stop() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    def run(model: Any, on_step: Any = lambda: None) -> Any:
        return recover(model, teacher, IDS, IDS, work=tmp_path / "w", steps=20, batch_size=8, on_step=on_step)

    left = 11
    broken = load_model(folder)
    with pytest.raises(KeyboardInterrupt):
        run(broken, stop)
    assert all(module.change is None for module in broken.modules() if isinstance(module, GroupLinear))
    assert (tmp_path / "w" / "checkpoint-10").exists()
    resumed, whole = load_model(folder), load_model(folder)
    found = run(resumed)
    expected = recover(whole, teacher, IDS, IDS, work=tmp_path / "other", steps=20, batch_size=8)
    assert found.after == pytest.approx(expected.after, rel=1e-3)


def test_training_that_gains_nothing_is_taken_back(few: tuple[Path, Any], tmp_path: Path) -> None:
    folder, teacher = few
    model = load_model(folder)
    before = {name: part.clone() for name, part in model.state_dict().items()}
    result = recover(model, teacher, IDS, IDS, work=tmp_path / "w", steps=2, batch_size=8, rate=30.0)
    assert result.after == result.before
    for name, part in model.state_dict().items():
        torch.testing.assert_close(part, before[name], rtol=0, atol=0)


def test_adapters_over_groups_say_what_to_do_instead(few: tuple[Path, Any], tmp_path: Path) -> None:
    folder, teacher = few
    with pytest.raises(ValueError, match="recover without `lora`"):
        recover(load_model(folder), teacher, IDS, IDS, work=tmp_path / "w", steps=2, lora_rank=4)
