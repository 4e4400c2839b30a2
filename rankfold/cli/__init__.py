"""The command line: one verb for each step, a table for people on stderr, records for programs on stdout."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable

import transformers
import typer
from rich.markup import escape

from rankfold.cli.benchmark import benchmark, convert_data
from rankfold.cli.compress import compress
from rankfold.cli.demo import demo
from rankfold.cli.evaluate import evaluate
from rankfold.cli.explore import explore
from rankfold.cli.export import export
from rankfold.cli.inspect import inspect
from rankfold.cli.measure import measure
from rankfold.cli.quantize import quantize
from rankfold.cli.recover import recover
from rankfold.cli.report import report
from rankfold.cli.roofline import roofline
from rankfold.cli.sensitivity import sensitivity
from rankfold.terminal import console, say

app = typer.Typer(
    help="Make a language model smaller and faster by low-rank decomposition, and see what that costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

VERBS: tuple[Callable[..., None], ...] = (
    inspect,
    sensitivity,
    explore,
    compress,
    recover,
    quantize,
    measure,
    evaluate,
    benchmark,
    convert_data,
    roofline,
    report,
    export,
    demo,
)
"""In the order of the help."""

for verb in VERBS:
    app.command()(verb)


def main() -> None:
    """Run a verb; a user's mistake ends with one message and exit code 2."""
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    warnings.filterwarnings("ignore", module="transformers|torch|peft")
    try:
        app()
    except ValueError as error:
        # Escaped: the message may hold brackets, such as rankfold[datasets], that are no markup.
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        say("stopped; nothing was written")
        sys.exit(130)
