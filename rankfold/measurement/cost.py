"""What models cost side by side on this machine: size, memory, time and energy, as records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankfold.circumstances import Circumstances
from rankfold.cost import (
    Meter,
    cache_bytes,
    disk_bytes,
    interleaved_energy,
    interleaved_latency,
    memory_bytes,
    parameter_count,
    peak_bytes,
    reading,
)
from rankfold.progress import Step, no_step
from rankfold.record import Record


def measure_size(models: Mapping[str, Any], folders: Mapping[str, str | Path], here: Circumstances) -> list[Record]:
    """Parameters, bytes in memory, and bytes on disk where the model lies in a local folder."""
    records = []
    for name, model in models.items():
        disk = disk_bytes(folders[name]) if name in folders else None
        why = {} if disk is not None else {"unavailable": "the model does not lie in a local folder"}
        rows = [("parameters", parameter_count(model), "1"), ("memory", memory_bytes(model), "byte")]
        records += [here.record(name, *row) for row in rows]
        records.append(here.record(name, "disk", disk, "byte", **why))
    return records


def measure_memory(
    models: Mapping[str, Any], here: Circumstances, *, prompt_tokens: int, batch_size: int = 1
) -> list[Record]:
    """Bytes that a prompt adds to the weights: what is kept of it for the next token, and the peak of its prefill."""
    records = []
    for name, model in models.items():
        details: dict[str, Any] = {"prompt_tokens": prompt_tokens, "batch_size": batch_size}
        kept = cache_bytes(model, prompt_tokens, batch_size)
        peak, how = peak_bytes(model, prompt_tokens, batch_size)
        why = {} if kept is not None else {"unavailable": "the model keeps nothing of a prompt"}
        records.append(here.record(name, "cache", kept, "byte", **details, **why))
        details["unavailable" if peak is None else "counted"] = how
        records.append(here.record(name, "prefill_peak", peak, "byte", **details))
    return records


def measure_latency(
    models: Mapping[str, Any],
    here: Circumstances,
    on_step: Step = no_step,
    **settings: int,
) -> list[Record]:
    """Seconds and tokens a second of prefill and decoding, models interleaved; whether the machine was contended."""
    records = []
    batch_size = settings.get("batch_size", 1)
    for name, latency in interleaved_latency(models, on_step=on_step, **settings).items():
        details = {**settings, "contended": latency.contended, "rounds": len(latency.prefill)}
        tokens = {"prefill": batch_size * settings.get("prompt_tokens", 128), "decode": batch_size}
        for what, seconds in (("prefill", latency.prefill_seconds), ("decode", latency.decode_seconds)):
            if seconds is None:
                continue
            rate = tokens[what] / seconds
            values = ((what, seconds, "second"), (f"{what}_throughput", rate, "token/second"))
            records += [here.record(name, *row, **details) for row in values]
    return records


def measure_limits(models: Mapping[str, Any], here: Circumstances) -> list[Record]:
    """How much faster than the first model others could be at most: decoding by bytes, prefill by multiplications."""
    reference, *others = models
    dense = reading(models[reference])
    records = []
    for name in others:
        found = reading(models[name])
        for what, value in (
            ("decode_speedup_limit", dense.bytes / found.bytes),
            ("prefill_speedup_limit", dense.multiplications / found.multiplications),
        ):
            records.append(here.record(name, what, value))
    return records


def measure_energy(models: Mapping[str, Any], meter: Meter, here: Circumstances, **settings: int) -> list[Record]:
    """Joules of a prompt and some decoded tokens, models interleaved; without a counter no number, and the reason."""
    joules = interleaved_energy(models, meter, **settings)
    details: dict[str, Any] = {**settings, "source": meter.source, "counted": meter.about}
    if meter.source == "unavailable":
        details["unavailable"] = meter.about
    return [here.record(name, "energy", value, "joule", **details) for name, value in joules.items()]
