"""Energy by the counters that a machine has; an estimate only where it is asked for; else the reason for none."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rankfold.cost.latency import one_round

POWERCAP = Path("/sys/class/powercap")
"""Where Linux shows the counters of Intel's and AMD's processors (RAPL)."""

LEAST_SECONDS = 0.5
"""Counters are refreshed every tenth of a second or so: work between two readings takes longer."""

REPEATS = 3


@dataclass
class Meter:
    """A counter of joules since some moment."""

    source: str
    """`nvml`, `rapl`, `estimate`, or `unavailable`."""
    about: str
    """What is counted; for `unavailable` why nothing is."""
    _read: Callable[[], float] | None = None

    watts: float | None = None
    """Assumed power, for an estimate."""

    def joules(self, work: Callable[[], None]) -> float | None:
        """Joules of some work, or nothing if there is no counter; one that vanishes makes the meter unavailable."""
        if self.watts is not None:
            begin = time.perf_counter()
            work()
            return self.watts * (time.perf_counter() - begin)
        try:
            start = self._read() if self._read else 0.0
            work()
            return self._read() - start if self._read else None
        except (OSError, _CounterError) as error:
            self.source, self._read = "unavailable", None
            self.about = f"the counter vanished during the run ({error})"
            return None


class _CounterError(Exception):
    """A library could not read its counter."""


def open_meter(device: str = "cpu", *, watts: float | None = None, powercap: Path = POWERCAP) -> Meter:
    """The counter of a device.

    Args:
        device: `cpu`, `cuda` or `cuda:1`.
        watts: Power to assume where nothing is counted; what it gives is an estimate and is called one.
        powercap: Folder of the processor's counters.
    """
    found = _nvml(torch.device(device)) if device.startswith("cuda") else _rapl(powercap)
    if found.source == "unavailable" and watts is not None:
        return Meter("estimate", f"{watts:g} watts assumed ({found.about})", watts=watts)
    return found


@torch.no_grad()
def interleaved_energy(
    models: Mapping[str, Any], meter: Meter, *, prompt_tokens: int = 128, decoded_tokens: int = 8, batch_size: int = 1
) -> dict[str, float | None]:
    """Joules of a prompt and some decoded tokens, by model, the models taking turns; median of the repeats.

    Whatever else runs on the machine is counted too, so only ratios within one call mean something.
    """
    found: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(REPEATS):
        for name, model in models.items():
            rounds = 0

            def work(model: Any = model) -> None:
                nonlocal rounds
                start = time.perf_counter()
                while time.perf_counter() - start < LEAST_SECONDS:
                    one_round(model, prompt_tokens, decoded_tokens, batch_size)
                    rounds += 1

            joules = meter.joules(work) if meter.source != "unavailable" else None
            if joules is not None:
                found[name].append(joules / rounds)
    return {name: statistics.median(values) if values else None for name, values in found.items()}


def _nvml(device: torch.device) -> Meter:
    """NVIDIA's counter of the whole board, since the driver was loaded."""
    try:
        import pynvml

        library: Any = pynvml
    except ImportError:
        return Meter("unavailable", "reading NVIDIA's counter needs nvidia-ml-py: pip install 'rankfold[energy]'")
    try:
        library.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = library.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        library.nvmlDeviceGetTotalEnergyConsumption(handle)
    except (library.NVMLError, RuntimeError, AssertionError) as error:
        return Meter("unavailable", f"NVML does not count here ({error})")

    def read() -> float:
        torch.cuda.synchronize(device)
        try:
            return float(library.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
        except library.NVMLError as error:
            raise _CounterError(str(error)) from error

    return Meter("nvml", "the whole accelerator, whoever uses it", read)


def _is_package(path: Path) -> bool:
    """Whether a counter is one of a whole processor; parts of it, and the platform around it, would count it twice."""
    name = path / "name"
    return path.name.count(":") == 1 and (not name.exists() or name.read_text().startswith("package"))


def _rapl(powercap: Path) -> Meter:
    """The processors' counters, which start again at 0 when they are full."""
    packages = [path for path in sorted(powercap.glob("intel-rapl:*")) if _is_package(path)]
    if not packages:
        return Meter("unavailable", "no RAPL counter: this machine shows none under /sys/class/powercap")
    try:
        ranges = {path: int((path / "max_energy_range_uj").read_text()) for path in packages}
        last = {path: int((path / "energy_uj").read_text()) for path in packages}
    except (OSError, ValueError) as error:
        return Meter("unavailable", f"the RAPL counter cannot be read ({error}): root may allow it with chmod a+r")
    turns = dict.fromkeys(packages, 0)

    def read() -> float:
        for path in packages:
            now = int((path / "energy_uj").read_text())
            turns[path] += now < last[path]
            last[path] = now
        return sum(last[path] + turns[path] * ranges[path] for path in packages) / 1e6

    return Meter("rapl", f"{len(packages)} processor(s), whoever uses them", read)
