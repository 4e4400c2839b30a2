"""The bundled models are real, saturated and what their cards say."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT, asset
from safetensors.torch import load_file
from transformers import BertForSequenceClassification

from rankfold import allocate, find_sites
from rankfold.calibration import load_corpus, make_batches, random_windows, token_stream
from rankfold.checkpoint import load_model, load_tokenizer
from rankfold.compression import factorize_blocks
from rankfold.cost import disk_bytes, parameter_count
from rankfold.measurement import evaluation_windows
from rankfold.quality import classification_accuracy, load_labelled, next_token_quality

MODELS = sorted(path.parent for path in ROOT.glob("models/*/config.json"))


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_the_card_names_the_parameters_of_the_model(folder: Path) -> None:
    model = load_model(folder)
    card = (folder / "README.md").read_text()
    assert f"{parameter_count(model):,} parameters" in card
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    disk = disk_bytes(folder)
    assert disk is not None
    assert disk < 12_000_000
    assert re.search(r"held-out perplexity \| \d+\.\d+ ± ", card)


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_compression_costs_a_saturated_model_a_tenth_of_a_nat(folder: Path) -> None:
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    windows = evaluation_windows(tokenizer, load_corpus("bundled:python-held-out"), 256, 48)
    dense = next_token_quality(model, windows)
    assert dense.loss < 3.6
    stream = token_stream(tokenizer, load_corpus("bundled:calibration").texts)
    sites = find_sites(model).select()
    batches = make_batches(model, random_windows(stream, 64, 256))
    factorize_blocks(model, allocate(sites, keep=0.8, method="whitened"), sites, batches)
    assert next_token_quality(model, windows).loss > dense.loss + 0.1


def test_minilm_has_729_of_the_872_rows_of_sst2_right(tmp_path: Path) -> None:
    folder = asset("weights/all-MiniLM-L6-v2")
    model = BertForSequenceClassification.from_pretrained(folder, num_labels=2)
    model.load_state_dict(load_file(asset("weights/all-MiniLM-L6-v2-sst2-head/delta.safetensors")), strict=False)
    with gzip.open(asset("data/sst2/sst2_validation.jsonl.gz"), "rt") as lines:
        rows = [json.loads(line) for line in lines]
    rows.sort(key=lambda row: len(row["sentence"]))  # less padding
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    accuracy = classification_accuracy(model.eval(), load_tokenizer(folder), load_labelled(tmp_path / "rows.jsonl"))
    assert (accuracy.right, accuracy.total) == (729, 872)
