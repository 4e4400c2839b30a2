"""A compression that was interrupted goes on, does no site twice, and gives the bytes of an uninterrupted one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import rankfold
from rankfold.allocation import WidthLosses
from rankfold.factorization import METHODS, Moments, SiteMoments
from rankfold.journal import Journal
from rankfold.progress import Step


class KilledError(BaseException):
    """Stands for the end of a process."""


def dying(calls: int) -> Callable[[str, int], Step]:
    """A stage whose steps end the process at some point."""
    left = [calls]

    def stage(title: str, total: int) -> Step:
        def step(*_: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KilledError

        return step

    return stage


def compressed(
    work: Path | None, stage: Any = None, name: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any
) -> dict[str, torch.Tensor]:
    model = tiny.build(name).to(dtype)
    ids = torch.randint(0, 128, (6, 16), generator=torch.Generator().manual_seed(0))
    more = {} if stage is None else {"stage": stage}
    rankfold.compress(model, text=ids, batch_size=2, work=work, **more, **settings)
    return model.state_dict()


CASES: list[dict[str, Any]] = [
    {"keep": 0.6},
    {"keep": 0.6, "effort": "best"},
    {"keep": 0.6, "method": "whitened"},
    {"keep": 0.6, "method": "svd"},
    {"keep": 0.6, "allocation": "knapsack", "method": "whitened"},
    {"bits": 3.5},
    {"bits": 3.5, "effort": "best"},
    {"max_loss_increase": 0.5, "allow": "rank"},
]


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_it_gives_the_bytes_of_an_uninterrupted_run(settings: dict[str, Any], tmp_path: Path) -> None:
    expected = compressed(None, **settings)
    for calls in (2, 11, 17, 25, 40):
        try:
            found = compressed(tmp_path, dying(calls), **settings)
        except KilledError:
            continue
    found = compressed(tmp_path, **settings)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("sites", range(1, 9))
def test_killed_between_sites_that_read_one_input(sites: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = METHODS["kfac"]
    left = [sites]

    def dies(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KilledError
        assert method.ordered is not None
        return method.ordered(*arguments)

    # Narrow keys and values: alone their outputs would be measured, beside the queries their input is.
    asked: dict[str, Any] = {"name": "llama_gqa", "dtype": torch.bfloat16, "keep": 0.6}
    expected = compressed(None, **asked)
    with monkeypatch.context() as patched:
        patched.setitem(METHODS, "kfac", method._replace(ordered=dies))
        with pytest.raises(KilledError):
            compressed(tmp_path, **asked)
    found = compressed(tmp_path, **asked)
    assert all(torch.equal(found[part], expected[part]) for part in expected)


@pytest.mark.parametrize(("name", "calls"), [("kfac", 10), ("svd", 7), ("whitened", 7)])
def test_no_site_is_worked_out_twice(name: str, calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = METHODS[name]
    worked: list[int] = []

    field = "ordered" if name == "kfac" else "factorize"

    def counted(*arguments: Any) -> Any:
        worked.append(1)
        return getattr(method, field)(*arguments)

    monkeypatch.setitem(METHODS, name, method._replace(**{field: counted}))
    with pytest.raises(KilledError):
        compressed(tmp_path, dying(calls), method=name)
    before = len(worked)
    assert before > 0
    compressed(tmp_path, method=name)
    assert len(worked) == 14
    compressed(tmp_path, method=name)
    assert len(worked) == 14


def test_another_model_text_or_budget_begins_anew(tmp_path: Path) -> None:
    compressed(tmp_path, keep=0.6)
    first = set(tmp_path.iterdir())
    compressed(tmp_path, keep=0.5)
    assert len(set(tmp_path.iterdir()) - first) == 1


def test_a_journal_gives_back_what_was_put_in(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", Moments, SiteMoments, WidthLosses)
    x = torch.randn(4, 4, dtype=torch.float64)
    value = SiteMoments(Moments(3, x[0], x, 0.1, None, float("inf")), None, None, 0.5)
    symmetric = x @ x.T
    symmetric += symmetric.T.clone()
    losses = WidthLosses(x[0].numpy(), {(2, 64): x[1].numpy()})
    journal["a"], journal["b"], journal["c"] = value, (losses, None, "text", True), symmetric
    again = Journal(tmp_path / "j", Moments, SiteMoments, WidthLosses)
    assert set(again) == {"a", "b", "c"}
    assert len(again) == 3
    assert torch.equal(again["c"], symmetric)
    del again["c"]
    found = again["a"]
    assert torch.equal(found.inputs.second, x)
    assert found.inputs[0] == 3
    assert found.inputs[3:] == (0.1, None, float("inf"))
    assert found[1:] == (None, None, 0.5, None)
    assert (again["b"][0].rounded[2, 64] == losses.rounded[2, 64]).all()
    assert again["b"][1:] == (None, "text", True)
    with pytest.raises(KeyError):
        again["c"]
    with pytest.raises(TypeError, match="a journal takes tensors"):
        again["c"] = object()


def test_a_damaged_file_counts_as_not_there(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal["a"] = torch.ones(100)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-8])
    assert "a" not in journal
    assert list(journal) == []
    journal["a"] = torch.zeros(2)
    assert torch.equal(journal["a"], torch.zeros(2))
    del journal["a"]
    assert len(journal) == 0


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(rankfold.InputError, match="an interrupted run resumes; it could not be written"):
        Journal(tmp_path / "file" / "x")["a"] = torch.ones(1)
