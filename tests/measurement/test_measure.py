"""Measurements against naive ones."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tiny
import torch
from conftest import asset
from transformers import AutoTokenizer

from rankfold import allocate, factorize, find_sites
from rankfold.checkpoint import save
from rankfold.circumstances import Circumstances
from rankfold.cost import (
    disk_bytes,
    interleaved_latency,
    memory_bytes,
    neighbouring_ranks,
    parameter_count,
    rank_seconds,
    reading,
)
from rankfold.cost.latency import NOISY_SPREAD, _spread
from rankfold.measurement import measure_latency, measure_limits, measure_quality, measure_size, table
from rankfold.quality import classification_accuracy, load_labelled, next_token_quality
from rankfold.quantization import Grid, quantize_blocks
from rankfold.record import value_of


def windows() -> torch.Tensor:
    return torch.randint(3, 120, (10, 16), generator=torch.Generator().manual_seed(0))


def test_the_loss_is_the_mean_over_all_scored_tokens() -> None:
    model = tiny.build("llama")
    quality = next_token_quality(model, windows(), batch_size=3)
    losses = []
    with torch.no_grad():
        for row in windows():
            probabilities = model(input_ids=row[None]).logits[0].double().softmax(-1)
            losses.append([-math.log(probabilities[i, row[i + 1]]) for i in range(15)])
    table = torch.tensor(losses)
    assert quality.tokens == 150
    assert quality.loss == pytest.approx(float(table.mean()), rel=1e-5)
    assert quality.loss_error == pytest.approx(float(table.mean(1).std() / math.sqrt(10)), rel=1e-4)
    assert quality.perplexity == pytest.approx(math.exp(quality.loss))


def test_one_window_has_no_standard_error() -> None:
    quality = next_token_quality(tiny.build("llama"), windows()[:1])
    assert quality.loss_error is None
    assert quality.perplexity_error is None


def test_a_model_is_no_distance_from_itself_and_some_from_another() -> None:
    model, other = tiny.build("llama"), tiny.build("llama", seed=1)
    same = next_token_quality(model, windows(), dense=model)
    assert same.kl == pytest.approx(0, abs=1e-7)
    assert same.agreement == 1
    different = next_token_quality(other, windows(), dense=model)
    assert different.kl is not None
    assert different.kl > 0.1
    with torch.no_grad():
        p, q = (m(input_ids=windows()).logits[:, :-1].double().log_softmax(-1) for m in (model, other))
    assert different.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)


def test_logits_that_are_not_finite_name_the_batch() -> None:
    model = tiny.build("llama")
    broken = windows()
    broken[7, 2] = 125
    with torch.no_grad():
        model.model.embed_tokens.weight[125] = float("nan")
    with pytest.raises(ValueError, match="batch 2 of the evaluation gives NaN"):
        next_token_quality(model, broken, batch_size=3)


def test_sizes_are_those_of_the_tensors_and_the_file(tmp_path: Path) -> None:
    model = tiny.build("llama_gqa", torch.bfloat16)
    factorize(model, allocate(find_sites(model).select(), keep=0.5, method="svd"))
    save(model, None, tmp_path / "out")
    assert parameter_count(model) == sum(p.numel() for p in model.parameters())
    tensors = 2 * parameter_count(model)
    assert tensors <= memory_bytes(model) <= tensors + 2000
    disk = disk_bytes(tmp_path / "out")
    assert disk is not None
    assert tensors <= disk <= tensors + 20_000
    assert disk_bytes("nobody/model") is None


@pytest.mark.parametrize("name", ["llama", "mamba", "bert_masked", "t5"])
def test_latency_of_every_kind_of_model(name: str) -> None:
    models = {"a": tiny.build(name), "b": tiny.build(name)}
    rounds: list[int] = []
    result = interleaved_latency(models, prompt_tokens=8, decoded_tokens=2, rounds=4, on_step=lambda: rounds.append(1))
    assert len(rounds) == 5
    for latency in result.values():
        assert len(latency.prefill) == 4
        assert latency.prefill_seconds > 0
        assert (latency.decode_seconds is not None) == (name in {"llama", "mamba"})


def test_a_machine_that_is_busy_with_other_work_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that got no CPU time while the clock ran, and a quiet one whose rounds differ wildly."""
    models = {"a": tiny.build("llama")}
    monkeypatch.setattr("rankfold.cost.latency.time.process_time", lambda: 0.0)
    assert interleaved_latency(models, prompt_tokens=8, decoded_tokens=2, rounds=4)["a"].contended
    assert _spread([1.0, 1.0, 1.1, 1.0, 1.05]) < NOISY_SPREAD < _spread([1.0, 2.0, 1.0, 3.0, 1.0])


