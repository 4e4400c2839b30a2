"""One budget over bits and ranks: it is held to the byte, priced as stored, and loads as it was made."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers

import rankfold
from rankfold.allocation import MULTIPLE, Allowance, WidthLosses, allocate, knapsack, uniform_widths, width_options
from rankfold.calibration import calibrate, make_batches, summed_loss
from rankfold.checkpoint import export_dense, load_model
from rankfold.factorization import SiteMoments, predicted_loss
from rankfold.modules import CompensatedLinear, GroupLinear, LowRankLinear, QuantizedLinear, linear_at, matrix_of
from rankfold.plan import Option
from rankfold.quantization import compress_in_bits, fit, width_losses
from rankfold.sites import find_sites


@pytest.fixture(scope="module")
def made() -> tuple[Any, Any, Any, Any]:
    """A model from a configuration, its sites, batches and statistics."""
    model = tiny.build("llama")
    sites = find_sites(model).select()
    batches = make_batches(model, torch.randint(0, model.config.vocab_size, (8, 24)), 4)
    statistics = calibrate(model, sites, batches, loss=summed_loss(model, "text", 0))
    return model, sites, batches, statistics


def trusted(moments: SiteMoments) -> SiteMoments:
    """Moments of which what is sampling error does not count."""
    inputs, gradients = (part._replace(second=part.trusted) for part in (moments.inputs, moments.gradients))
    return moments._replace(inputs=inputs, gradients=gradients)


def losses_of(made: tuple[Any, Any, Any, Any]) -> dict[str, WidthLosses]:
    model, sites, _, statistics = made
    return {site.name: width_losses(matrix_of(linear_at(model, site.name))[0], statistics[site.name]) for site in sites}


def test_the_losses_of_every_rank_are_the_tail_of_one_spectrum(made: tuple[Any, Any, Any, Any]) -> None:
    model, sites, _, statistics = made
    site = sites[0]
    W, _ = matrix_of(linear_at(model, site.name))
    losses = width_losses(W, statistics[site.name])
    moments = trusted(statistics[site.name])

    def root(S: torch.Tensor) -> torch.Tensor:
        values, vectors = torch.linalg.eigh(S.double())
        return vectors * values.clamp(min=0).sqrt() @ vectors.T

    spectrum = torch.linalg.svdvals(root(moments.gradients.second) @ W.double() @ root(moments.inputs.second))
    tail = [0.5 * moments.share * float(spectrum[rank:].square().sum()) for rank in range(0, len(spectrum) + 1)]
    np.testing.assert_allclose(losses.low_rank, tail[::MULTIPLE], atol=1e-9)
    # More bits lose less, and a compensation lowers what is left.
    plain = [losses.rounded[width, 64][0] for width in (2, 3, 4, 5, 6, 8)]
    assert plain == sorted(plain, reverse=True)
    assert all((np.diff(curve) <= 1e-12).all() for curve in losses.rounded.values())


def test_the_knapsack_finds_what_trying_everything_finds(made: tuple[Any, Any, Any, Any]) -> None:
    _, sites, _, _ = made
    losses = losses_of(made)
    offered = width_options(sites[:3], losses)
    budget = Allowance(0.12, "bytes")
    limit = budget.limit(offered)
    best = min(
        sum(float(options.losses[place]) for options, place in zip(offered, places, strict=True))
        for places in itertools.product(*(range(len(options.shares)) for options in offered))
        if sum(options.bytes[place] for options, place in zip(offered, places, strict=True)) <= limit
    )
    found = knapsack(offered, budget)
    assert sum(option.bytes for option in found.options) <= limit
    assert found.bound <= best + 1e-12
    assert sum(option.loss for option in found.options) <= 1.15 * best


def test_a_shared_budget_is_never_predicted_worse_than_the_same_bits_everywhere(
    made: tuple[Any, Any, Any, Any],
) -> None:
    _, sites, _, _ = made
    losses = losses_of(made)
    dense = sum(site.parameters * site.bytes_per_parameter for site in sites)
    for row in uniform_widths(sites, losses):
        keep = row["bytes"] / dense * (1 + 1e-12)
        either = allocate(sites, keep=keep, losses=losses)
        bits = allocate(sites, keep=keep, losses=losses, allow=["bits"])
        assert either.bytes <= row["bytes"] and bits.bytes <= row["bytes"]  # noqa: PT018
        assert either.predicted_loss <= bits.predicted_loss * 1.001 <= row["loss"] * 1.002


@pytest.mark.parametrize(
    "option",
    [
        Option(sites=("x",), bits=3, group=16),
        Option(sites=("x",), form="low_rank", ranks=(8,), factor_bits=4),
        Option(sites=("x",), form="low_rank", ranks=(8,), factor_bits=8),
        Option(sites=("x",), form="low_rank", ranks=(8,)),
        Option(sites=("x",), form="compensated", ranks=(8,), bits=2, group=16, factor_bits=8),
    ],
)
def test_every_option_is_priced_as_it_is_stored(made: tuple[Any, Any, Any, Any], option: Option) -> None:
    model, sites, _, statistics = made
    name = sites[4].name
    W, _ = matrix_of(linear_at(model, name))
    moments = statistics[name]
    layer, matrix, loss = fit(W, moments, option, torch.float32)
    kinds = {"dense": GroupLinear, "low_rank": LowRankLinear, "compensated": CompensatedLinear}
    assert type(layer) is kinds[option.form]
    x = torch.randn(5, W.shape[1])
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ matrix.T, atol=1e-4, rtol=1e-4)
    assert loss == pytest.approx(predicted_loss(W, matrix, trusted(moments)))
    if option.form == "compensated":
        alone = fit(W, moments, Option(sites=("x",), bits=2, group=16), torch.float32)
        assert loss < alone.loss


def test_rounding_the_factors_costs_what_the_options_say(made: tuple[Any, Any, Any, Any]) -> None:
    from rankfold.allocation.widths import ROUNDING

    model, sites, _, statistics = made
    for site in sites[:7]:
        W, _ = matrix_of(linear_at(model, site.name))
        moments = statistics[site.name]
        whole = predicted_loss(W, torch.zeros_like(W), trusted(moments))
        losses = {}
        for bits in (None, 4, 8):
            option = Option(sites=("x",), form="low_rank", ranks=(8,), factor_bits=bits)
            losses[bits] = fit(W, moments, option, torch.float32).loss
        held = whole - losses[None]
        assert losses[8] - losses[None] < 4 * ROUNDING[8] * held
        assert losses[4] - losses[None] < 4 * ROUNDING[4] * held


def carried_out(folder: Path, **budget: Any) -> tuple[Any, Any, Any]:
    """A model from a folder, compressed by the front door and saved; what was read, the plan and the model."""
    source = folder / "dense"
    tiny.build("llama").save_pretrained(source)
    model = load_model(source)
    windows = torch.randint(0, model.config.vocab_size, (8, 24), generator=torch.Generator().manual_seed(0))
    plan = rankfold.compress(model, text=windows, batch_size=4, **budget)
    rankfold.save(model, None, folder / "out")
    return windows, plan, model


@pytest.mark.parametrize("allow", ["rank", "bits", "rank,bits"])
def test_a_checkpoint_holds_the_bytes_of_its_plan_and_loads_elsewhere(tmp_path: Path, allow: str) -> None:
    windows, plan, model = carried_out(tmp_path, bits=3.5 if allow != "rank" else 10, allow=allow, rounds=0)
    ids = windows[:2]
    with torch.no_grad():
        expected = model(ids).logits
        loaded = load_model(tmp_path / "out")
        torch.testing.assert_close(loaded(ids).logits, expected)
        export_dense(load_model(tmp_path / "out"), None, tmp_path / "flat")
        flat = load_model(tmp_path / "flat")
        assert not any(isinstance(module, QuantizedLinear) for module in flat.modules())
        torch.testing.assert_close(flat(ids).logits, expected, atol=1e-3, rtol=1e-3)
    if allow != "rank":
        layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
        assert sum(layer.stored_bytes for layer in layers) == plan.bytes
        weights = sum(
            site.out_features * site.in_features for site in find_sites(load_model(tmp_path / "dense")).select()
        )
        assert 8 * plan.bytes / weights <= 3.5
    code = (
        "import sys, torch, transformers\n"
        "load = transformers.AutoModelForCausalLM.from_pretrained\n"
        f"model = load({str(tmp_path / 'out')!r}, trust_remote_code=True)\n"
        "assert 'rankfold' not in sys.modules\n"
        f"logits = model(torch.tensor({ids.tolist()})).logits\n"
        f"torch.save(logits, {str(tmp_path / 'logits.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-I", "-c", code], check=True, cwd=tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected)


def test_rounds_and_biases_and_reported_losses(tmp_path: Path) -> None:
    source = tmp_path / "dense"
    tiny.build("qwen2").save_pretrained(source)
    model = load_model(source)
    windows = torch.randint(0, model.config.vocab_size, (8, 24), generator=torch.Generator().manual_seed(0))
    plan = rankfold.compress(model, text=windows, batch_size=4, bits=3, rounds=1)
    assert plan.calibration["rounds"] == 1 and plan.calibration["allow"] == "rank,bits"  # noqa: PT018
    assert [row["bits"] for row in plan.calibration["uniform"]] == [2, 3, 4, 5, 6, 8]
    assert plan.predicted_loss > 0 and not math.isnan(plan.predicted_loss)  # noqa: PT018
    rankfold.save(model, None, tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["rankfold"]
    assert stored["plan_version"] == 3
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "out")(windows).logits, model(windows).logits)


def test_budgets_out_of_reach_and_settings_that_contradict_are_told_before_the_work(tmp_path: Path) -> None:
    tiny.build("llama").save_pretrained(tmp_path / "dense")
    windows = torch.randint(0, 16, (8, 24))

    def attempt(message: str, **choices: Any) -> None:
        with pytest.raises(ValueError, match=message):
            rankfold.compress(load_model(tmp_path / "dense"), text=windows, **choices)

    attempt(r"must allow at least .* the cost of the smallest option", bits=0.01)
    attempt(r"`bits` is an average per weight and must lie in \(0, 16\], but got 40", bits=40)
    attempt("`bytes` and `bits`", bits=3, bytes="1MB")
    attempt("`allow` must name rank or bits", bits=3, allow="width")
    attempt("Bits are shared out by the predicted losses of kfac", bits=3, allow="bits", method="svd")
    attempt("A `rank` leaves no budget over bits", rank=4, allow="rank,bits")


def test_sites_that_nothing_reaches_stay_dense_and_what_is_not_finite_is_named(made: tuple[Any, Any, Any, Any]) -> None:
    _, sites, _, _ = made
    losses = losses_of(made)
    left = sites[0].name
    plan = allocate(sites, keep=0.3, losses={name: part for name, part in losses.items() if name != left})
    option = next(option for option in plan.options if left in option.sites)
    assert not option.changes and "no calibration token" in option.note  # noqa: PT018
    broken = tiny.build("llama")
    with torch.no_grad():
        linear_at(broken, sites[3].name).weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"finite"):
        rankfold.compress(broken, text=torch.randint(0, 16, (8, 24)), bits=3)


def test_experts_of_one_stack_get_one_option(tmp_path: Path) -> None:
    tiny.build("mixtral").save_pretrained(tmp_path / "dense")
    model = load_model(tmp_path / "dense")
    windows = torch.randint(0, model.config.vocab_size, (8, 24), generator=torch.Generator().manual_seed(0))
    plan = rankfold.compress(model, text=windows, batch_size=4, bits=4, rounds=0)
    stacked = [option for option in plan.options if len(option.sites) > 1]
    # In transformers 4 each expert is a module.
    assert stacked or transformers.__version__.startswith("4.")
    rankfold.save(model, None, tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "out")(windows).logits, model(windows).logits)


def test_moments_of_nothing_are_no_reason_to_fail() -> None:
    W = torch.randn(8, 16)
    moments = SiteMoments()
    with pytest.raises(AssertionError):
        width_losses(W, moments)


def test_compress_in_bits_leaves_layers_that_it_keeps_as_they_are(made: tuple[Any, Any, Any, Any]) -> None:
    model = tiny.build("llama")
    sites = find_sites(model).select()
    batches = make_batches(model, torch.randint(0, model.config.vocab_size, (4, 16)), 4)
    before = model(batches[0]["input_ids"]).logits.detach()
    compress_in_bits(
        model, sites, batches, loss=summed_loss(model, "text", 0),
        allocate=lambda losses: allocate(sites, keep=1.0, losses=losses), drift=0.0,
    )  # fmt: skip
    torch.testing.assert_close(model(batches[0]["input_ids"]).logits, before)
