"""Generated programs run apart: no network, no files, no other processes, and bounded in all that they use."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from rankfold.errors import InputError
from rankfold.progress import Step, no_step
from rankfold.quality.code import sandboxed

_FIRST_USER = 2_000_000
"""User ids from here on belong to nobody; each run gets its own, so that runs do not share a limit on processes."""

_numbers = itertools.count()


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    wall_seconds: float = 10.0
    cpu_seconds: int = 10
    memory_bytes: int = 1 << 30
    """Address space of each process."""
    file_bytes: int = 16 << 20
    """Length of each file."""
    processes: int = 16
    """Processes and threads."""
    output_bytes: int = 1 << 20
    """What it may print."""


class Execution(NamedTuple):
    """How a program ended."""

    passed: bool
    """Whether it reached its end."""
    error: str | None
    """Why it did not: the name of an exception, or `TimeLimit`, `OutputLimit`, `Died`."""
    detail: str
    output: str
    """The beginning of what it printed."""
    seconds: float


class Protection(NamedTuple):
    """What a program is kept from, as far as this machine allows it."""

    name: str
    """`bubblewrap`, `namespaces` or `limits`."""
    hides_files: bool
    hides_network: bool
    hides_processes: bool
    command: Callable[[Path, Limits], list[str]]

    @property
    def reachable(self) -> list[str]:
        """What a program can still reach or exhaust."""
        kept = {"files": self.hides_files, "network": self.hides_network, "processes": self.hides_processes}
        # The kernel holds nobody's processes to a limit if they are root's.
        kept["number of processes"] = os.geteuid() != 0 or _may_drop(self)
        # A process that leaves its session is not found again without a namespace.
        kept["time after the limit"] = self.hides_processes
        return [name for name, hidden in kept.items() if not hidden]


@dataclass(frozen=True)
class Sandbox:
    r"""Runs untrusted Python programs with the interpreter's own standard library and nothing else.

    The strongest protection that works here is found by trying: bubblewrap, then namespaces, then limits alone.
    What a program says of itself is taken at its word: one that looks for the report's file can fake a pass, but
    cannot get out.

    >>> Sandbox().run("print(1 + 1)").output
    '2\n'
    """

    limits: Limits = Limits()
    protection: Protection | None = None
    """Without one, the strongest that works here."""

    def run_all(
        self, programs: Iterable[str], *, workers: int | None = None, on_step: Step = no_step
    ) -> list[Execution]:
        """Run many programs, several at once, and give their results in order."""

        def one(program: str) -> Execution:
            execution = self.run(program)
            on_step()
            return execution

        with ThreadPoolExecutor(workers or _processors()) as pool:
            return list(pool.map(one, programs))

    def run(self, program: str) -> Execution:
        """Run one program; it starts in an empty folder of its own and reads nothing from standard input."""
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="rankfold-", ignore_cleanup_errors=True) as folder:
            Path(folder).chmod(0o777)
            with tempfile.TemporaryFile() as source:
                source.write(program.encode(errors="replace"))
                source.seek(0)
                process, report = self._start(Path(folder), source)
            watch = _Watch(process, report, self.limits)
            try:
                cause = watch.until(start + self.limits.wall_seconds)
                if cause is None and not watch.report:
                    # It died: let whoever started it see of what.
                    _until_gone(process, time.monotonic() + 3.0)
            finally:
                _kill_group(process)
            return _execution(watch, cause, _wait(process), time.monotonic() - start)

    def _start(self, folder: Path, source: IO[bytes]) -> tuple[subprocess.Popen[bytes], int]:
        read, write = os.pipe()
        limits, protection = self.limits, self.protection or strongest_protection()
        settings = {
            "report": write,
            "guarded": protection.name == "namespaces",
            "user": _FIRST_USER + (os.getpid() * 64 + next(_numbers)) % 1_000_000 if _may_drop(protection) else None,
            "limits": {
                "RLIMIT_CPU": limits.cpu_seconds,
                "RLIMIT_AS": limits.memory_bytes,
                "RLIMIT_FSIZE": limits.file_bytes,
                "RLIMIT_NPROC": limits.processes,
            },
        }
        command = [*protection.command(folder, limits), *_python(), json.dumps(settings)]
        try:
            process = subprocess.Popen(
                command,
                stdin=source,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
                pass_fds=(write,),
                start_new_session=True,
            )
        except OSError:
            os.close(read)
            raise
        finally:
            os.close(write)
        return process, read


class _Watch:
    """Reads what a program prints and reports, until it ends or goes too far."""

    def __init__(self, process: subprocess.Popen[bytes], report: int, limits: Limits) -> None:
        self.limits, self._report = limits, report
        self.output, self.report = bytearray(), bytearray()
        assert process.stdout is not None, "standard output is a pipe"
        self._printed = process.stdout
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._printed, selectors.EVENT_READ, self.output)
        self._selector.register(report, selectors.EVENT_READ, self.report)

    def until(self, deadline: float) -> str | None:
        """Wait for the report, or for both pipes to close; the limit that was passed before that, if one was."""
        try:
            while self._selector.get_map():
                left = deadline - time.monotonic()
                if left <= 0:
                    return "TimeLimit"
                self._read(left)
                if len(self.output) > self.limits.output_bytes:
                    return "OutputLimit"
                if self.report:
                    # What was printed before the report lies in the pipe already; children may hold it open.
                    self._read(0.0)
                    return None
            return None
        finally:
            self._selector.close()
            self._printed.close()
            os.close(self._report)

    def _read(self, seconds: float) -> None:
        for key, _ in self._selector.select(seconds):
            chunk = os.read(key.fd, 1 << 16)
            if not chunk:
                self._selector.unregister(key.fileobj)
            key.data.extend(chunk)


def _execution(watch: _Watch, cause: str | None, ended: tuple[int, float], seconds: float) -> Execution:
    status, cpu_seconds = ended
    output = watch.output.decode(errors="replace")
    shown = output[:2000]
    try:
        report = json.loads(watch.report) if cause is None else {}
    except ValueError:
        report = {}
    if "error" in report:
        return Execution(report["error"] is None, report["error"], str(report.get("detail", "")), shown, seconds)
    # The signal of the limit, or where it was not passed on, the time; the kernel's two clocks differ by milliseconds.
    signalled = status in (-signal.SIGXCPU, 128 + signal.SIGXCPU)
    if cause is None and (signalled or cpu_seconds > 0.9 * watch.limits.cpu_seconds):
        cause = "TimeLimit"
    details = {"TimeLimit": "it ran too long", "OutputLimit": "it printed too much"}
    detail = details.get(cause or "", f"exit status {status} without reaching the end: {output[-500:].strip()}")
    return Execution(False, cause or "Died", detail, shown, seconds)


def _wait(process: subprocess.Popen[bytes]) -> tuple[int, float]:
    """Exit status, and seconds of CPU time of the process and of those that it waited for."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_utime + usage.ru_stime