def test_records_make_a_table_with_ratios() -> None:
    models = {"dense": tiny.build("llama"), "compressed": tiny.build("llama")}
    factorize(models["compressed"], allocate(find_sites(models["compressed"]).select(), keep=0.5, method="svd"))
    records = measure_size(models, {}, Circumstances({})) + measure_quality(
        models, windows(), Circumstances({"data": "x"})
    )
    records += measure_latency(models, Circumstances({}), prompt_tokens=8, rounds=4)
    rows = {row[0]: row for row in table(records, models)}
    parameters = value_of(records, "compressed", "parameters"), value_of(records, "dense", "parameters")
    assert rows["parameters"][-1] == f"{parameters[0] / parameters[1]:.3f}"  # type: ignore[operator]
    assert "±" in rows["perplexity"][1]
    assert rows["KL to dense, nat/token"][1] == "-"
    assert {"prefill, ms", "decode, ms/token", "same first choice"} <= set(rows)
    assert all("contended" in record.context for record in records if record.name == "prefill")
    for what, tokens in (("prefill", 8), ("decode", 1)):
        seconds, rate = (value_of(records, "dense", name) for name in (what, f"{what}_throughput"))
        assert rate == pytest.approx(tokens / seconds)  # type: ignore[operator]


def test_batches_stand_apart_in_the_table() -> None:
    models = {"dense": tiny.build("llama")}
    records = [
        record
        for size in (1, 4)
        for record in measure_latency(models, Circumstances({}), prompt_tokens=8, rounds=2, batch_size=size)
    ]
    rows = {row[0] for row in table(records, models)}
    assert {"decode, tokens/s: batch 1", "decode, tokens/s: batch 4"} <= rows


def test_no_model_can_be_faster_than_its_bytes_and_multiplications_allow() -> None:
    models = {"dense": tiny.build("llama"), "compressed": tiny.build("llama")}
    sites = find_sites(models["dense"]).select()
    factorize(models["compressed"], allocate(sites, keep=0.5, method="svd"))
    head = models["dense"].get_output_embeddings().weight.numel()
    numbers = sum(site.parameters for site in sites) + head
    assert reading(models["dense"]) == (4 * numbers, numbers)
    limits = measure_limits(models, Circumstances({}))
    kept = sum(p.numel() for m in models["compressed"].model.layers for p in m.parameters() if p.ndim == 2) + head
    assert value_of(limits, "compressed", "decode_speedup_limit") == pytest.approx(numbers / kept)
    quantize_blocks(models["compressed"], [tiny.inputs(models["compressed"])], "spqr", Grid(4, group=8))
    few = measure_limits(models, Circumstances({}))
    assert value_of(few, "compressed", "prefill_speedup_limit") == pytest.approx(numbers / kept)
    assert value_of(few, "compressed", "decode_speedup_limit") > numbers / kept  # type: ignore[operator]


def test_accuracy_counts_right_rows(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(asset("weights/all-MiniLM-L6-v2"))
    model = tiny.build("bert_classifier")
    model.resize_token_embeddings(len(tokenizer))
    rows = [{"sentence": f"number {i}", "label": i % 2} for i in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    accuracy = classification_accuracy(model, tokenizer, load_labelled(tmp_path / "rows.jsonl"), batch_size=4)
    with torch.no_grad():
        right = sum(
            int(model(**tokenizer(str(row["sentence"]), return_tensors="pt")).logits.argmax()) == row["label"]
            for row in rows
        )
    assert (accuracy.right, accuracy.total) == (right, 9)
    assert accuracy.error == pytest.approx(math.sqrt(accuracy.value * (1 - accuracy.value) / 9))


@pytest.mark.parametrize("row", ['{"sentence": "a"}', '{"label": 1}', ""])
def test_labelled_rows_must_hold_text_and_label(row: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(row)
    with pytest.raises(ValueError, match="`sentence` or `text` and an integer `label`"):
        load_labelled(tmp_path / "rows.jsonl")


def test_every_rank_is_timed() -> None:
    seconds = rank_seconds(512, 512, [8, 256], tokens=64, rounds=5)
    assert set(seconds) == {8, 256}
    assert min(seconds.values()) > 0
    ranks = neighbouring_ranks(2048)
    assert all(rank % multiple == 0 and rank % (2 * multiple) for multiple, rank in ranks.items() if multiple < 128)
    assert neighbouring_ranks(64)[1] == 1
