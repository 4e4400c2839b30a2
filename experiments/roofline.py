"""Predicted against measured time of layers of Llama-2-7B's shapes: python experiments/roofline.py.

One token, as in decoding, one thread, float32; dense and at a quarter of the full rank, all taking turns, on weights
that no cache holds. Results: benchmarks/results/roofline.jsonl.
"""

from __future__ import annotations

from results import Results, quiet

from rankfold.circumstances import circumstances
from rankfold.cost import Layer, measure_peaks, time_layers

SHAPES = {"q_proj": (4096, 4096), "o_proj": (4096, 4096), "gate_proj": (11008, 4096), "up_proj": (11008, 4096),
          "down_proj": (4096, 11008)}  # fmt: skip
RANK = 1024


def main() -> None:
    """Measure what is missing."""
    quiet()
    results = Results("roofline")
    layers = []
    for name, (rows, columns) in SHAPES.items():
        layers += [Layer(f"{name}, dense", ((rows, columns),))]
        layers += [Layer(f"{name}, rank {RANK}", ((RANK, columns), (rows, RANK)))]
    if all(results.has("Llama-2-7B's shapes", row=layer.name) for layer in layers):
        return
    peaks = measure_peaks()
    context = circumstances(bytes_per_second=peaks.bytes_per_second, flops_per_second=peaks.flops_per_second)
    for found in time_layers(layers, peaks):
        values = {
            "predicted": found.predicted_seconds,
            "measured": found.measured_seconds,
            "ratio": found.measured_seconds / found.predicted_seconds,
            "intensity": found.layer.intensity(1, 4),
        }
        facts = context.also(contended=found.contended)
        results.measure("Llama-2-7B's shapes", found.layer.name, facts, lambda v=values: v)


if __name__ == "__main__":
    main()
