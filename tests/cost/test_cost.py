"""Counters, memory and the roofline: what is counted is what is there, and what is not says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import build

from rankfold.checkpoint import load_model
from rankfold.circumstances import Circumstances
from rankfold.cost import (
    Layer,
    Meter,
    Peaks,
    cache_bytes,
    interleaved_energy,
    memory_bytes,
    open_meter,
    peak_bytes,
    relative_cost,
    time_layers,
)
from rankfold.measurement import measure_energy


def counters(folder: Path, *packages: tuple[int, int]) -> Path:
    for number, (energy, full) in enumerate(packages):
        package = folder / f"intel-rapl:{number}"
        package.mkdir(parents=True, exist_ok=True)
        (package / "energy_uj").write_text(f"{energy}\n")
        (package / "max_energy_range_uj").write_text(f"{full}\n")
        # A part of a package counts no second time.
        (folder / f"intel-rapl:{number}:0").mkdir(exist_ok=True)
    return folder


def test_rapl_counts_all_packages_and_goes_on_after_it_is_full(tmp_path: Path) -> None:
    folder = counters(tmp_path, (4_000_000, 5_000_000), (1_000_000, 5_000_000))
    meter = open_meter(powercap=folder)
    assert (meter.source, meter.about) == ("rapl", "2 processor(s), whoever uses them")
    joules = meter.joules(lambda: counters(tmp_path, (500_000, 5_000_000), (3_000_000, 5_000_000)) and None)
    assert joules == pytest.approx(1.5 + 2.0)


def test_the_platform_and_parts_of_a_processor_are_not_counted_twice(tmp_path: Path) -> None:
    folder = counters(tmp_path, (0, 5_000_000), (0, 9_000_000))
    (folder / "intel-rapl:0" / "name").write_text("package-0\n")
    (folder / "intel-rapl:1" / "name").write_text("psys\n")
    assert open_meter(powercap=folder).about.startswith("1 processor")


def test_an_encoder_decoder_has_a_peak_too() -> None:
    peak, how = peak_bytes(build("t5"), 8)
    assert peak is not None or how.startswith("unavailable")


def test_a_counter_that_vanishes_makes_energy_unavailable(tmp_path: Path) -> None:
    meter = open_meter(powercap=counters(tmp_path, (0, 5_000_000)))
    assert meter.joules((tmp_path / "intel-rapl:0" / "energy_uj").unlink) is None
    assert meter.source == "unavailable"
    assert "vanished during the run" in meter.about
    assert meter.joules(lambda: None) is None
    (record,) = measure_energy({"m": build("llama")}, meter, Circumstances({}), prompt_tokens=4, decoded_tokens=1)
    assert record.value is None
    assert "vanished" in record.context["unavailable"]


def test_without_a_counter_there_is_a_reason_and_an_estimate_only_where_asked_for(tmp_path: Path) -> None:
    meter = open_meter(powercap=tmp_path)
    assert meter.source == "unavailable"
    assert "no RAPL counter" in meter.about
    assert interleaved_energy({"m": build("llama")}, meter) == {"m": None}
    estimate = open_meter(powercap=tmp_path, watts=20.0)
    assert estimate.source == "estimate"
    assert estimate.about.startswith("20 watts assumed (no RAPL counter")
    (tmp_path / "intel-rapl:0").mkdir()
    assert "cannot be read" in open_meter(powercap=tmp_path).about


def test_energy_is_per_round_and_models_take_turns() -> None:
    class Counting(Meter):
        def joules(self, work: Any) -> float:
            work()
            return 6.0

    found = interleaved_energy({"m": build("llama")}, Counting("rapl", "x"), prompt_tokens=4, decoded_tokens=1)
    assert found["m"] is not None
    assert 0 < found["m"] < 6


def test_the_cache_is_the_keys_and_values(bundled: Path) -> None:
    model = load_model(bundled)
    config = model.config
    heads = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    assert cache_bytes(model, 64, 2) == 2 * config.num_hidden_layers * heads * 64 * 2 * 2
    assert cache_bytes(build("bert_masked"), 8) is None


def test_a_state_of_fixed_size_does_not_grow() -> None:
    model = build("mamba")
    assert cache_bytes(model, 4) == cache_bytes(model, 12)


def test_the_peak_of_a_prefill_holds_its_logits(bundled: Path) -> None:
    model = load_model(bundled, dtype=torch.float32)
    peak, how = peak_bytes(model, 256, 32)
    if peak is None:
        assert how.startswith("unavailable")
    else:
        assert peak > 0.5 * 32 * 256 * model.config.vocab_size * 4
        assert peak < 20 * memory_bytes(model) + 40 * 32 * 256 * model.config.vocab_size * 4


def test_the_roofline_is_the_slower_of_memory_and_arithmetic() -> None:
    peaks = Peaks(bytes_per_second=100.0, flops_per_second=1000.0)
    layer = Layer("w", ((10, 10),))
    # One token: 200 FLOPs take 0.2 s, 4 x (100 + 20) bytes take 4.8 s.
    assert layer.seconds(1, 4, peaks) == pytest.approx(4.8)
    # 1000 tokens: 200,000 FLOPs take 200 s, 4 x (100 + 20,000) bytes take 804 s; of 2 bytes half of that.
    assert layer.seconds(1000, 4, peaks) == pytest.approx(804)
    assert Layer("w", ((1000, 1000),)).seconds(1000, 1, peaks) == pytest.approx(2e6)
    assert peaks.ridge == 10
    # Low rank takes FLOPs and bytes away alike: at one token the intensity stays where it was.
    factorized = Layer("w", ((256, 4096), (4096, 256)))
    assert factorized.intensity(1, 2) == pytest.approx(Layer("w", ((4096, 4096),)).intensity(1, 2), rel=0.01)


def test_layers_are_timed_in_turns_and_costs_are_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankfold.cost.roofline.CACHE_BYTES", 2**20)
    layers = [Layer("dense", ((64, 64),)), Layer("factorized", ((8, 64), (64, 8)))]
    timed = time_layers(layers, Peaks(1e9, 1e9), tokens=2)
    assert [found.layer.name for found in timed] == ["dense", "factorized"]
    assert all(found.measured_seconds > 0 for found in timed)
    model = build("llama")
    found = relative_cost(model, model, rounds=2, prompt_tokens=8)
    assert found["prefill_ratio"] > 0
    assert "energy_ratio" not in found
    assert relative_cost(build("bert_masked"), build("bert_masked"), rounds=1, prompt_tokens=8)["decode_ratio"] is None
