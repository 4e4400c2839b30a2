"""Time of a prefill and of one decoded token, the models taking turns so that a change of the machine hits all."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rankfold.precision import device_of
from rankfold.progress import Step, no_step
from rankfold.sites import text_arguments

NOISY_SPREAD = 1.5
"""Quartiles further apart than this factor mark a run as contended."""


@dataclass(frozen=True)
class Latency:
    """Times of one model in seconds, one number a round."""

    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    """Seconds per decoded token; empty for models that do not generate."""
    contended: bool
    """Whether other work slowed the machine down while this was measured."""

    @property
    def prefill_seconds(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.prefill)

    @property
    def decode_seconds(self) -> float | None:
        """Median over the rounds."""
        return statistics.median(self.decode) if self.decode else None


@torch.no_grad()
def interleaved_latency(
    models: Mapping[str, Any],
    *,
    prompt_tokens: int = 128,
    decoded_tokens: int = 8,
    rounds: int = 15,
    batch_size: int = 1,
    on_step: Step = no_step,
) -> dict[str, Latency]:
    """Time models side by side: in every round each prefills a prompt and decodes a few tokens.

    Every turn begins with a pass that is not timed, since what a model finds in caches, of weights and of kernels that
    a library compiles for each shape (oneDNN keeps 1,024), would otherwise be what the model before it left there.

    Args:
        models: Models by name, on one device.
        prompt_tokens: Length of the prompt.
        decoded_tokens: Tokens decoded a round, with the key-value cache.
        rounds: Rounds after one of warming up.
        batch_size: Prompts at once.
        on_step: Called after each round, for a progress bar.

    Returns:
        Latency by name; compare medians as ratios, never across runs.
    """
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in models}
    busy = wall = 0.0
    for number in range(rounds + 1):
        cpu_start, wall_start = time.process_time(), time.perf_counter()
        for name, model in models.items():
            one_round(model, prompt_tokens, 1, batch_size)
            prefill, decode = one_round(model, prompt_tokens, decoded_tokens, batch_size)
            if number:
                times[name][0].append(prefill)
                times[name][1].extend([decode] if decode is not None else [])
        if number:
            busy += time.process_time() - cpu_start
            wall += time.perf_counter() - wall_start
        on_step()
    on_cpu = all(device_of(model).type == "cpu" for model in models.values())
    # A process that computes without pause uses at least as much CPU time as passes, unless others take its turn.
    held_up = on_cpu and busy < 0.9 * wall
    noisy = any(_spread(series) > NOISY_SPREAD for pair in times.values() for series in pair)
    return {name: Latency(tuple(pair[0]), tuple(pair[1]), held_up or noisy) for name, pair in times.items()}


def one_round(model: Any, prompt_tokens: int, decoded_tokens: int, batch_size: int) -> tuple[float, float | None]:
    """Seconds of one prefill, and per decoded token where the model keeps a cache."""
    device = device_of(model)
    ids = torch.arange(batch_size * prompt_tokens, device=device).reshape(batch_size, -1) % 100 + 3
    generates = model.can_generate() and not model.config.is_encoder_decoder
    options = {"use_cache": True} if generates else {}
    inputs = text_arguments(model, ids)
    start = now(device)
    output = model(**inputs, **options)
    prefill = now(device) - start
    cache = cache_of(output)
    if not generates or not cache:
        return prefill, None
    positions = "cache_position" in inspect.signature(model.forward).parameters
    start = now(device)
    for step in range(decoded_tokens):
        position = {"cache_position": torch.tensor([prompt_tokens + step], device=device)} if positions else {}
        model(input_ids=ids[:, -1:], use_cache=True, **cache, **position)
    return prefill, (now(device) - start) / decoded_tokens


def cache_of(output: Any) -> dict[str, Any]:
    """What a model's output hands to its next call, under the name by which this version of transformers takes it."""
    for name in ("cache", "past_key_values", "cache_params"):
        if getattr(output, name, None) is not None:
            return {name: getattr(output, name)}
    return {}


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def _spread(series: list[float]) -> float:
    if len(series) < 4:
        return 1.0
    low, _, high = statistics.quantiles(series, n=4)
    return high / low
