"""The command line: one verb for each step, a table for people on stderr, records for programs on stdout."""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from rankfold.cli.terminal import console, keeps, kept, say
from rankfold.errors import InputError

# Newer versions of typer carry their own copy of click, whose errors are other classes: these are the ones it raises.
_ClickError: Any = typer.BadParameter.__mro__[2]

VERBS = {
    "inspect": "List what can be factorized, with shape, break-even rank and spectrum; and what cannot, with the reason.",
    "sensitivity": "Factorize one kind of layer, one block or a set of spaced blocks at a time, at several ranks, and measure.",
    "explore": "Search the design space from the knapsack's plans and the paper's rules; an interrupted search resumes.",
    "compress": "Factorize a model and save a checkpoint that loads in transformers.",
    "recover": "Train a compressed model to match its dense original; an interrupted run resumes.",
    "quantize": "Quantize the linear layers of a model, dense layers and factors alike, to 8 bits or fewer.",
    "adapt": "Write the difference between two models as a LoRA adapter, its bytes shared out by predicted loss.",
    "measure": "Measure quality, size and speed, side by side with the dense model if it is given.",
    "evaluate": "Have models write programs, predict next lines and choose continuations, side by side.",
    "benchmark": "Run benchmarks through lm-evaluation-harness, with error bars and paired differences.",
    "convert-data": "Convert benchmark files to the layout that the harness reads.",
    "roofline": "Measure this machine's bandwidth and compute, and time every layer shape against what they allow.",
    "report": "Make one self-contained page from records: fronts, maps, spectra, roofline, benchmarks, how to reproduce it.",
    "export": "Export a compressed model: with its factors multiplied out, or a nested one cut to a budget.",
    "demo": "Run the main workflow on the bundled model, offline: compress, save, load, measure side by side, generate.",
}
"""Verbs in the order of the help, each with the first line of its own; a test holds the two together."""

_HOMES = {"convert-data": "benchmark"}
"""Modules of verbs that share one; the others have a module of their name."""


INTERRUPTED = 130
"""Exit code after Ctrl-C."""


def verb_function(verb: str) -> Any:
    """The function behind a verb, whose module is imported now."""
    module = importlib.import_module(f"rankfold.cli.{_HOMES.get(verb, verb)}")
    return getattr(module, verb.replace("-", "_"))


def verb_command(verb: str) -> Any:
    """The command behind a verb."""
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    alone.command(verb)(verb_function(verb))
    return typer.main.get_command(alone)


def in_options(message: str, arguments: Sequence[str]) -> str:
    """A message of the library, which names parameters of Python, in the words of the verb that was run."""
    verb = next((argument for argument in arguments if argument in VERBS), None)
    if verb is None:
        return message
    options = {str(parameter.name).rstrip("_"): parameter.opts[0] for parameter in verb_command(verb).params}
    # The front door calls it text; on the command line `--text` is what is measured on.
    options.setdefault("text", options.get("calibration", "--text"))
    return re.sub(r"`([a-z_]+)`", lambda found: options.get(found[1], found[0]), message)


class _Verb(TyperCommand):
    """A verb in the list of verbs: what it needs is imported when it runs, not when the help is shown."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        _quiet_libraries()
        return verb_command(str(self.name)).make_context(info_name, args, parent, **extra)


class _Verbs(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return _Verb(cmd_name, callback=None, help=VERBS[cmd_name]) if cmd_name in VERBS else None


app = typer.Typer(
    cls=_Verbs,
    help="Make a language model smaller and faster by low-rank decomposition, and see what that costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of any error; may also follow the verb."),
) -> None:
    pass


def _quiet_libraries() -> None:
    """Before they are imported: what they say to their own users is noise to ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", module="transformers|torch|peft|bitsandbytes|accelerate")
    import logging

    import transformers

    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    for name in ("bitsandbytes", "torchao", "datasets", "accelerate", "kernels"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main() -> None:
    """Run a verb; a user's mistake ends with one message and exit code 2, anything else with its trace and 1."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    keeps("nothing was written.")
    try:
        code = app(args=arguments, prog_name="rankfold", standalone_mode=False) or 0
        if code == INTERRUPTED:
            # typer makes an exit code of an interrupt.
            raise KeyboardInterrupt
        sys.exit(code)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except _ClickError as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        say(f"stopped; {kept()}")
        sys.exit(INTERRUPTED)
    except InputError as error:
        if debug:
            traceback.print_exc()
        # Escaped: the message may hold brackets, such as rankfold[datasets], that are no markup.
        message = in_options(str(error), arguments)
        console.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except Exception as error:  # a fault of ours or of a library must be seen whole
        traceback.print_exc()
        say(f"Unexpected {type(error).__name__}: this is a bug in rankfold or in a library, not in what you typed.")
        say(f"Please report it with the traceback above and the command. {kept()[:1].upper() + kept()[1:]}")
        sys.exit(1)