def _until_gone(process: subprocess.Popen[bytes], deadline: float) -> None:
    while time.monotonic() < deadline and not os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
        time.sleep(0.01)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


# --- protections -----------------------------------------------------------------------------------------------------


def _python() -> list[str]:
    """The interpreter without site packages, environment or the folder it starts in, reading its program from here."""
    source = Path(sandboxed.__file__).read_text()
    return [os.path.realpath(sys.executable), "-I", "-S", "-B", "-c", source]


def _bubblewrap(folder: Path, limits: Limits) -> list[str]:
    """A root of its own that holds the interpreter, read-only, and an empty folder in memory."""
    command = [
        _path("bwrap"),
        "--unshare-ipc",
        "--unshare-pid",
        "--unshare-net",
        "--unshare-uts",
        "--unshare-cgroup-try",
    ]
    if os.geteuid() == 0:
        # Without a namespace of users a limit on processes holds for root too, once it has become somebody else.
        command += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command.append("--unshare-user")
    for path in map(Path, ("/usr", "/lib", "/lib64", "/bin")):
        if path.is_symlink():
            command += ["--symlink", str(path.readlink()), str(path)]
        elif path.is_dir():
            command += ["--ro-bind", str(path), str(path)]
    prefix = Path(os.path.realpath(sys.base_prefix))
    if not prefix.is_relative_to("/usr"):
        # Folders on the way are made here, readable for the user that root becomes.
        for parent in reversed(prefix.parents[:-1]):
            command += ["--perms", "0755", "--dir", str(parent)]
        command += ["--ro-bind", str(prefix), str(prefix)]
    command += ["--perms", "0755", "--dir", "/etc", "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    command += ["--proc", "/proc", "--dev", "/dev"]
    command += ["--size", str(4 * limits.file_bytes), "--perms", "1777", "--tmpfs", "/tmp", "--chdir", "/tmp"]
    # Nothing but that folder can be written, so that what is written is bounded.
    command += ["--remount-ro", "/dev", "--remount-ro", "/"]
    return [*command, "--die-with-parent", "--new-session", "--"]


def _path(program: str) -> str:
    """Where a program lies, if it does: it is started without the caller's PATH."""
    return shutil.which(program) or program


def _processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _namespaces(folder: Path, limits: Limits) -> list[str]:
    """No network and no other processes; files are those of the user."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return [
        _path("unshare"),
        *user,
        "--mount",
        "--ipc",
        "--net",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
        "--",
    ]


def _limits_only(folder: Path, limits: Limits) -> list[str]:
    return []


PROTECTIONS = (
    Protection("bubblewrap", True, True, True, _bubblewrap),
    Protection("namespaces", False, True, True, _namespaces),
    Protection("limits", False, False, False, _limits_only),
)
"""From the strongest to the weakest."""


def strongest_protection(among: Sequence[Protection] = PROTECTIONS) -> Protection:
    """The first protection under which a trivial program runs on this machine.

    Raises:
        ValueError: If there is none, as on Windows.
    """
    if os.name != "posix":
        raise InputError("Generated programs are only run on Linux and macOS, where a process can be held to limits.")
    failures = []
    for protection in among:
        if protection not in _tried:
            _tried[protection] = _try(protection)
        if _tried[protection].passed:
            return protection
        failures.append(f"{protection.name}: {_tried[protection].detail}")
    raise InputError(f"No sandbox works here, so generated programs are not run: {'; '.join(failures)}")


_tried: dict[Protection, Execution] = {}


def _try(protection: Protection) -> Execution:
    command = protection.command(Path("/"), Limits())
    if command and shutil.which(command[0]) is None:
        return Execution(False, "Died", f"{command[0]} is not installed", "", 0.0)
    return Sandbox(protection=protection).run("import json")


def _may_drop(protection: Protection) -> bool:
    """Whether root becomes somebody else: only where that user still reaches the interpreter."""
    if os.geteuid() != 0:
        return False
    prefix = Path(os.path.realpath(sys.base_prefix))
    return protection.hides_files or all(path.stat().st_mode & 0o001 for path in (prefix, *prefix.parents))


def describe(protection: Protection) -> dict[str, Any]:
    """What a record says of the protection."""
    return {"sandbox": protection.name, "reachable_from_sandbox": protection.reachable}
