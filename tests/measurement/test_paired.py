"""Differences on the same items, and what they can prove."""

from __future__ import annotations

import pytest

from rankfold.circumstances import circumstances
from rankfold.measurement.paired import paired_record

HERE = circumstances("a model", seed=0)


@pytest.mark.parametrize("values", [[1.0, 0.0, 1.0, 1.0], [0.25, 0.5, 1.0, 0.75]])
def test_identical_grades_do_not_prove_that_none_would_differ(values: list[float]) -> None:
    record = paired_record(HERE, "compressed", "grade", values, values, minus="dense")
    low, high = record.context["interval"]
    assert record.value == 0.0
    assert low < 0 < high


def test_graded_values_differ_by_their_mean_difference() -> None:
    record = paired_record(HERE, "compressed", "grade", [0.5, 0.25, 1.0], [0.25, 0.25, 0.5], minus="dense")
    assert record.value == pytest.approx(0.25)
    assert record.error is not None and record.error > 0  # noqa: PT018
