"""A model that memory does not hold: some of it stays on disk, and it is measured as the whole one is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate.utils.modeling
import pytest
import torch
import transformers.integrations.accelerate
import transformers.modeling_utils

import rankfold
from rankfold.checkpoint import load_model
from rankfold.measurement import measure

pytestmark = pytest.mark.skipif(
    transformers.__version__.startswith("4."), reason="transformers 4 leaves weights of these checkpoints on no disk"
)


@pytest.fixture(scope="module")
def small(shallow: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, tokenizer = rankfold.load(shallow)
    rankfold.compress(model, tokenizer, keep=0.6, method="svd")
    return rankfold.save(model, tokenizer, tmp_path_factory.mktemp("spread") / "small")


@pytest.mark.parametrize("room", [10_000, 400_000])
@pytest.mark.parametrize("which", ["dense", "small"])
def test_what_memory_does_not_hold_stays_on_disk(
    which: str, room: int, small: Path, shallow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = small if which == "small" else shallow
    whole = load_model(source)
    for place in (accelerate.utils.modeling, transformers.integrations.accelerate, transformers.modeling_utils):
        monkeypatch.setattr(place, "get_max_memory", lambda *given, **named: {"cpu": room}, raising=False)
    model = load_model(source, device="spread")
    assert "disk" in model.hf_device_map.values()
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, whole(input_ids=ids).logits)
    options: dict[str, Any] = {"text": "bundled:python-held-out", "windows": 2, "length": 64, "prompt": 8}
    found = measure({"whole": whole, "spread": model}, rankfold.load(source)[1], **options)
    losses = {record.subject: record.value for record in found if record.name == "loss" and not record.is_difference}
    assert losses["whole"] == losses["spread"]
    with pytest.raises(ValueError, match="measured as it is but not compressed"):
        rankfold.compress(model, keep=0.6, method="svd")
