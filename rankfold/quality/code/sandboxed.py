"""What runs first inside the sandbox: it takes the limits on, reads a program, runs it, and says how that ended."""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import Any


def take_limits(limits: dict[str, int]) -> None:
    """Bind this process and all that it starts to the limits, which cannot be raised again."""
    for name, value in limits.items():
        # Past the soft limit on CPU time comes a signal that the parent recognizes, at the hard one the end.
        hard = value + 1 if name == "RLIMIT_CPU" else value
        resource.setrlimit(getattr(resource, name), (value, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def stand_guard() -> None:
    """Go on in a child, while this process, the first of its namespace, waits: when it ends the kernel ends the rest.

    It keeps its privileges, and so the signal that comes to it when the process that started it dies.
    """
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        os._exit(code if code >= 0 else 128 - code)


def drop_privileges(user: int) -> None:
    """Become a user whom no file and no other process belongs to."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def run(source: str) -> dict[str, Any]:
    """Run a program as `__main__`; only one that reaches its end has passed."""
    try:
        exec(compile(source, "<program>", "exec"), {"__name__": "__main__"})
    except BaseException as error:
        # Whatever ends a program is its result.
        return {"error": type(error).__name__, "detail": str(error)[:500]}
    return {"error": None, "detail": ""}


def main() -> None:
    """Read the settings, then the program, run it, and write how it ended to the report."""
    settings = json.loads(sys.argv[1])
    source = sys.stdin.buffer.read().decode(errors="replace")
    if settings["guarded"]:
        stand_guard()
    take_limits(settings["limits"])
    if settings["user"] is not None:
        drop_privileges(settings["user"])
    sys.argv = ["program"]
    outcome = json.dumps(run(source))
    sys.stdout.flush()
    # Last, and in one piece: the parent stops listening when it has this.
    os.write(settings["report"], outcome.encode())
    # Threads and exit handlers of the program have no say in how long this takes.
    os._exit(0)


if __name__ == "__main__":
    main()
