"""`rankfold VERB ...` as a user types it, within this process or in one of its own."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple

import pytest
from conftest import ROOT

from rankfold.cli import main
from rankfold.cli.terminal import console
from rankfold.record import Record

MODEL = str(ROOT / "models" / "pycode-llama")


class Done(NamedTuple):
    """What a command printed."""

    stdout: str
    stderr: str


def run(*arguments: str, code: int = 0) -> Done:
    """`rankfold ARGUMENTS` within this process: a fresh one spends seconds on its imports."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rankfold", *arguments])
        patch.setenv("COLUMNS", "160")
        patch.setattr(console, "width", 160)
        try:
            main()
        except SystemExit as stop:
            status = int(stop.code or 0)
    assert status == code, err.getvalue()[-3000:]
    return Done(out.getvalue(), err.getvalue())


def run_alone(*arguments: str, code: int = 0) -> Done:
    """`rankfold ARGUMENTS` in a process of its own, as a shell starts it."""
    result = subprocess.run(
        [sys.executable, "-m", "rankfold.cli", *arguments],
        env={**os.environ, "COLUMNS": "160", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == code, result.stderr[-3000:]
    return Done(result.stdout, result.stderr)


def records(text: str) -> dict[tuple[str, str], Record]:
    found = [Record.from_json(line) for line in text.splitlines()]
    return {(record.subject, record.name + " minus" * record.is_difference): record for record in found}
