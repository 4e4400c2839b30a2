"""What models cost side by side on this machine: size, memory, time and energy, as records."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rankfold.cost import (
    Meter,
    cache_bytes,
    disk_bytes,
    hardware,
    interleaved_energy,
    interleaved_latency,
    memory_bytes,
    parameter_count,
    peak_bytes,
    reading,
)
from rankfold.record import Record, versions


def circumstances(**details: Any) -> dict[str, Any]:
    """What a record depends on: the machine, the versions and the given details."""
    return {"hardware": hardware(), "versions": versions(), **details}


def measure_size(
    models: Mapping[str, Any], folders: Mapping[str, str | Path], context: Mapping[str, Any]
) -> list[Record]:
    """Parameters, bytes in memory, and bytes on disk where the model lies in a local folder."""
    records = []
    for name, model in models.items():
        disk = disk_bytes(folders[name]) if name in folders else None
        why = {} if disk is not None else {"unavailable": "the model does not lie in a local folder"}
        rows = [("parameters", parameter_count(model), "1"), ("memory", memory_bytes(model), "byte")]
        records += [Record(subject=name, name=n, value=v, unit=u, context=dict(context)) for n, v, u in rows]
        records.append(Record(subject=name, name="disk", value=disk, unit="byte", context={**context, **why}))
    return records


def measure_memory(
    models: Mapping[str, Any], context: Mapping[str, Any], *, prompt_tokens: int, batch_size: int = 1
) -> list[Record]:
    """Bytes that a prompt adds to the weights: what is kept of it for the next token, and the peak of its prefill."""
    records = []
    for name, model in models.items():
        details = {**context, "prompt_tokens": prompt_tokens, "batch_size": batch_size}
        kept = cache_bytes(model, prompt_tokens, batch_size)
        peak, how = peak_bytes(model, prompt_tokens, batch_size)
        why = {} if kept is not None else {"unavailable": "the model keeps nothing of a prompt"}
        records.append(Record(subject=name, name="cache", value=kept, unit="byte", context={**details, **why}))
        facts = {**details, "unavailable" if peak is None else "counted": how}
        records.append(Record(subject=name, name="prefill_peak", value=peak, unit="byte", context=facts))
    return records


def measure_latency(
    models: Mapping[str, Any],
    context: Mapping[str, Any],
    on_round: Callable[[], None] = lambda: None,
    **settings: int,
) -> list[Record]:
    """Seconds and tokens a second of prefill and decoding, models interleaved; whether the machine was contended."""
    records = []
    batch_size = settings.get("batch_size", 1)
    for name, latency in interleaved_latency(models, on_round=on_round, **settings).items():
        details = {**context, **settings, "contended": latency.contended, "rounds": len(latency.prefill)}
        tokens = {"prefill": batch_size * settings.get("prompt_tokens", 128), "decode": batch_size}
        for what, seconds in (("prefill", latency.prefill_seconds), ("decode", latency.decode_seconds)):
            if seconds is None:
                continue
            rate = tokens[what] / seconds
            values = ((what, seconds, "second"), (f"{what}_throughput", rate, "token/second"))
            records += [Record(subject=name, name=n, value=v, unit=u, context=details) for n, v, u in values]
    return records


def measure_limits(models: Mapping[str, Any], context: Mapping[str, Any]) -> list[Record]:
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
            records.append(Record(subject=name, name=what, value=value, unit="1", context=dict(context)))
    return records


def measure_energy(
    models: Mapping[str, Any], meter: Meter, context: Mapping[str, Any], **settings: int
) -> list[Record]:
    """Joules of a prompt and some decoded tokens, models interleaved; without a counter no number, and the reason."""
    joules = interleaved_energy(models, meter, **settings)
    details = {**context, **settings, "source": meter.source, "counted": meter.about}
    if meter.source == "unavailable":
        details["unavailable"] = meter.about
    return [
        Record(subject=name, name="energy", value=value, unit="joule", context=details)
        for name, value in joules.items()
    ]
