"""The map of what low rank costs and saves on a model: a design space, and searches through it."""

from rankfold.exploration.bench import OBJECTIVES, Bench, Objective, Trial
from rankfold.exploration.pareto import front, hypervolume
from rankfold.exploration.policy import Policy, point_of, prices, project, starting_points
from rankfold.exploration.space import Choice, DesignSpace, Point, choices, multiplications

__all__ = [
    "OBJECTIVES",
    "Bench",
    "Choice",
    "DesignSpace",
    "Objective",
    "Point",
    "Policy",
    "Trial",
    "choices",
    "front",
    "hypervolume",
    "multiplications",
    "point_of",
    "prices",
    "project",
    "starting_points",
]
