"""How good a model of code is: programs run in a sandbox, completions that parse, next lines."""

from rankfold.quality.code.completions import Completion, complete_tasks, read_completions
from rankfold.quality.code.next_line import Line, choose_lines, exact_lines
from rankfold.quality.code.sandbox import Execution, Limits, Protection, Sandbox, describe, strongest_protection
from rankfold.quality.code.scores import CodeScores, parses, pass_at_k, score_completions
from rankfold.quality.code.tasks import Task, humaneval_task, load_tasks

__all__ = [
    "CodeScores",
    "Completion",
    "Execution",
    "Limits",
    "Line",
    "Protection",
    "Sandbox",
    "Task",
    "choose_lines",
    "complete_tasks",
    "describe",
    "exact_lines",
    "humaneval_task",
    "load_tasks",
    "parses",
    "pass_at_k",
    "read_completions",
    "score_completions",
    "strongest_protection",
]
