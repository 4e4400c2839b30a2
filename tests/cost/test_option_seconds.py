"""Seconds as the price of options: what is timed prices every option, and a model is made as fast as was asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import rankfold
from rankfold.allocation import FACTOR_BITS, width_options
from rankfold.checkpoint import load_model
from rankfold.cost import OptionSeconds, TimedLayer, layer_seconds, option_seconds, share_for, timed_layers
from rankfold.pipeline.settings import _even
from rankfold.plan import Option
from rankfold.quantization import WIDTHS
from rankfold.sites import Site, find_sites

MODEL = Path(__file__).parents[2] / "models" / "pycode-llama"


def made_up(timed: TimedLayer) -> float:
    """What a layer takes where every byte takes a second."""
    out_features, in_features = timed.shape
    numbers = timed.rank * (out_features + in_features) if timed.rank else out_features * in_features
    return numbers * (timed.bits or 16) / 8


@pytest.fixture
def by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that takes a second for a byte, and half as much again for what is not compressed."""
    from rankfold.pipeline import run

    def layers(model: Any, listed: Any, tokens: int, on_step: Any) -> Any:
        return {tuple(timed): made_up(timed) for timed in listed if on_step() is None}

    def whole(model: Any, speed_of: str) -> float:
        sites = find_sites(model).select() if not hasattr(model.config, "rankfold") else ()
        return 1.5 * sum(2 * site.out_features * site.in_features for site in sites) or 1.0

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
    listed = [*timed_layers(sites, "pivoted", WIDTHS if allow != "rank" else (), FACTOR_BITS if not allow else ())]
    price = OptionSeconds(sites, {tuple(timed): made_up(timed) for timed in listed})
    dense = sum(price(Option(sites=(site.name,))) for site in sites)
    spent = sum(price(option) for option in plan.options)
    asked = share_for(1.2, 1.5 * dense, dense)
    assert 0.95 * asked <= spent / dense <= asked + 1e-9
    assert plan.calibration["speedup"] == 1.2
    assert plan.calibration["measured_speedup"] > 0


def test_what_cannot_be_reached_is_refused(by_bytes: None) -> None:
    model, tokenizer = rankfold.load(MODEL, dtype=torch.bfloat16)
    windows = torch.arange(16 * 32).reshape(16, 32) % 900 + 3
    with pytest.raises(ValueError, match=r"`speedup` must lie below 3.00 here, but got 4"):
        rankfold.compress(model, tokenizer, speedup=4, text=windows)
    with pytest.raises(ValueError, match="`speedup` must be above 1"):
        rankfold.compress(model, tokenizer, speedup=1, text=windows)
    with pytest.raises(ValueError, match="`speed_of` must be one of decode, prompt, but got 'training'"):
        rankfold.compress(model, tokenizer, speedup=2, speed_of="training", text=windows)


def test_the_same_choice_after_a_kill(by_bytes: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from rankfold.pipeline import run

    windows = torch.arange(16 * 32).reshape(16, 32) % 900 + 3
    choices: dict[str, Any] = {"speedup": 1.2, "text": windows, "work": tmp_path, "allow": "rank"}
    first = rankfold.compress(load_model(MODEL, dtype=torch.bfloat16), **choices)
    # Another time of day, another machine's speed: what was timed stays.
    monkeypatch.setattr(run, "seconds_of_layers", None)
    again = rankfold.compress(load_model(MODEL, dtype=torch.bfloat16), **choices)
    assert [option.ranks for option in again.options] == [option.ranks for option in first.options]
