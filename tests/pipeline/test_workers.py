"""Workers of a Ray cluster share one compression: the same model as one process makes, also when a machine is lost."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import rankfold
from rankfold.calibration import calibrate_blocks, make_batches, observed_blocks, summed_loss
from rankfold.checkpoint import load_model
from rankfold.circumstances import versions
from rankfold.modules import linear_at
from rankfold.pipeline.workers import Job, _observed
from rankfold.sites import find_sites


def windows(count: int) -> torch.Tensor:
    return torch.randint(3, 120, (count, 16), generator=torch.Generator().manual_seed(0))


def test_what_shares_of_the_text_show_adds_up() -> None:
    model = tiny.build("llama")
    sites = find_sites(model).select()
    batches = make_batches(model, windows(12), 2)
    loss = summed_loss(model)
    whole = {n: m for block in calibrate_blocks(model, sites, batches, loss=loss) for n, m in block.moments.items()}
    shares = [dict(_observers(model, sites, batches[start::3], loss)) for start in range(3)]
    for names, observer in shares[0].items():
        for other in shares[1:]:
            observer.add(other[names])
        for name, found in observer.moments().items():
            expected = whole[name]
            assert found.share == expected.share
            for side in ("inputs", "gradients"):
                a, b = getattr(found, side), getattr(expected, side)
                assert a.vectors == b.vectors
                torch.testing.assert_close(a.second, b.second)
                torch.testing.assert_close(a.mean, b.mean)
                assert (a.spread, a.fourth) == pytest.approx((b.spread, b.fourth))


def _observers(model: Any, sites: Any, batches: Any, loss: Any) -> Iterator[tuple[Any, Any]]:
    for _, observer in observed_blocks(model, sites, batches, loss=loss):
        yield observer.names, observer


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A cluster of two machines, as far as Ray knows, and the one that may be lost."""
    pytest.importorskip("ray", reason="needs rankfold[ray]")
    import ray
    from ray.cluster_utils import Cluster

    # Ray starts workers at a low priority, and the other tests would have them wait.
    os.environ.setdefault("RAY_worker_niceness", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        yield cluster, second
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("workers") / "model"
    tiny.build("llama").save_pretrained(place)
    return place


def same(a: Any, b: Any) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.allclose(left[n].float(), right[n].float()) for n in left)


def test_two_machines_make_the_model_that_one_process_makes(nodes: Any, folder: Path) -> None:
    cluster, _ = nodes
    for budget in ({"keep": 0.6}, {"bits": 4.5}):
        models = []
        for choices in ({}, {"workers": 3, "ray": cluster.address}):
            model = load_model(folder)
            rankfold.compress(model, text=windows(24), batch_size=4, **budget, **choices)
            models.append(model)
        assert same(*models)
    model = load_model(folder)
    with pytest.raises(ValueError, match="4 workers need one each"):
        rankfold.compress(model, keep=0.6, text=windows(24), batch_size=4, workers=4, ray=cluster.address)
    with pytest.raises(ValueError, match=r"Each of 3 workers .* there are 2"):
        rankfold.compress(model, keep=0.6, text=windows(8), batch_size=4, workers=3, ray=cluster.address)
    with pytest.raises(ValueError, match="'svd' does not factorize"):
        rankfold.compress(model, keep=0.6, method="svd", workers=2)
    for choices in ({"ray": cluster.address}, {"workers": 2, "nested": True}):
        with pytest.raises(ValueError, match=r"used by `workers`"):
            rankfold.compress(model, keep=0.6, text=windows(24), **choices)
    with torch.no_grad():
        linear_at(model, "model.layers.0.mlp.up_proj").weight.mul_(2)
    with pytest.raises(ValueError, match=r"A worker failed: .*other weights than the model that was given"):
        rankfold.compress(model, keep=0.6, text=windows(24), batch_size=4, workers=2, ray=cluster.address)


def test_a_machine_is_lost_in_the_middle(nodes: Any, folder: Path) -> None:
    cluster, second = nodes
    alone, shared = load_model(folder), load_model(folder)
    rankfold.compress(alone, keep=0.6, text=windows(24), batch_size=4)
    lost = []

    def stage(title: str, steps: int) -> Any:
        def step() -> None:
            if not lost:
                lost.append(second)
                cluster.remove_node(second, allow_graceful=False)

        return step

    choices: dict[str, Any] = {"workers": 3, "ray": cluster.address, "stage": stage}
    rankfold.compress(shared, keep=0.6, text=windows(24), batch_size=4, **choices)
    assert lost
    assert same(alone, shared)


def test_a_worker_of_another_version_is_refused(folder: Path) -> None:
    other = {**versions(), "torch": "1.0"}
    job = Job(
        source=str(folder), digest="", versions=other, dtype=torch.float32, device="cpu", names=(), labels="text",
        seed=0, memory=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"same versions, but torch is .* here and 1.0 where"):
        next(iter(_observed(job, 0, [])))
