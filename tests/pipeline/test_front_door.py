"""The front door as the design writes it, and a notebook of eight lines that does the main job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import ROOT

import rankfold
from rankfold.calibration import make_batches
from rankfold.sites import find_sites


def test_the_notebook_does_the_main_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = json.loads((ROOT / "examples" / "eight_lines.ipynb").read_text())
    lines = [line.rstrip("\n") for cell in notebook["cells"] if cell["cell_type"] == "code" for line in cell["source"]]
    lines = [line for line in lines if line]
    assert len(lines) <= 8
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    for line in lines:
        # One statement a line, as a reader runs them; the model is the one of the checkout.
        exec(line.replace("models/pycode-llama", str(ROOT / "models" / "pycode-llama")), space)
    assert (tmp_path / "small" / "model.safetensors").is_file()
    assert (tmp_path / "report.html").is_file()
    assert isinstance(space["plan"], rankfold.Plan)


def test_the_seven_verbs_do_the_same_in_steps(bundled: Path, tmp_path: Path) -> None:
    model, tokenizer = rankfold.load(bundled, dtype=torch.float32)
    dense, _ = rankfold.load(bundled, dtype=torch.float32)
    batches = [
        {"input_ids": torch.randint(3, 500, (4, 32), generator=torch.Generator().manual_seed(n))} for n in (1, 2)
    ]
    sites = rankfold.find_sites(model).select()
    statistics = rankfold.calibrate(model, sites, batches)
    plan = rankfold.allocate(sites, statistics, keep=0.8)
    assert (plan.method, plan.allocation) == ("kfac", "knapsack")
    rankfold.factorize(model, plan, statistics)
    recovered = rankfold.recover(model, dense, batches, steps=2, batch_size=2)
    assert recovered.steps == 2
    records = rankfold.measure(model, tokenizer, text=["bundled:python-held-out"], windows=4, length=32, latency=False)
    assert isinstance(records, rankfold.Records)
    assert {record.name for record in records} >= {"loss", "perplexity", "parameters"}
    page = rankfold.report(records, tmp_path / "page.html")
    assert "perplexity" in page.read_text()
    rankfold.save(model, tokenizer, tmp_path / "out")
    again, _ = rankfold.load(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(again(**batches[0]).logits, model.eval()(**batches[0]).logits)


def test_the_steps_in_one_round_are_the_call_in_one_round() -> None:
    ids = torch.randint(3, 100, (16, 12), generator=torch.Generator().manual_seed(0))
    at_once, in_steps = tiny.build("llama"), tiny.build("llama")
    made = rankfold.compress(at_once, keep=0.6, text=ids, rounds=0, drift=0.0)
    sites = rankfold.find_sites(in_steps).select()
    statistics = rankfold.calibrate(in_steps, sites, [{"input_ids": ids[:8]}, {"input_ids": ids[8:]}])
    plan = rankfold.factorize(in_steps, rankfold.allocate(sites, statistics, keep=0.6), statistics)
    assert [(o.sites, o.form, o.ranks) for o in plan.options] == [(o.sites, o.form, o.ranks) for o in made.options]
    with torch.no_grad():
        torch.testing.assert_close(in_steps.eval()(ids).logits, at_once.eval()(ids).logits)


def test_nouns_show_themselves_as_short_tables() -> None:
    model = tiny.build("llama")
    sites = rankfold.find_sites(model).select()
    assert repr(sites).splitlines()[:2] == [
        "14 sites, 25,088 parameters",
        "  self_attn.q_proj" + " " * 20 + "2 x 32 x 32",
    ]
    assert "left out: 1 x an embedding" in repr(sites)
    plan = rankfold.compress(model, keep=0.6, text=torch.randint(3, 100, (8, 12)))
    shown = repr(plan)
    assert shown.startswith("Plan: kfac, knapsack, keep 0.6: ")
    assert "model.layers.*.mlp.down_proj" in shown
    assert len(shown.splitlines()) < 20
    statistics = rankfold.calibrate(tiny.build("llama"), sites, [tiny.inputs(model)])
    assert repr(statistics).endswith("with gradients")


def test_a_plan_for_the_old_call_is_told_where_it_goes() -> None:
    model = tiny.build("llama")
    plan = rankfold.allocate(rankfold.find_sites(model).select(), keep=0.5, method="svd")
    with pytest.raises(ValueError, match=r"carried out by factorize\(model, plan, statistics\)"):
        rankfold.compress(model, plan)


def test_texts_come_in_every_shape(bundled: Path, tmp_path: Path) -> None:
    texts = [f"def function_{i}(x):\n    return x + {i}\n" for i in range(400)]
    (tmp_path / "text.txt").write_text("\n".join(texts))
    plans = []
    for text in (tmp_path / "text.txt", str(tmp_path / "text.txt"), texts):
        model, tokenizer = rankfold.load(bundled)
        plans.append(rankfold.compress(model, tokenizer, text=text, method="whitened", sequences=4, length=32))
    assert plans[0].calibration == plans[1].calibration
    assert plans[2].calibration["corpus"] == "texts given in Python"
    with pytest.raises(ValueError, match="Text needs the tokenizer of the model"):
        rankfold.compress(tiny.build("llama"), text="bundled:calibration")
    with pytest.raises(ValueError, match="must hold text, but got none"):
        rankfold.compress(tiny.build("llama"), tokenizer, text=[" "])


def test_one_place_puts_the_engine_together_one_makes_records_one_knows_linear_layers() -> None:
    """What the house promises of itself, looked up in its sources."""
    sources = {path: path.read_text() for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    programs = [path for path in sources if path.parts[-2] in ("benchmarks", "experiments", "examples")]
    assert [p.name for p in programs if "compress_in_rounds(" in sources[p]] == []
    house = [path for path in sources if (ROOT / "rankfold") in path.parents]

    def holding(what: str) -> set[str]:
        return {str(path.relative_to(ROOT / "rankfold")) for path in house if what in sources[path]}

    assert holding("compress_in_rounds(") == {"pipeline/run.py", "compression/rounds.py"}
    assert holding(" Record(") | holding("[Record(") | holding("(Record(") <= {"circumstances.py", "record.py"}
    assert holding('"hardware": ') == {"circumstances.py"}
    assert holding('"Conv1D"') == {"modules/linear.py"}


@pytest.mark.parametrize("method", ["svd", "lord", "tucker"])
def test_a_plan_is_carried_out_with_its_own_method_on_its_own_sites(method: str) -> None:
    ids = torch.randint(0, 128, (4, 16), generator=torch.Generator().manual_seed(0))
    sites = find_sites(tiny.build("llama")).select(["*.up_proj"])
    plan = rankfold.allocate(sites, rank=6, method=method)
    model = tiny.build("llama")
    done = rankfold.compress(model, plan=plan, text=ids)
    assert done.method == method
    assert [o.ranks for o in done.options] == [o.ranks for o in plan.options]
    untouched = {name for name, _ in tiny.build("llama").named_parameters() if "up_proj" not in name}
    assert untouched <= dict(model.named_parameters()).keys()
    steps = tiny.build("llama")
    needed = rankfold.calibrate(steps, sites, make_batches(steps, ids), method=method) if method == "lord" else None
    rankfold.factorize(steps, plan, needed)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, steps(ids).logits)
    with pytest.raises(ValueError, match=r"`plan` is filled by .*, but `method` is 'kfac'. Leave `method` out"):
        rankfold.compress(tiny.build("llama"), plan=plan, method="kfac", text=ids)


def test_sites_may_be_given_as_sites_and_windows_must_be_a_table() -> None:
    model = tiny.build("llama")
    ids = torch.randint(0, 128, (4, 16))
    chosen = [site for site in find_sites(model).select() if site.kind == "mlp.up_proj"]
    plan = rankfold.compress(model, keep=0.5, sites=chosen, text=ids, rounds=0)
    assert [name for option in plan.options for name in option.sites] == [site.name for site in chosen]
    with pytest.raises(ValueError, match=r"must be a table \(windows, length\).* got the shape \(16,\)"):
        rankfold.compress(tiny.build("llama"), keep=0.5, text=ids[0])


def test_statistics_serve_several_budgets_over_bits() -> None:
    ids = torch.randint(0, 128, (8, 16), generator=torch.Generator().manual_seed(0))
    model = tiny.build("llama")
    sites = find_sites(model).select()
    statistics = rankfold.calibrate(model, sites, make_batches(model, ids))
    for bits in (3, 5):
        again, alone = tiny.build("llama"), tiny.build("llama")
        plan = rankfold.compress(again, bits=bits, text=ids, statistics=statistics)
        assert plan.options == rankfold.compress(alone, bits=bits, text=ids).options
        with torch.no_grad():
            torch.testing.assert_close(again(ids).logits, alone(ids).logits)
    with pytest.raises(ValueError, match="Statistics are taken over by a budget over bits"):
        rankfold.compress(tiny.build("llama"), keep=0.5, text=ids, statistics=statistics)
    some = rankfold.calibrate(tiny.build("llama"), sites[:3], make_batches(model, ids))
    with pytest.raises(ValueError, match="the statistics must hold moments of inputs and gradients of every site"):
        rankfold.compress(tiny.build("llama"), bits=3, text=ids, statistics=some)
