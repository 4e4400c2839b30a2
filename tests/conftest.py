"""Fixtures that several tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
import transformers

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

ROOT = Path(__file__).parent.parent
ASSETS = ROOT.parent / "shared" / "assets"


@pytest.fixture(autouse=True)
def deterministic() -> None:
    """One thread and a fixed seed for every test."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


stacked_experts = pytest.mark.skipif(
    transformers.__version__.startswith("4."), reason="transformers 4 has no stacked experts: each is a module"
)


def asset(path: str) -> Path:
    """A file or folder of the real weights and data; the test is skipped where they are absent."""
    found = ASSETS / path
    if not found.exists():
        pytest.skip(f"needs the real data {path}, which lies beside the checkout only on the project's machines")
    return found


@pytest.fixture
def stories() -> Path:
    """A small Llama with real weights."""
    return asset("weights/stories260K")


@pytest.fixture(scope="session")
def bundled() -> Path:
    """The trained Llama that ships with the package."""
    return ROOT / "models" / "pycode-llama"


@pytest.fixture(scope="session")
def shallow(bundled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three blocks of it, for what takes as long as there are blocks."""
    folder = tmp_path_factory.mktemp("shallow") / "pycode-llama"
    model = transformers.AutoModelForCausalLM.from_pretrained(bundled, num_hidden_layers=3)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(bundled).save_pretrained(folder)
    return folder
