"""What a section of the report is: headings, text, figures and tables as plain data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rankfold.plan import Plan
from rankfold.record import Record

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
"""Told apart by people who see colours differently (Okabe and Ito 2008), in light and in dark."""

MARKS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A drawing as plain data of plotly, and the same numbers as a table."""

    name: str
    caption: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    choices: Sequence[str] = ()
    """Names of costs; every trace then has `choices` with its x values for each."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what stands under it."""

    name: str
    title: str
    text: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]] = ()
    code: Sequence[str] = field(default=())


Make = Callable[[Sequence[Record], Plan | None], Iterator[Section]]


def model_name(record: Record) -> str:
    """Name of the model that a record is of; empty where it names none."""
    model = record.context.get("model") or ""
    return str(model["name"] if isinstance(model, Mapping) else model)


def label(record: Record) -> str:
    """What a page calls the subject of a record."""
    return str(record.context.get("label", record.subject))


def written(value: float | int | None, unit: str = "1") -> str:
    """A number for people.

    >>> written(0.123456), written(1234567), written(None)
    ('0.1235', '1,234,567', '-')
    """
    if value is None:
        return "-"
    if unit == "byte" or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:.4g}"
