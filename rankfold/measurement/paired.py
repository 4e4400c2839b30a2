"""Two models on the same items: how far they lie apart, as one record of one spelling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rankfold.circumstances import Circumstances
from rankfold.quality import mcnemar, paired_difference, paired_shares
from rankfold.record import Record


def paired_record(
    here: Circumstances,
    subject: str,
    name: str,
    values: Sequence[float | int],
    others: Sequence[float | int],
    *,
    minus: str,
    **details: Any,
) -> Record:
    """The mean difference of two models over the same items; of answers that are right or wrong with McNemar's p-value.

    Args:
        here: The circumstances.
        subject: The model whose values are given first.
        name: What was compared.
        values: An item each.
        others: The same items of the other model.
        minus: The other model.
        details: What this number alone depends on.
    """
    details["items"] = len(values)
    if {*values, *others} <= {0, 1}:
        found = paired_shares(values, others)
        details |= {"mcnemar_p": mcnemar(values, others), "interval": [found.low, found.high]}
        return here.difference(subject, name, found.value, "1", found.error, minus=minus, **details)
    if list(values) == list(others) and all(0 <= value <= 1 for value in values):
        # That no item differs does not prove that none would: as if all of them had been right in both.
        same = paired_shares([1] * len(values), [1] * len(values))
        return here.difference(
            subject, name, 0.0, "1", same.error, minus=minus, interval=[same.low, same.high], **details
        )
    difference = paired_difference(values, others)
    return here.difference(subject, name, difference.value, "1", difference.error, minus=minus, **details)
