"""One kind of site at a time: each trial is the compression that it says, and a killed study goes on."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rankfold import allocate, calibrate, factorize, find_sites
from rankfold.calibration import load_corpus, make_batches, random_windows, token_stream
from rankfold.checkpoint import load_model, load_tokenizer
from rankfold.circumstances import Circumstances
from rankfold.cost import open_meter, relative_cost
from rankfold.exploration.sensitivity import GROUPS, STUDIES, measured_losses, run_trials, sensitivity_trials
from rankfold.measurement import evaluation_windows
from rankfold.plan import Plan
from rankfold.quality import next_token_quality, next_token_score
from rankfold.record import Record

CONTEXT = {"study": "s", "model": {"name": "m", "digest": None}}


class Subject:
    """A model, its sites, and what it is calibrated and scored on."""

    def __init__(self, folder: Path) -> None:
        self.model = load_model(folder, dtype=torch.float32)
        tokenizer = load_tokenizer(folder)
        stream = token_stream(tokenizer, load_corpus("bundled:calibration").texts)
        self.batches = make_batches(self.model, random_windows(stream, 8, 64, 0), 4)
        self.held_out: Tensor = evaluation_windows(tokenizer, load_corpus("bundled:python-held-out"), 64, 8)
        self.sites = find_sites(self.model).select()

    def run(self, trials, file: Path, **context) -> list[Record]:
        """The study's records."""
        return run_trials(
            self.model, self.sites, trials, self.batches, next_token_score(self.held_out), file=file,
            here=Circumstances({**CONTEXT, **context}), stage=lambda title, total: lambda: None,
        )  # fmt: skip


@pytest.fixture(scope="module")
def subject(bundled: Path) -> Subject:
    return Subject(bundled.parent / "pycode-starcoder")


def test_a_trial_is_the_compression_of_its_group_alone(subject: Subject, tmp_path: Path) -> None:
    trials = sensitivity_trials(subject.sites, method="whitened", shares=(0.25,))
    assert [trial.group for trial in trials] == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    before = subject.model(subject.held_out[:1]).logits
    records = subject.run(trials, tmp_path / "study.jsonl")
    torch.testing.assert_close(subject.model(subject.held_out[:1]).logits, before)
    model = load_model(subject.model.name_or_path, dtype=torch.float32)
    sites = [site for site in subject.sites if site.kind == "mlp.c_proj"]
    numbers = sum(p.numel() for p in model.parameters())
    dense = next_token_quality(model, subject.held_out).loss
    factorize(
        model, allocate(sites, rank=32, method="whitened"), calibrate(model, sites, subject.batches, method="whitened")
    )
    assert records[3].value == pytest.approx(next_token_quality(model, subject.held_out).loss - dense, abs=1e-5)
    assert records[3].context["removed"] == numbers - sum(p.numel() for p in model.parameters())


def test_ranks_past_break_even_are_measured_and_cost(subject: Subject, tmp_path: Path) -> None:
    (trial, *_) = sensitivity_trials(subject.sites, method="svd", shares=(1.0,))
    assert trial.removed < 0
    (record,) = subject.run([trial], tmp_path / "study.jsonl")
    assert record.value == pytest.approx(0.0, abs=1e-4)


def test_a_killed_study_goes_on_and_measures_nothing_twice(subject: Subject, tmp_path: Path) -> None:
    trials = sensitivity_trials(subject.sites, method="svd", shares=(0.5, 0.25), by="block")
    assert len(trials) == 2 * 4
    file = tmp_path / "study.jsonl"
    whole = subject.run(trials, file)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:5]) + lines[5][:40])
    assert [record.value for record in subject.run(trials, file)] == [record.value for record in whole]
    assert file.read_text().splitlines() == [line.rstrip("\n") for line in lines]


