"""How work tells of its progress: a stage is opened with a title and a number of steps, then called once a step."""

from __future__ import annotations

from collections.abc import Callable

Step = Callable[[], None]
"""Called after each step of a stage; the parameter of this type is called `on_step` everywhere."""

Stage = Callable[[str, int], Step]
"""Opens a stage of work with a title and a number of steps; what it returns is called after each step."""


def no_step() -> None:
    """Progress that nobody watches."""


def no_stage(title: str, steps: int) -> Step:
    """A stage that nobody watches."""
    return no_step
