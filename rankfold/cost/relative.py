"""What a compressed model costs beside the dense one: times and energy as ratios, taken in turns."""

from __future__ import annotations

from typing import Any

from rankfold.cost.energy import Meter, interleaved_energy
from rankfold.cost.latency import interleaved_latency


def relative_cost(
    dense: Any, model: Any, meter: Meter | None = None, *, rounds: int = 7, prompt_tokens: int = 128
) -> dict[str, Any]:
    """Ratios to the dense model, below 1 being cheaper: prefill, decoding, and energy where it is counted.

    Args:
        dense: The dense model.
        model: The compressed one; numbers that it shares with the dense model are measured for both.
        meter: From `open_meter`; without it energy is left out.
        rounds: Rounds of the timing.
        prompt_tokens: Tokens of the prompt.

    Returns:
        `prefill_ratio`, `decode_ratio` and `energy_ratio`, each a number or `None`; `contended`; `energy_source`, which
        says why there is no energy where there is none.
    """
    times = interleaved_latency({"dense": dense, "model": model}, rounds=rounds, prompt_tokens=prompt_tokens)
    first, last = times["dense"], times["model"]
    decode = None
    if first.decode_seconds and last.decode_seconds:
        decode = last.decode_seconds / first.decode_seconds
    found: dict[str, Any] = {
        "prefill_ratio": last.prefill_seconds / first.prefill_seconds,
        "decode_ratio": decode,
        "contended": first.contended or last.contended,
    }
    if meter is not None:
        joules = interleaved_energy({"dense": dense, "model": model}, meter, prompt_tokens=prompt_tokens)
        counted = joules["dense"] and joules["model"]
        found["energy_ratio"] = (joules["model"] or 0) / (joules["dense"] or 1) if counted else None
        found["energy_source"] = f"{meter.source}: {meter.about}"
    return found
