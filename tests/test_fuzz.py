"""A thousand damaged configurations, indices, headers and corpora: an error of ours or a model, never a traceback."""

from __future__ import annotations

import copy
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankfold.calibration import load_corpus
from rankfold.checkpoint import load_model
from rankfold.errors import InputError

EXAMPLES = 250
"""For each of the four kinds."""

seen: Counter[str] = Counter()

anything = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats(-10, 10) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=4,
)
"""JSON of a few values; numbers stay small, since a model of any size is no damage."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint of two shards."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    tiny.build("llama").save_pretrained(folder, max_shard_size="60KB")
    assert (folder / "model.safetensors.index.json").exists()
    return folder


@pytest.fixture
def damaged(whole: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy that each example damages and mends."""
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    yield folder
    assert {path.name for path in tmp_path.iterdir()} <= {
        "model",
        "rows.jsonl",
        "rows.json",
        "rows.csv",
        "rows.jsonl.gz",
    }


def check(kind: str, work: Any) -> None:
    """Run what may end well or in an error of ours, which says something."""
    try:
        work()
        seen[f"{kind}, read"] += 1
    except InputError as error:
        seen[f"{kind}, refused" if len(str(error)) > 30 else "said nothing"] += 1


fuzz = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


def cut_or_changed(content: bytes, data: Any) -> bytes:
    """Bytes that were truncated, or some of them overwritten."""
    if data.draw(st.booleans()):
        return content[: data.draw(st.integers(0, max(0, len(content) - 1)))]
    result = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        result[data.draw(st.integers(0, min(len(result), 4096) - 1))] = data.draw(st.integers(0, 255))
    return bytes(result)


def changed(settings: dict[str, Any], data: Any) -> bytes:
    """JSON in which something was removed, replaced or added."""
    result = copy.deepcopy(settings)
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from(sorted(result)) if result else st.text(max_size=8))
        if data.draw(st.booleans()):
            result.pop(name, None)
        else:
            result[name] = data.draw(anything)
    return json.dumps(result).encode()


@fuzz
@given(data=st.data())
def test_damaged_configurations(damaged: Path, whole: Path, data: Any) -> None:
    content = (whole / "config.json").read_bytes()
    how = data.draw(st.integers(0, 2))
    made = cut_or_changed(content, data) if how == 0 else changed(json.loads(content), data)
    (damaged / "config.json").write_bytes(made)
    check("configuration", lambda: load_model(damaged))


@fuzz
@given(data=st.data())
def test_damaged_indices(damaged: Path, whole: Path, data: Any) -> None:
    name = "model.safetensors.index.json"
    content = (whole / name).read_bytes()
    index = json.loads(content)
    how = data.draw(st.integers(0, 3))
    if how == 0:
        made = cut_or_changed(content, data)
    elif how == 1:
        made = changed(index, data)
    else:
        made = json.dumps({**index, "weight_map": json.loads(changed(index["weight_map"], data))}).encode()
    (damaged / name).write_bytes(made)
    check("index", lambda: load_model(damaged))


@fuzz
@given(data=st.data())
def test_damaged_shards(damaged: Path, whole: Path, data: Any) -> None:
    shard = data.draw(st.sampled_from(sorted(path.name for path in whole.glob("*.safetensors"))))
    (damaged / shard).write_bytes(cut_or_changed((whole / shard).read_bytes(), data))
    check("shard", lambda: load_model(damaged))
    shutil.copyfile(whole / shard, damaged / shard)


@fuzz
@given(data=st.data())
def test_damaged_corpora(tmp_path: Path, data: Any) -> None:
    path = tmp_path / data.draw(st.sampled_from(["rows.jsonl", "rows.json", "rows.csv", "rows.jsonl.gz"]))
    rows = data.draw(st.lists(anything | st.fixed_dictionaries({"text": st.text(max_size=20)}), max_size=4))
    lines = "\n".join(json.dumps(row) for row in rows) if data.draw(st.booleans()) else json.dumps(rows)
    content = lines.encode()
    path.write_bytes(cut_or_changed(content, data) if content and data.draw(st.booleans()) else content)
    check("corpus", lambda: load_corpus(path).sha256)


def test_enough_was_damaged() -> None:
    """Most damage is noticed; what is not is a number that makes another valid model."""
    if sum(seen.values()) < 4 * EXAMPLES:
        pytest.skip("the kinds ran in other processes")
    assert "said nothing" not in seen
    assert sum(count for name, count in seen.items() if name.endswith("refused")) > EXAMPLES
