"""What waits on a shelf comes back as it was, from memory or from disk, and what goes wrong there is told."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny
import torch
from torch import Tensor

import rankfold
from rankfold.calibration import make_batches, summed_loss
from rankfold.calibration.moments import calibrate_blocks
from rankfold.errors import InputError
from rankfold.shelf import Shelf, _limits_of_groups
from rankfold.sites import find_sites


class Pair(NamedTuple):
    """Something made of tensors and a number."""

    first: Tensor
    second: Tensor | None
    number: float


def value() -> dict[str, Pair]:
    shared = torch.randn(3, 4, dtype=torch.float64)
    half = torch.randn(2, 5).to(torch.bfloat16).T
    return {"a": Pair(shared, half, 0.5), "b": Pair(shared, None, 2.0), "c": Pair(torch.tensor(7), half[:0], 0.0)}


@pytest.mark.parametrize("limit", [None, 10**6, 0])
def test_what_is_put_in_comes_back(limit: int | None) -> None:
    shelf, put = Shelf(limit), value()
    shelf["x"] = put
    found = shelf["x"]
    assert found.keys() == put.keys()
    for name, pair in put.items():
        assert found[name].number == pair.number
        for was, now in zip(pair[:2], found[name][:2], strict=True):
            assert (was is None) == (now is None)
            if was is not None:
                assert was.dtype == now.dtype
                assert torch.equal(was, now)
    # One tensor in two places is one again.
    assert found["a"].first.data_ptr() == found["b"].first.data_ptr()
    assert (shelf.folder is None) == (limit != 0)


def test_beyond_the_limit_values_lie_on_disk_and_the_folder_goes_with_the_shelf() -> None:
    shelf = Shelf(100)
    shelf["small"] = torch.ones(10)
    shelf["large"] = torch.ones(1000)
    assert shelf.bytes == 64
    folder = shelf.folder
    assert folder is not None
    assert [path.stat().st_size for path in folder.iterdir()] == [4032]
    shelf["large"] = torch.zeros(500)
    assert [path.stat().st_size for path in folder.iterdir()] == [2048]
    assert not shelf.pop("large").any()
    assert list(folder.iterdir()) == []
    assert list(shelf) == ["small"]
    del shelf
    assert not folder.exists()


def test_a_damaged_file_is_refused() -> None:
    shelf = Shelf(0)
    shelf["x"] = torch.ones(10)
    assert shelf.folder is not None
    (path,) = shelf.folder.iterdir()
    path.write_bytes(b"short")
    with pytest.raises(InputError, match=r"must stay as they are.*64 bytes, has 5"):
        shelf["x"]
    path.unlink()
    with pytest.raises(InputError, match="is gone"):
        shelf["x"]


def test_a_folder_that_is_gone_is_told() -> None:
    shelf = Shelf(0)
    shelf["x"] = torch.ones(10)
    assert shelf.folder is not None
    shutil.rmtree(shelf.folder)
    with pytest.raises(InputError, match="do not fit: 0 are free"):
        shelf["y"] = torch.ones(10)


def test_a_full_disk_is_told_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full, a disk that is always full")
    shelf = Shelf(0)
    full = tmp_path / "full.bin"
    full.symlink_to("/dev/full")
    monkeypatch.setattr(shelf, "_path", lambda: full)
    with pytest.raises(InputError, match=r"64 bytes more do not fit.*TMPDIR"):
        shelf["x"] = torch.ones(10)
    assert not full.is_symlink()
    assert len(shelf) == 0


@pytest.mark.parametrize("limit", [None, 10**6, 0])
def test_a_module_that_is_held_is_the_same_and_can_be_trained(limit: int | None) -> None:
    shelf, layer = Shelf(limit), torch.nn.Linear(5, 3).to(torch.bfloat16)
    layer.register_buffer("codes", torch.arange(7, dtype=torch.uint8))
    tied = torch.nn.ModuleList([layer, torch.nn.Linear(5, 3)])
    tied[1].weight = layer.weight
    before = {name: part.clone() for name, part in tied.state_dict().items()}
    assert shelf.hold(tied) is tied
    assert all(torch.equal(part, before[name]) for name, part in tied.state_dict().items())
    assert tied[1].weight is layer.weight
    # transformers copies what shares a storage when it saves.
    assert len({part.untyped_storage().data_ptr() for part in tied.state_dict().values()}) == 4
    # 15 + 3 + 3 numbers and 7 codes, each tensor from a multiple of 64 bytes on.
    assert shelf.bytes == (0 if limit == 0 else 256)
    assert shelf.folder is None or list(shelf.folder.iterdir()) == []
    folder = shelf.folder
    del shelf
    assert folder is None or not folder.exists()
    torch.optim.SGD(tied.parameters(), lr=1.0).step(lambda: layer(torch.ones(1, 5).to(torch.bfloat16)).sum().backward())
    assert torch.equal(layer.weight, before["0.weight"] - 1)


def test_a_module_that_is_dropped_leaves_room() -> None:
    shelf = Shelf(1000)
    shelf.hold(torch.nn.Linear(10, 10))
    assert shelf.bytes == 0
    kept = shelf.hold(torch.nn.Linear(10, 10))
    assert shelf.bytes == 512
    del kept
    assert shelf.bytes == 0


@pytest.mark.parametrize(
    ("line", "files", "expected"),
    [
        ("0::/a", {"a/memory.max": "500\n"}, [500]),
        ("0::/a", {"memory.max": "700"}, [700]),
        ("0::/a", {"a/memory.max": "max\n"}, []),
        ("4:cpu,cpuacct:/a\n3:memory:/b", {"memory/b/memory.limit_in_bytes": "900\n", "memory/a/x": "1"}, [900]),
        ("", {}, []),
    ],
)
def test_limits_of_control_groups_are_found(
    tmp_path: Path, line: str, files: dict[str, str], expected: list[int]
) -> None:
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text)
    (tmp_path / "own").write_text(line)
    assert _limits_of_groups(tmp_path / "root", tmp_path / "own") == expected
    assert _limits_of_groups(tmp_path / "root", tmp_path / "none") == []


def test_moments_are_the_same_whatever_the_memory() -> None:
    model = tiny.build("llama")
    sites = find_sites(model).select()
    batches = make_batches(model, torch.randint(0, model.config.vocab_size, (6, 16)), 2)
    loss = summed_loss(model)
    shelf = Shelf(0)
    for plain, shelved in zip(
        calibrate_blocks(model, sites, batches, loss=loss),
        calibrate_blocks(model, sites, batches, loss=loss, shelf=shelf),
        strict=True,
    ):
        assert plain.moments.keys() == shelved.moments.keys()
        for name, moments in plain.moments.items():
            for a, b in zip(moments[:3], shelved.moments[name][:3], strict=True):
                assert (a is None) == (b is None)
                assert a is None or torch.equal(a.second, b.second)
    assert len(shelf) == 0


@pytest.mark.parametrize("budget", [{"keep": 0.6, "effort": "best"}, {"keep": 0.6}, {"bits": 3.5}])
def test_a_compression_without_memory_for_results_gives_the_same_model(budget: dict[str, object]) -> None:
    ids = torch.randint(0, 128, (6, 16))
    weights = []
    for memory in ("1GB", 0):
        model = tiny.build("llama")
        rankfold.compress(model, text=ids, batch_size=2, memory=memory, **budget)  # type: ignore[arg-type]
        weights.append(model.state_dict())
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
