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


# A process begins with its parent's peak of memory, so a small one stands between.
_BETWEEN = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[2:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
open(sys.argv[1], "w").write(f"{usage.ru_utime + usage.ru_stime} {usage.ru_maxrss}")
sys.exit(os.waitstatus_to_exitcode(status) != 0)
"""


def run(command: Sequence[Any]) -> Spent:
    """Run a command on one thread.

    Raises:
        RuntimeError: If it fails, with the end of what it printed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with tempfile.NamedTemporaryFile() as used:
        whole = [sys.executable, "-c", _BETWEEN, used.name, *(str(part) for part in command)]
        start = time.perf_counter()
        done = subprocess.run(whole, env=environment, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
        seconds = time.perf_counter() - start
        if done.returncode:
            raise RuntimeError(f"{command} failed: {done.stderr[-3000:]}")
        processor, kilobytes = used.read().split()
    return Spent(seconds, float(processor), 1024 * int(kilobytes))
