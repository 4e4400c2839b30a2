"""Which of many points no other beats, and how much of the plane they command."""

from __future__ import annotations

from collections.abc import Sequence


def front(points: Sequence[Sequence[float]]) -> list[int]:
    """Positions of the points that no other point beats, less being better; of equal points the first.

    >>> front([(1.0, 4.0), (2.0, 2.0), (3.0, 3.0), (2.0, 2.0)])
    [0, 1]
    """
    return [
        number
        for number, point in enumerate(points)
        if not any(
            all(a <= b for a, b in zip(other, point, strict=True)) and (tuple(other) != tuple(point) or place < number)
            for place, other in enumerate(points)
        )
    ]


def hypervolume(points: Sequence[Sequence[float]], reference: Sequence[float]) -> float:
    """Volume of what the points beat up to a reference point (Zitzler and Thiele 1999), less being better.

    Sliced along the first axis, so that it suits fronts of hundreds of points in two or three dimensions.

    >>> hypervolume([(1.0, 2.0), (2.0, 1.0)], (3.0, 3.0))
    3.0
    """
    inside = sorted(tuple(p) for p in points if all(a < b for a, b in zip(p, reference, strict=True)))
    if not inside:
        return 0.0
    if len(reference) == 1:
        return float(reference[0] - inside[0][0])
    total = 0.0
    for number, point in enumerate(inside):
        end = inside[number + 1][0] if number + 1 < len(inside) else reference[0]
        if end > point[0]:
            total += (end - point[0]) * hypervolume([p[1:] for p in inside[: number + 1]], reference[1:])
    return float(total)
