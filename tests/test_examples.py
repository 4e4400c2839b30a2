"""Every example runs and is short."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_it_runs(path: Path, tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert len(path.read_text().splitlines()) <= 40


def test_the_program_for_accelerators_runs_without_one() -> None:
    """Time on an accelerator is dear: what fails on one must not be what a CPU could have shown."""
    size = {"--device": "cpu", "--scale": "32", "--blocks": "2", "--sequences": "8", "--length": "32"}
    small = [*(part for pair in size.items() for part in pair), "--parts", "llama", "starcoder"]
    run = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *small], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
