"""Whole commands in processes of their own: what they take."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

RANKFOLD = [sys.executable, "-m", "rankfold.cli"]
"""How the command line begins."""


class Spent(NamedTuple):
    """What a command took."""

    seconds: float
    processor_seconds: float
    """Of all its threads, so that other work on the machine counts less."""
    peak_memory: int
    """Peak resident bytes."""


def run(command: Sequence[Any]) -> Spent:
    """Run a command on one thread.

    Raises:
        RuntimeError: If it fails, with the end of what it printed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    start = time.perf_counter()
    # A file, not a pipe, which would fill up while nobody reads it.
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen([str(c) for c in command], env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            errors.seek(0)
            raise RuntimeError(f"{command} failed: {errors.read().decode(errors='replace')[-3000:]}")
    return Spent(time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)