def test_records_of_another_study_are_refused(subject: Subject, tmp_path: Path) -> None:
    trials = sensitivity_trials(subject.sites, method="svd", shares=(0.5,))[:1]
    subject.run(trials, tmp_path / "study.jsonl")
    with pytest.raises(ValueError, match="another study"):
        subject.run(trials, tmp_path / "study.jsonl", study="other")
    (tmp_path / "other.jsonl").write_text('{"x": 1}\n')
    with pytest.raises(ValueError, match="not the records of a study"):
        subject.run(trials, tmp_path / "other.jsonl")


@pytest.mark.parametrize(("wrong", "message"), [({"method": "x"}, "'x'"), ({"by": "x"}, "kind or block"), ({"shares": (1.5,)}, "in \\[0, 1\\]")])  # fmt: skip  # noqa: E501
def test_what_cannot_be_studied_says_why(subject: Subject, wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sensitivity_trials(subject.sites, **wrong)


def test_measured_rises_become_ranks(subject: Subject) -> None:
    def record(group: str, share: float, rise: float) -> Record:
        return Record(subject="m", name="loss_rise", value=rise, unit="nat/token", context={"group": group, "share": share})  # fmt: skip  # noqa: E501

    costs = {"attn.c_attn": 1.0, "attn.c_proj": 1.0, "mlp.c_fc": 1.0, "mlp.c_proj": 0.01}
    records = [record(kind, share, c * (1 - share) ** 2 - 1e-4) for kind, c in costs.items() for share in (0.25, 0.5)]
    losses = measured_losses(records, subject.sites)
    assert set(losses) == {site.name for site in subject.sites}
    for site in subject.sites:
        curve = losses[site.name]
        assert len(curve) == min(site.out_features, site.in_features) + 1
        assert curve[-1] == 0
        assert all(a >= b for a, b in itertools.pairwise(curve))
        at_half = curve[len(curve) // 2] * sum(other.kind == site.kind for other in subject.sites)
        assert at_half == pytest.approx(costs[site.kind] * 0.25, abs=1e-3)
    plan: Plan = allocate(subject.sites, keep=0.8, method="whitened", allocation="knapsack", losses=losses)
    assert {site.kind for option in plan.factorized for site in subject.sites if site.name in option.sites} == {
        "mlp.c_proj"
    }
    full = [record("mlp.c_proj", 1.0, 0.5), *records]
    assert measured_losses(full, subject.sites) == losses
    with pytest.raises(ValueError, match="not measured"):
        measured_losses(records[:2], subject.sites)


def test_groups_cover_every_site(subject: Subject) -> None:
    for key in GROUPS.values():
        assert all(key(site) for site in subject.sites)
    trials = sensitivity_trials(subject.sites, by="block", shares=(0.5,))
    assert sum(len(trial.options) for trial in trials) == len(subject.sites)


def test_studies_of_distance_and_count_choose_blocks(subject: Subject) -> None:
    apart = STUDIES["distance"](subject.sites)
    assert [name.split(":")[0] for name in apart] == ["1 apart", "1 apart"]
    assert all(len({site.block for site in group}) == 3 for group in apart.values())
    counted = STUDIES["count"](subject.sites)
    assert [len({site.block for site in group}) for group in counted.values()] == [1, 2, 3, 4]
    (trial,) = sensitivity_trials(subject.sites, by="ranks", shares=(0.0,))
    assert {option.ranks for option in trial.options} == {(1,)}


def test_costs_of_a_trial_stand_beside_it(subject: Subject, tmp_path: Path) -> None:
    trials = sensitivity_trials(subject.sites, method="svd", by="ranks", shares=(0.25,))
    (record,) = run_trials(
        subject.model, subject.sites, trials, subject.batches, next_token_score(subject.held_out),
        file=tmp_path / "study.jsonl", here=Circumstances(CONTEXT), stage=lambda title, total: lambda: None,
        cost=partial(relative_cost, meter=open_meter(watts=10.0), rounds=2),
    )  # fmt: skip
    cost = record.context["cost"]
    assert 0.2 < cost["prefill_ratio"] < 5
    assert 0.2 < cost["energy_ratio"] < 5
    assert cost["energy_source"].startswith("estimate: 10 watts assumed")
