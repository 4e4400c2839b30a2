"""Refinement and recovery: what they promise, and what happens when they are killed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from rankfold import allocate, factorize, find_sites
from rankfold.checkpoint import load_model, load_tokenizer
from rankfold.modules import linear_at
from rankfold.quality import next_token_quality
from rankfold.recovery import GENERATED, recover, recovery_windows, refine_blocks, refine_predictions, sample_windows
from rankfold.recovery.divergence import divergence as logit_divergence


def windows(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (count, 16), generator=torch.Generator().manual_seed(seed))


def damaged(name: str = "llama_gqa", rank: int = 6) -> tuple[Any, Any, dict[str, Any]]:
    """A compressed model, its dense one, and the dense layers."""
    teacher, model = tiny.build(name).eval(), tiny.build(name).eval()
    sites = find_sites(model).select()
    dense = {site.name: linear_at(model, site.name) for site in sites}
    factorize(model, allocate(sites, rank=rank, method="svd"))
    return model, teacher, dense


def divergence(model: Any, teacher: Any, ids: torch.Tensor) -> float:
    kl = next_token_quality(model, ids, dense=teacher).kl
    assert kl is not None
    return kl


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "opt"])
def test_refinement_brings_every_block_nearer_to_the_dense_one(name: str) -> None:
    model, teacher, dense = damaged(name)
    before = divergence(model, teacher, windows(8, 1))
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    batches = [{"input_ids": part} for part in windows(64).split(8)]
    refined = refine_blocks(model, batches, dense, steps=60)
    assert len(refined) == 2
    assert all(block.after < block.before for block in refined)
    assert divergence(model, teacher, windows(8, 1)) < before
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "bert_classifier", "bert_masked", "mixtral", "opt"])
def test_refinement_towards_predictions_brings_the_model_nearer(name: str) -> None:
    model, teacher, _ = damaged(name)
    inputs = [{"input_ids": part} for part in windows(64).split(8)]

    def distance() -> float:
        with torch.no_grad():
            pairs = [(model(**batch).logits, teacher(**batch).logits) for batch in inputs]
        return sum(float(logit_divergence(*pair)) for pair in pairs)

    before, original = distance(), copy.deepcopy(teacher.state_dict())
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    refined = refine_predictions(model, teacher, inputs, steps=40)
    assert any(block.after < block.before for block in refined)
    assert distance() < before
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    for key, part in teacher.state_dict().items():
        torch.testing.assert_close(part, original[key], rtol=0, atol=0)


def test_refinement_towards_predictions_is_resumed_and_keeps_sixteen_bits(tmp_path: Path) -> None:
    batches = [{"input_ids": part} for part in windows(32).split(8)]
    model, teacher, _ = damaged()
    model, teacher = model.bfloat16(), teacher.bfloat16()
    first = refine_predictions(model, teacher, batches, steps=20, work=tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    again, _, _ = damaged()
    again = again.bfloat16()
    (tmp_path / f"{first[-1].block}.safetensors").unlink()
    second = refine_predictions(again, teacher, batches, steps=20, work=tmp_path)
    assert [block.block for block in second] == [first[-1].block]
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_layers_that_stayed_dense_are_trained_without_changing_the_teacher() -> None:
    model, teacher, _ = damaged()
    layer = teacher.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = copy.copy(layer)
    model.model.layers[0].mlp.up_proj._parameters = dict(layer._parameters)
    before = layer.weight.detach().clone()
    refine_predictions(model, teacher, [{"input_ids": part} for part in windows(32).split(8)], steps=10)
    torch.testing.assert_close(teacher.model.layers[0].mlp.up_proj.weight, before, rtol=0, atol=0)
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before)


def test_a_bare_encoder_has_no_predictions_to_refine_towards() -> None:
    encoder = tiny.build("bert_classifier").base_model
    with pytest.raises(ValueError, match="predicts no distribution"):
        refine_predictions(encoder, encoder, [{"input_ids": part} for part in windows(16).split(8)])


def test_a_killed_refinement_goes_on_with_the_blocks_that_are_done(tmp_path: Path) -> None:
    batches = [{"input_ids": part} for part in windows(32).split(8)]
    whole, _, dense = damaged()
    refine_blocks(whole, batches, dense, steps=20)

    class KilledError(Exception):
        pass

    calls = 0

    def dies() -> None:
        nonlocal calls
        calls += 1
        if calls == 30:
            raise KilledError

    model, _, dense = damaged()
    with pytest.raises(KilledError):
        refine_blocks(model, batches, dense, steps=20, work=tmp_path, on_step=dies)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    model, _, dense = damaged()
    again = refine_blocks(model, batches, dense, steps=20, work=tmp_path)
    assert len(again) == 1
    for a, b in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_sixteen_bit_blocks_are_trained_in_float32_and_keep_their_dtype() -> None:
    model, _, dense = damaged()
    model = model.bfloat16()
    for layer in dense.values():
        layer.bfloat16()
    batches = [{"input_ids": part} for part in windows(32).split(8)]
    refined = refine_blocks(model, batches, dense, steps=30)
    assert all(block.after < block.before for block in refined)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_refinement_asks_for_two_batches_and_for_blocks_of_their_own() -> None:
    model, _, dense = damaged()
    with pytest.raises(ValueError, match="needs at least two, but got 1"):
        refine_blocks(model, [{"input_ids": windows(4)}], dense)


@pytest.mark.parametrize(("objective", "lora"), [("kl", None), ("kl", 4), ("next-token", None)])
def test_recovery_lowers_its_objective_on_held_out_text(objective: str, lora: int | None, tmp_path: Path) -> None:
    model, teacher, _ = damaged()
    shapes = {name: part.shape for name, part in model.state_dict().items()}
    ids = teacher.generate(windows(96)[:, :1], max_new_tokens=15, do_sample=True, pad_token_id=0)
    result = recover(
        model,
        teacher if objective == "kl" else None,
        ids[:80],
        ids[80:],
        work=tmp_path / "work",
        objective=objective,
        steps=40,
        batch_size=16,
        lora_rank=lora,
    )
    assert result.after < result.before
    assert {name: part.shape for name, part in model.state_dict().items()} == shapes
    assert all(parameter.requires_grad for parameter in model.parameters())
    if objective == "kl":
        assert divergence(model, teacher, ids[80:]) == pytest.approx(result.after, rel=1e-3)


def test_a_killed_recovery_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    steps = 0

    def dies() -> None:
        nonlocal steps
        steps += 1
        if steps == 25:
            raise KilledError

    model, teacher, _ = damaged()
    settings: dict[str, Any] = {"work": tmp_path / "work", "steps": 40, "batch_size": 8}
    with pytest.raises(KilledError):
        recover(model, teacher, windows(64), windows(8, 1), on_step=dies, **settings)
    # What a kill half-way through a save leaves: the newest checkpoint lacks its last file.
    newest = max((tmp_path / "work").glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    (newest / "trainer_state.json").write_text("{")
    model, teacher, _ = damaged()
    done = 0

    def count() -> None:
        nonlocal done
        done += 1

    resumed = recover(model, teacher, windows(64), windows(8, 1), on_step=count, **settings)
    # It ends where an uninterrupted run does, after the steps that the last whole checkpoint lacked.
    straight, _, _ = damaged()
    whole = recover(straight, teacher, windows(64), windows(8, 1), **{**settings, "work": tmp_path / "other"})
    assert 0 < done < whole.steps
    assert resumed.after == pytest.approx(whole.after, rel=1e-3)
    for name, part in model.state_dict().items():
        torch.testing.assert_close(part, straight.state_dict()[name], rtol=1e-3, atol=1e-4)


def test_recovery_reads_given_and_generated_text_in_equal_parts(bundled: Path) -> None:
    teacher, tokenizer = load_model(bundled), load_tokenizer(bundled)
    stages: list[str] = []

    def stage(title: str, steps: int) -> Any:
        stages.append(title)
        return lambda: None

    settings: dict[str, Any] = {"count": 8, "length": 32, "stage": stage}
    windows, held_out = recovery_windows(teacher, teacher, tokenizer, ["bundled:calibration", GENERATED], **settings)
    assert windows.shape == (8, 32)
    assert held_out.shape[1] == 32
    assert stages == ["generating text"]
    _, decided = recovery_windows(teacher, teacher, tokenizer, [GENERATED], **settings)
    assert decided.shape == (2, 32)
    for texts, told in (([], "needs a text"), ([GENERATED], "pass `dense`")):
        with pytest.raises(ValueError, match=told):
            recovery_windows(teacher, None, tokenizer, texts, **settings)


def test_a_missing_or_foreign_teacher_is_an_error(tmp_path: Path) -> None:
    model, teacher, _ = damaged()
    with pytest.raises(ValueError, match="needs the dense model as teacher"):
        recover(model, None, windows(4), windows(4), work=tmp_path)
    with pytest.raises(ValueError, match="must be `kl` or `next-token`, but got 'mse'"):
        recover(model, teacher, windows(4), windows(4), work=tmp_path, objective="mse")
    teacher.resize_token_embeddings(7)
    with pytest.raises(ValueError, match="must share a vocabulary, but have 7 and 128"):
        recover(model, teacher, windows(4), windows(4), work=tmp_path)


def test_a_model_writes_text_by_itself(bundled: Path) -> None:
    model = tiny.build("llama").eval()
    tokenizer = load_tokenizer(bundled)
    first, again, other = (sample_windows(model, tokenizer, 5, 12, seed=seed, batch_size=2) for seed in (0, 0, 1))
    assert first.shape == (5, 12)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with pytest.raises(ValueError, match="Only a causal language model writes text"):
        sample_windows(tiny.build("bert_masked"), tokenizer, 1, 8)
