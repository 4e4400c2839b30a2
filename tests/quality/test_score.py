"""What studies and searches compare: one number an item, as a plain computation gives it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import asset
from tiny import build
from transformers import BertConfig, BertForMaskedLM

from rankfold.calibration import masked_batches
from rankfold.checkpoint import load_model, load_tokenizer
from rankfold.circumstances import Circumstances
from rankfold.measurement import measure_score, scorer_for
from rankfold.quality import ChoiceItems, choose, masked_score, mistake_score, next_token_quality, next_token_score
from rankfold.quality.classification import Labelled


def test_next_token_scores_are_the_losses_of_the_windows(bundled: Path) -> None:
    model = load_model(bundled, dtype=torch.float32)
    windows = torch.randint(3, 200, (3, 16))
    found = next_token_score(windows)(model)
    with torch.no_grad():
        chances = model(input_ids=windows).logits.double().log_softmax(-1)
    expected = [
        -sum(float(row[place, ids[place + 1]]) for place in range(15)) / 15
        for row, ids in zip(chances, windows, strict=True)
    ]
    assert list(found.values) == pytest.approx(expected, rel=1e-5)
    assert found.mean == pytest.approx(sum(expected) / 3, rel=1e-5)


def test_masked_scores_are_the_losses_at_the_masks() -> None:
    model = build("bert_masked")
    ids = torch.randint(4, 100, (4, 12))
    (batch,) = masked_batches([{"input_ids": ids}], mask_token=3, seed=1)
    found = masked_score([batch])(model)
    expected = []
    for row, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        places = (labels != -100).nonzero().flatten().tolist()
        if places:
            chances = model(input_ids=row[None]).logits[0].log_softmax(-1)
            expected.append(-sum(float(chances[place, labels[place]]) for place in places) / len(places))
    assert list(found.values) == pytest.approx(expected, abs=1e-5)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="must be finite"):
        masked_score([batch])(model)


def test_mistakes_are_the_rows_that_are_wrong() -> None:
    class Tokenizer:
        def __call__(self, texts, **_):
            class Encoded(dict):
                def to(self, device):
                    return self

            return Encoded(x=torch.tensor([[float(text)] for text in texts]))

    class Model(torch.nn.Linear):
        def forward(self, x):
            return SimpleNamespace(logits=torch.cat([-x, x], 1))

    found = mistake_score(Tokenizer(), Labelled(["1", "-1", "2"], [1, 1, 0]))(Model(1, 1))
    assert found.values == (0.0, 1.0, 1.0)


def test_a_masked_model_is_measured_by_its_own_objective(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(asset("weights/all-MiniLM-L6-v2"))
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    models = {"dense": BertForMaskedLM(config).eval(), "other": BertForMaskedLM(config).eval()}
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "a quiet day at the sea, and nothing to do " * 40}) + "\n")
    found = measure_score(models, tokenizer, str(tmp_path / "t.jsonl"), length=32, windows=4, here=Circumstances({}))
    assert [(r.subject, r.name, r.is_difference) for r in found] == [
        ("dense", "masked_loss", False), ("other", "masked_loss", False), ("other", "masked_loss", True),
    ]  # fmt: skip
    assert found[1].value - found[0].value == pytest.approx(found[2].value)
    with pytest.raises(ValueError, match="has no next-token or masked-token loss"):
        scorer_for(build("bert_classifier"), tokenizer, text=str(tmp_path / "t.jsonl"), length=8, windows=2)


def test_likelihood_alone_is_taken_off_where_it_misleads() -> None:
    """A model that likes one token whatever comes before chooses it by likelihood, and not beyond it."""

    class Liking(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids):
            logits = torch.zeros(*input_ids.shape, 8)
            logits[..., 7] = 3.0
            # What the context says: after a 2 follows a 5.
            logits[..., 5] += (input_ids == 2).any(-1, keepdim=True) * 2.0
            return SimpleNamespace(logits=logits)

    rows = [[1, 2, 5], [1, 2, 7], [1, 2, 4], [1, 2, 3]]
    items = ChoiceItems(torch.tensor([rows]), 1)
    assert choose(Liking(), items) == [False]
    assert choose(Liking(), items, alone=True) == [True]


def test_a_large_vocabulary_is_read_in_smaller_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    model, dense = build("llama"), build("llama", seed=1)
    windows = torch.randint(0, 128, (10, 16), generator=torch.Generator().manual_seed(0))
    whole = next_token_quality(model, windows, dense=dense)
    read: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    monkeypatch.setattr("rankfold.quality.perplexity.LOGITS", 3 * 16 * 128)
    steps: list[None] = []
    parts = next_token_quality(model, windows, dense=dense, on_step=lambda: steps.append(None))
    assert read == [3, 3, 2, 2]
    assert len(steps) == 2
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert parts.kl == pytest.approx(whole.kl, rel=1e-4)
    assert len(parts.window_losses) == 10
