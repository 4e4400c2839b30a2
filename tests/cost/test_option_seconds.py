"""Seconds as the price of options: what is timed prices every option, and a model is made as fast as was asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import rankfold
from rankfold.allocation import FACTOR_BITS, width_options
from rankfold.checkpoint import load_model
from rankfold.cost import (
    OptionSeconds,
    TimedLayer,
    layer_seconds,
    model_seconds,
    option_seconds,
    share_for,
    timed_layers,
)
from rankfold.modules import stored_parameters
from rankfold.pipeline.settings import _even
from rankfold.plan import Option
from rankfold.quantization import WIDTHS
from rankfold.sites import Site, find_sites

MODEL = Path(__file__).parents[2] / "models" / "pycode-llama"


def made_up(timed: TimedLayer) -> float:
    """What a layer takes where every byte takes a second."""
    out_features, in_features = timed.shape
    numbers = out_features * in_features
    if timed.rank:
        numbers = stored_parameters(timed.form, out_features, in_features, (timed.rank,), bias=False)
    return numbers * (timed.bits or 16) / 8


def really(option: Option, sites: dict[str, Site]) -> float:
    """The same of a chosen option, at its own rank."""
    site = sites[option.sites[0]]
    shape, parts = (site.out_features, site.in_features), []
    if option.form in ("dense", "compensated"):
        parts.append(TimedLayer(shape, bits=option.bits))
    if option.form != "dense":
        form = "low_rank" if option.form == "compensated" else option.form
        parts.append(TimedLayer(shape, form, option.ranks[0], option.factor_bits))
    return len(option.sites) * sum(map(made_up, parts))


@pytest.fixture
def by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that takes a second for a byte, and half as much again for what is not compressed."""
    from rankfold.pipeline import run

    def layers(model: Any, listed: Any, tokens: int, on_step: Any) -> Any:
        return {tuple(timed): made_up(timed) for timed in listed if on_step() is None}

    def whole(models: Any, speed_of: str) -> dict[str, float]:
        sites = find_sites(models["dense"]).select()
        assert not any(hasattr(module, "rank") for module in models["dense"].modules()), "the dense model stays so"
        return {name: 1.5 * sum(2 * site.out_features * site.in_features for site in sites) for name in models}

    monkeypatch.setattr(run, "seconds_of_layers", layers)
    monkeypatch.setattr(run, "model_seconds", whole)


def test_whatever_is_offered_has_a_price() -> None:
    sites = [Site(name, out, into, False, 2, "0", "up", "up") for name, out, into in (("a", 96, 64), ("b", 64, 64))]
    listed = [*timed_layers(sites, "pivoted", WIDTHS, FACTOR_BITS)]
    assert len(listed) == len(set(listed))
    price = OptionSeconds(sites, {tuple(timed): made_up(timed) for timed in listed})
    for options in width_options(sites, _even(sites)):
        for position in range(len(options.shares)):
            assert price(options.option(position)) > 0
    assert price(Option(sites=("a",), bits=4, group=64)) == 96 * 64 / 2
    low = Option(sites=("b",), form="low_rank", ranks=(24,), factor_bits=8)
    assert price(low) == pytest.approx(24 * 128)
    both = Option(sites=("b",), form="compensated", ranks=(24,), bits=4, group=64, factor_bits=8)
    assert price(both) == pytest.approx(24 * 128 + 64 * 64 / 2)
    twice = Site("c", 64, 64, False, 2, "0", "up", "up", calls=2)
    assert OptionSeconds([twice], price.seconds)(Option(sites=("c",))) == 2 * price(Option(sites=("b",)))


@pytest.mark.parametrize(
    "timed",
    [
        TimedLayer((64, 96)),
        TimedLayer((64, 96), bits=3, group=64),
        TimedLayer((64, 96), "pivoted", 16),
        TimedLayer((64, 96), "tucker", 16),
        TimedLayer((64, 96), "low_rank", 16, bits=4),
    ],
)
def test_a_layer_is_timed(timed: TimedLayer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(option_seconds, "SPILL", 2**10)
    assert 0 < layer_seconds(timed, 3, torch.bfloat16, rounds=2) < 10


@pytest.mark.parametrize("allow", [None, "rank", "bits"])
def test_the_layers_that_cost_the_loss_least_are_made_faster(allow: str | None, by_bytes: None) -> None:
    model, tokenizer = rankfold.load(MODEL, dtype=torch.bfloat16)
    sites = find_sites(model).select()
    windows = torch.arange(16 * 32).reshape(16, 32) % 900 + 3
    plan = rankfold.compress(model, tokenizer, speedup=1.2, allow=allow, text=windows)
    by_name = {site.name: site for site in sites}
    dense = sum(really(Option(sites=(site.name,)), by_name) for site in sites)
    spent = sum(really(option, by_name) for option in plan.options)
    asked = share_for(1.2, 1.5 * dense, dense)
    assert 0.94 * asked <= spent / dense <= 1.02 * asked
    assert plan.calibration["speedup"] == 1.2
    assert plan.calibration["measured_speedup"] == 1.0, "this machine takes one time for all models"


def test_what_cannot_be_reached_is_refused(by_bytes: None) -> None:
    model, tokenizer = rankfold.load(MODEL, dtype=torch.bfloat16)
    windows = torch.arange(16 * 32).reshape(16, 32) % 900 + 3
    with pytest.raises(ValueError, match=r"`speedup` must lie below 2\.\d+ here, but got 4: the layers take"):
        rankfold.compress(model, tokenizer, speedup=4, text=windows)
    with pytest.raises(ValueError, match=r"`speedup` must lie below 1\.\d+ here, but got 2: the layers take"):
        rankfold.compress(model, tokenizer, speedup=2, allow="bits", sites=["*.q_proj"], text=windows)
    with pytest.raises(ValueError, match="`speedup` must be above 1"):
        rankfold.compress(model, tokenizer, speedup=1, text=windows)
    with pytest.raises(ValueError, match="`speed_of` must be one of decode, prompt, but got 'training'"):
        rankfold.compress(model, tokenizer, speedup=2, speed_of="training", text=windows)


def test_embeddings_in_few_bits_go_with_it(by_bytes: None) -> None:
    model, tokenizer = rankfold.load(MODEL, dtype=torch.bfloat16)
    windows = torch.arange(16 * 32).reshape(16, 32) % 900 + 3
    plan = rankfold.compress(model, tokenizer, speedup=1.2, embeddings=8, text=windows)
    assert plan.calibration["embeddings"]["bits"] == 8


def test_what_cannot_be_timed_is_told() -> None:
    with pytest.raises(ValueError, match="Decoding is not timed of a T5"):
        model_seconds({"": tiny.build("t5")}, "decode")
    assert model_seconds({"": tiny.build("llama")}, "prompt")[""] > 0


def test_the_same_choice_after_a_kill(by_bytes: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from rankfold.pipeline import run

    windows = torch.arange(16 * 32).reshape(16, 32) % 900 + 3
    choices: dict[str, Any] = {"speedup": 1.2, "text": windows, "work": tmp_path, "allow": "rank"}
    first = rankfold.compress(load_model(MODEL, dtype=torch.bfloat16), **choices)
    # Another time of day, another machine's speed: what was timed stays.
    monkeypatch.setattr(run, "seconds_of_layers", None)
    again = rankfold.compress(load_model(MODEL, dtype=torch.bfloat16), **choices)
    assert [option.ranks for option in again.options] == [option.ranks for option in first.options]
