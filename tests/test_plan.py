"""Plans and records survive JSON, and newer plans are refused."""

from __future__ import annotations

import pytest

from rankfold import Option, Plan, Record
from rankfold.modules import stored_parameters
from rankfold.plan import PLAN_VERSION
from rankfold.record import value_of

PLAN = Plan(
    options=(
        Option(sites=("a", "b"), form="tucker", ranks=(3, 4), bias=True, parameters=7, bytes=14, loss=0.5),
        Option(sites=("c",), parameters=5, bytes=10, note="left alone"),
    ),
    method="tucker",
    keep=0.8,
    calibration={"corpus": "x", "tokens": 9},
)


def test_a_plan_is_itself_after_json() -> None:
    assert Plan.from_json(PLAN.to_json()) == PLAN
    assert PLAN.parameters == 12
    assert [option.sites for option in PLAN.factorized] == [("a", "b")]


def test_a_newer_plan_is_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match=rf"up to version {PLAN_VERSION}, but got one of version 99.*pip install"):
        Plan.from_dict({**PLAN.to_dict(), "plan_version": 99})


def test_something_else_is_no_plan() -> None:
    with pytest.raises(ValueError, match="must hold an integer `plan_version`, but this one holds None"):
        Plan.from_dict({"options": []})


def test_unknown_forms_are_refused() -> None:
    with pytest.raises(ValueError, match="but got 'circle'"):
        stored_parameters("circle", 4, 4, (1,), bias=False)


def test_records_are_themselves_after_json_and_found_by_name() -> None:
    record = Record(subject="m", name="loss", value=1.5, unit="nat/token", error=0.1, context={"seed": 0})
    assert Record.from_json(record.to_json()) == record
    assert value_of([record], "m", "loss") == 1.5
    assert value_of([record], "m", "accuracy") is None
