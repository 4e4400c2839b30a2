"""Every architecture: exact at full rank, compressed, saved, loaded in all the ways, generating, exported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModel

from rankfold import Option, Plan, Sites, allocate, calibrate, factorize, find_sites
from rankfold.architectures import release
from rankfold.checkpoint import export_dense, load_model, save
from rankfold.compression import factorize_blocks
from rankfold.modules import FactorizedLinear, linear_at

DECODERS = [name for name in tiny.ARCHITECTURES if name not in {"bert_masked", "bert_classifier", "roberta"}]


def full_rank_plan(sites: Sites, form: str) -> Plan:
    """A plan that loses nothing."""
    options = []
    for site in sites:
        rank = min(site.out_features, site.in_features)
        ranks = (rank,) if form == "low_rank" else (rank, rank)
        options.append(Option(sites=(site.name,), form=form, ranks=ranks, bias=site.bias))
    return Plan(options=tuple(options), method="svd" if form == "low_rank" else "tucker")


def logits(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(**(inputs or tiny.inputs(model))).logits
    return result


@pytest.mark.parametrize("form", ["low_rank", "tucker"])
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_full_rank_is_exact(name: str, form: str) -> None:
    model = tiny.build(name, torch.float64)
    expected = logits(model)
    sites = find_sites(model)
    factorize(model, full_rank_plan(sites, form))
    assert all(isinstance(linear_at(model, site.name), FactorizedLinear) for site in sites)
    torch.testing.assert_close(logits(model), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_compressed_saved_loaded_and_generating(name: str, tmp_path: Path) -> None:
    model = tiny.build(name)
    sites = find_sites(model).select()
    batches = [tiny.inputs(model, length=16, batch=4, seed=seed) for seed in range(4)]
    before = sum(parameter.numel() for parameter in model.parameters())
    plan = factorize_blocks(model, allocate(sites, keep=0.6, method="whitened"), sites, batches)
    after = sum(parameter.numel() for parameter in model.parameters())
    assert before - after == sum(site.parameters for site in sites) - plan.parameters > 0
    expected = logits(model)

    save(model, None, tmp_path / "out")
    loaded = tiny.auto_class(model).from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert type(loaded) is type(model)
    assert Plan.from_dict(loaded.config.rankfold) == plan
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(load_model(tmp_path / "out")), expected)
    AutoModel.from_pretrained(tmp_path / "out")

    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load_model(tmp_path / "again")), expected)
    if name in DECODERS:
        ids = tiny.inputs(model)["input_ids"]
        assert loaded.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape[1] >= 3

    export_dense(loaded, None, tmp_path / "dense")
    dense = load_model(tmp_path / "dense")
    assert type(dense) is type(tiny.build(name))
    torch.testing.assert_close(logits(dense), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_the_walk_measures_what_the_layers_read(name: str) -> None:
    """Against hooks on an ordinary forward pass, all layers at once, nothing shared, in float64."""
    model = tiny.build(name, torch.float64)
    sites = find_sites(model)
    batches = [tiny.inputs(model, seed=seed) for seed in range(3)]
    statistics = calibrate(model, sites, batches, method="whitened")
    reads: dict[str, list[torch.Tensor]] = {site.name: [] for site in sites}
    writes: dict[str, list[torch.Tensor]] = {site.name: [] for site in sites}
    for site in sites:

        def watch(_: Any, args: Any, output: torch.Tensor, name: str = site.name) -> None:
            reads[name].append(args[0].flatten(0, -2).clone())
            writes[name].append(output.flatten(0, -2).clone())  # Falcon adds to it in place

        linear_at(model, site.name).register_forward_hook(watch)
    for batch in batches:
        logits(model, **batch)
    for site in sites:
        moments = statistics[site.name]
        measured, seen = (moments.inputs, reads) if moments.inputs else (moments.outputs, writes)
        assert measured is not None
        rows = torch.cat(seen[site.name]).double() if seen[site.name] else torch.zeros(0, len(measured.mean)).double()
        assert measured.vectors == len(rows)
        if len(rows):
            torch.testing.assert_close(measured.second, rows.T @ rows / len(rows), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(measured.mean, rows.mean(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "t5"])
def test_released_models_are_the_stock_ones_again(name: str) -> None:
    model = tiny.build(name, torch.float64)
    expected, stock = logits(model), type(model)
    factorize(model, full_rank_plan(find_sites(model), "low_rank"))
    release(model)
    assert type(model) is stock
    assert not hasattr(model.config, "rankfold")
    torch.testing.assert_close(logits(model), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert_masked"])
def test_added_biases_survive_the_dense_export(name: str, tmp_path: Path) -> None:
    """LoRD gives every layer a bias; Llama has a place for them once its configuration says so."""
    model = tiny.build(name)
    sites = find_sites(model).select(["mlp.down_proj"] if name == "llama" else [])
    batches = [tiny.inputs(model, length=16, batch=4, seed=seed) for seed in range(4)]
    factorize_blocks(model, allocate(sites, keep=0.6, method="lord"), sites, batches)
    expected = logits(model)
    export_dense(model, None, tmp_path / "dense")
    torch.testing.assert_close(logits(load_model(tmp_path / "dense")), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gemma", "qwen3_moe"])
def test_biases_without_a_place_are_an_error_and_leave_the_model_as_it_was(name: str, tmp_path: Path) -> None:
    model = tiny.build(name)
    sites = find_sites(model).select()
    batches = [tiny.inputs(model, length=32, batch=8, seed=seed) for seed in range(4)]
    factorize_blocks(model, allocate(sites, keep=0.6, method="lord"), sites, batches)
    expected = logits(model)
    with pytest.raises(ValueError, match=r"no place for the biases.*such as whitened"):
        export_dense(model, None, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
    assert torch.equal(logits(model), expected)


WITHOUT_RANKFOLD = """
import sys, torch, transformers
assert "rankfold" not in sys.modules
folder, class_name = sys.argv[1:3]
inputs = torch.load(sys.argv[3], weights_only=True)
auto = getattr(transformers, class_name)
try:
    auto.from_pretrained(folder)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise SystemExit("loaded without any code: the weights are random")
model = auto.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
with torch.no_grad():
    expected = torch.load(sys.argv[4], weights_only=True)
    assert torch.equal(model(**inputs).logits, expected)
    base = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    model.save_pretrained(folder + "-again")
    again = auto.from_pretrained(folder + "-again", trust_remote_code=True, dtype="auto").eval()
    assert torch.equal(again(**inputs).logits, expected)
assert "rankfold" not in sys.modules
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama_gqa", "gpt_bigcode", "bert_classifier", "t5", "mamba", "qwen3_moe"])
def test_loads_where_rankfold_is_not_installed(name: str, tmp_path: Path) -> None:
    model = tiny.build(name)
    method = "tucker" if name == "llama_gqa" else "svd"
    factorize(model, allocate(find_sites(model).select(), keep=0.6, method=method))
    save(model, None, tmp_path / "out")
    inputs = tiny.inputs(model)
    torch.save(inputs, tmp_path / "inputs.pt")
    torch.save(logits(model), tmp_path / "expected.pt")
    (tmp_path / "check.py").write_text(WITHOUT_RANKFOLD)
    arguments = [str(tmp_path / "out"), tiny.auto_class(model).__name__]
    arguments += [str(tmp_path / "inputs.pt"), str(tmp_path / "expected.pt")]
    run = subprocess.run(
        [sys.executable, str(tmp_path / "check.py"), *arguments],
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
