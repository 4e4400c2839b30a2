"""Nothing that a program does reaches beyond its sandbox, and only programs that reach their end pass."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
from pathlib import Path

import pytest
from conftest import asset

from rankfold.quality.code import Limits, Protection, Sandbox, load_tasks, strongest_protection
from rankfold.quality.code.sandbox import PROTECTIONS, _execution, _Watch

TIGHT = Limits(wall_seconds=6.0, cpu_seconds=1, memory_bytes=256 << 20, file_bytes=1 << 20, output_bytes=1 << 16)


@pytest.fixture(params=PROTECTIONS, ids=lambda protection: protection.name)
def protection(request: pytest.FixtureRequest) -> Protection:
    """Every protection that works on this machine."""
    try:
        return strongest_protection([request.param])
    except ValueError as error:
        pytest.skip(f"this machine does not allow it: {error}")


def run(program: str, protection: Protection, limits: Limits = TIGHT):
    return Sandbox(limits, protection).run(program)


def test_a_program_that_reaches_its_end_passes(protection: Protection) -> None:
    done = run("import math, json, collections\nprint(math.factorial(5))", protection)
    assert done.passed, done
    assert done.output == "120\n"


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("assert 1 + 1 == 3", "AssertionError"),
        ("undefined", "NameError"),
        ("def f(:", "SyntaxError"),
        ("a\0b", "SyntaxError"),
        ("raise SystemExit(0)", "SystemExit"),
        ("import os\nos._exit(0)", "Died"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "Died"),
        ("x = bytearray(1 << 40)", "MemoryError"),
        ("open('big', 'wb').write(bytes(1 << 24))", "OSError"),
        ("def f(): f()\nf()", "RecursionError"),
        ("import torch", "ModuleNotFoundError"),
    ],
)
def test_what_ends_early_fails_with_its_reason(program: str, error: str, protection: Protection) -> None:
    if "SIGKILL" in program and protection.name == "namespaces":
        pytest.skip("the first process of a namespace cannot be killed from inside")
    done = run(program, protection)
    assert (done.passed, done.error) == (False, error), done


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("while True: pass", "TimeLimit"),
        ("import time\ntime.sleep(60)", "TimeLimit"),
        ("while True: print('x' * 1000)", "OutputLimit"),
        ("import os\nwhile True: os.write(2, bytes(1000))", "OutputLimit"),
    ],
)
def test_what_does_not_end_is_ended(program: str, error: str, protection: Protection) -> None:
    start = time.monotonic()
    assert run(program, protection, Limits(wall_seconds=3.0, cpu_seconds=1, output_bytes=1 << 16)).error == error
    assert time.monotonic() - start < 8


def test_a_program_of_ten_megabytes_runs(protection: Protection) -> None:
    assert run("x = '" + "a" * 10_000_000 + "'\nassert len(x) == 10_000_000", protection, Limits()).passed


def test_text_that_is_no_unicode_is_replaced_not_raised(protection: Protection) -> None:
    assert run("x = '\udc80'", protection).passed


def test_nothing_of_the_environment_is_inherited(protection: Protection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "secret")
    assert run("import os\nassert 'secret' not in str(os.environ)", protection).passed


def test_a_program_starts_in_an_empty_folder_and_leaves_nothing(
    protection: Protection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(0o755)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    done = run("import os\nassert os.listdir('.') == []\nopen('left', 'w').write('x')\nprint(os.getcwd())", protection)
    assert done.passed, done
    assert not list(tmp_path.iterdir())


def test_a_child_left_running_does_not_hold_up(protection: Protection) -> None:
    start = time.monotonic()
    assert run("import os, time\nif os.fork() == 0: time.sleep(30)", protection).passed
    assert time.monotonic() - start < 5


def test_a_fork_bomb_stays_small(protection: Protection) -> None:
    if "number of processes" in protection.reachable:
        pytest.skip("root's processes are not limited under this protection")
    start = time.monotonic()
    done = run("import os\nwhile True: os.fork()", protection, Limits(wall_seconds=3.0, processes=8))
    assert not done.passed
    assert time.monotonic() - start < 8
    while _left_running() and time.monotonic() - start < 12:
        time.sleep(0.1)
    assert not _left_running()


@pytest.mark.parametrize("escape", ["os.setsid()", "os.setsid()\nif os.fork(): os._exit(0)\nos.setsid()"])
def test_nothing_outlives_its_limit(escape: str, protection: Protection) -> None:
    if "time after the limit" in protection.reachable:
        pytest.skip("this protection does not find processes that leave their session, and says so")
    name = f"mark-{os.getpid()}-{len(escape)}"
    program = f"import os, time, sys\n{escape}\nopen('/proc/self/comm', 'w').write('{name[:15]}')\ntime.sleep(30)"
    run(program, protection, Limits(wall_seconds=1.5))
    deadline = time.monotonic() + 5
    while _named(name[:15]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _named(name[:15])


def _named(name: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            found += [path.parent.name] if path.read_text().strip() == name else []
    return found


def test_only_the_empty_folder_can_be_written(protection: Protection) -> None:
    if not protection.hides_files:
        pytest.skip("this protection does not hide files, and says so")
    for place in ("/x", "/etc/x", "/dev/shm/x", "/dev/x", "/usr/x"):
        assert run(f"open({place!r}, 'w')", protection).error in ("OSError", "PermissionError", "FileNotFoundError"), (
            place
        )
    many = "for n in range(200): open(f'{n}', 'wb').write(bytes(1 << 19))"
    assert run(many, protection).error == "OSError"


def _left_running() -> list[str]:
    """Processes that belong to a user of the sandbox."""
    owners = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            owners += [path.name] if path.stat().st_uid >= 2_000_000 else []
    return owners


def test_other_processes_are_out_of_reach(protection: Protection) -> None:
    if not protection.hides_processes:
        pytest.skip("this protection does not hide processes, and says so")
    program = f"import os\nassert not os.path.exists('/proc/{os.getpid()}/cmdline') or {os.getpid()} < 9\n"
    assert run(program, protection).passed
    for victim in ("os.getppid()", str(os.getpid()), "-1"):
        run(f"import os, signal\nos.kill({victim}, signal.SIGKILL)", protection)
    # Whoever reads this line is alive.
    assert run("", protection).passed


def test_there_is_no_network(protection: Protection) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)"
        assert run(program, protection).passed != protection.hides_network


def test_files_outside_are_out_of_sight(protection: Protection, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(0o755)
    done = run(f"open({str(secret)!r}).read()", protection)
    if protection.hides_files:
        assert done.error == "FileNotFoundError"
        assert run("import os\nassert not os.path.exists('/etc/passwd')", protection).passed
        assert run("open('/usr/x', 'w')", protection).error in ("OSError", "PermissionError")
    else:
        assert "files" in protection.reachable


def test_what_is_reachable_is_said() -> None:
    limits = PROTECTIONS[-1]
    assert {"files", "network", "processes"} <= set(limits.reachable)
    assert not {"files", "network", "processes"} & set(PROTECTIONS[0].reachable)


def test_without_any_protection_nothing_runs() -> None:
    with pytest.raises(ValueError, match="No sandbox works here"):
        strongest_protection([Protection("none", False, False, False, lambda folder, limits: ["no-such-program"])])


def test_a_report_that_was_cut_off_is_no_pass() -> None:
    watch = object.__new__(_Watch)
    watch.output, watch.report, watch.limits = bytearray(b"x"), bytearray(b'{"error": nu'), TIGHT
    assert _execution(watch, None, (0, 0.1), 1.0).error == "Died"


@pytest.mark.parametrize(("file", "every"), [("humaneval/HumanEval.jsonl.gz", 1), ("mbpp/mbpp.jsonl", 4)])
def test_reference_solutions_pass_and_mutated_ones_fail(file: str, every: int) -> None:
    tasks = load_tasks(asset(f"data/{file}"))[::every]
    sandbox = Sandbox()
    right = sandbox.run_all([task.program(task.solution) for task in tasks])
    assert [task.name for task, done in zip(tasks, right, strict=True) if not done.passed] == []
    mutated = [task.program(task.solution.replace("return", "return not ").replace("print(", "(")) for task in tasks]
    wrong = sandbox.run_all(mutated)
    # What asks for a boolean and is tested with one side only, or returns nothing, survives the mutation.
    assert sum(done.passed for done in wrong) <= 0.02 * len(tasks)
