"""Write docs/reference/cli.md from the parser itself: python experiments/cli_page.py."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from rankfold.cli import VERBS, verb_command, verb_function

ROOT = Path(__file__).parent.parent

HEAD = """# Command line

Generated from the parser by `python experiments/cli_page.py`; a test keeps it current. Tables and progress go to stderr; records, one JSON
object a line, to `--output`, or to stdout where it is piped. A mistake ends with one message and exit code 2, anything unforeseen with its
trace and 1, Ctrl-C with what was kept and 130. `--debug` shows the trace of any error.
"""


def page() -> str:
    """The page."""
    parts = [HEAD]
    for verb in VERBS:
        command = verb_command(verb)
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
        names = " ".join(a.metavar or str(a.name).upper() for a in arguments)
        parts += [f"## rankfold {verb}\n", inspect.getdoc(verb_function(verb)) + "\n"]
        parts.append(f"```\nrankfold {verb} {names} [OPTIONS]\n```\n")
        rows = [f"| `{a.metavar or str(a.name).upper()}` | {_text(a)} |" for a in arguments]
        rows += [f"| `{_names(option)}` | {_text(option)} |" for option in options]
        parts.append("| | |\n|---|---|\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _names(option: Any) -> str:
    return ", ".join([*option.opts, *option.secondary_opts])


def _text(parameter: Any) -> str:
    """What the help says, and the default where it says none."""
    text = str(parameter.help or "").replace("|", "\\|")
    default = parameter.default
    plain = isinstance(default, (int, float, str)) and not isinstance(default, bool) and "(default" not in text
    return f"{text} Default: `{default}`." if plain else text


if __name__ == "__main__":
    (ROOT / "docs" / "reference" / "cli.md").write_text(page())
