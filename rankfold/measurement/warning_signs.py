"""Signs that a compression failed in a way that one number alone does not show, read off the records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rankfold.record import Record

ACCURACY_DROP = 0.10
"""Share of items by which accuracy falls before it is a sign."""

TIME_RATIO = 1.03
"""Ratio of times or energies to dense above which a model is called slower; below, timing noise reaches it."""

PERPLEXITY_RATIO = 1.15
"""Ratio of perplexities to dense below which a perplexity alone would look fine."""

REPEATED_RISE = 0.10
"""Share of 4-grams that a text repeats, above that of the dense model's text, before it is a sign."""

BROKEN_RATIO = 3.0
"""Ratio of perplexities to dense above which a quantizer did not lose precision but failed."""


class Sign(NamedTuple):
    """One sign of failure."""

    subject: str
    name: str
    text: str


def warning_signs(records: Sequence[Record], dense: str = "dense", quantized: Iterable[str] = ()) -> list[Sign]:
    """What a user should look at, of every model that was measured beside the dense one.

    Args:
        records: All measurements, the dense model's among them.
        dense: Subject of the dense model.
        quantized: Subjects whose weights are in few bits.

    Returns:
        Signs in the order of the models; none where nothing is wrong, or nothing was measured beside the dense model.
    """
    values: dict[tuple[str, str, str], tuple[float, Record]] = {}
    for record in records:
        if record.value is not None and not record.is_difference:
            setting = str(record.context.get("data") or record.context.get("batch_size") or "")
            values.setdefault((record.subject, record.name, setting), (float(record.value), record))
    signs: list[Sign] = []
    for (subject, name, setting), (value, record) in values.items():
        before = values.get((dense, name, setting))
        if subject == dense or before is None:
            continue
        where = f" ({setting})" if setting else ""
        signs += _of_one(subject, name, value, before[0], record, where)
        if name == "perplexity" and subject in quantized and value > BROKEN_RATIO * before[0]:
            text = (
                f"perplexity {value:.4g} against {before[0]:.4g}{where}: the quantizer broke this model. For 4 bits "
                "compress with the form low_rank"
            )
            signs.append(Sign(subject, "broken quantizer", text))
    return [*signs, *_repetitive(values, dense)]


def _of_one(subject: str, name: str, value: float, before: float, record: Record, where: str) -> list[Sign]:
    """Signs in one pair of numbers."""
    accuracies = ("accuracy", "choice", "next_line", "parses")
    is_accuracy = name in accuracies or name.endswith((" acc", " acc_norm")) or " exact_match" in name
    if is_accuracy and value < before - ACCURACY_DROP:
        text = f"{name} {value:.1%} against {before:.1%}{where}: more than {ACCURACY_DROP:.0%} below dense"
        return [Sign(subject, "accuracy", text)]
    if name in ("prefill", "decode") and value > TIME_RATIO * before and not record.context.get("contended"):
        text = (
            f"{name} takes {value / before:.2f} times as long as dense{where}: the calls of two small products "
            "cost more than they save. Compress only wide layers, or compress more"
        )
        return [Sign(subject, "slower", text)]
    if name == "energy" and value > TIME_RATIO * before:
        return [Sign(subject, "energy", f"needs {value / before:.2f} times the energy of dense{where}")]
    if name == "memory" and value >= before:
        return [Sign(subject, "memory", f"{value:,.0f} bytes of weights against {before:,.0f}: nothing was saved")]
    return []


def _repetitive(values: dict[tuple[str, str, str], tuple[float, Record]], dense: str) -> list[Sign]:
    """Models whose perplexity is fine and whose text goes round in circles."""
    signs = []
    for subject in dict.fromkeys(subject for subject, *_ in values if subject != dense):
        perplexities = [
            value / values[dense, name, setting][0]
            for (other, name, setting), (value, _) in values.items()
            if other == subject and name == "perplexity" and (dense, name, setting) in values
        ]
        fine = perplexities and min(perplexities) < PERPLEXITY_RATIO
        for (other, name, setting), (value, _) in values.items():
            before = values.get((dense, name, setting))
            if other == subject and name == "repeated" and fine and before and value > before[0] + REPEATED_RISE:
                text = (
                    f"perplexity is within {PERPLEXITY_RATIO - 1:.0%} of dense, but {value:.0%} of the 4-grams that it "
                    f"generates are repeats (dense: {before[0]:.0%})"
                )
                signs.append(Sign(subject, "repetitive", text))
    return signs
