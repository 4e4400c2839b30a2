"""Folders are checked before they are read, and written whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rankfold.shards import INDEX, SINGLE, check_folder, check_shard, shard_files, whole_folder


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    save_file({"a": torch.ones(10), "b": torch.zeros(3, 3)}, tmp_path / SINGLE)
    return tmp_path / SINGLE


def test_a_whole_shard_passes(shard: Path) -> None:
    check_folder(shard.parent)


@pytest.mark.parametrize("size", [0, 5, 20, -1])
def test_a_truncated_shard_is_named_with_what_to_do(shard: Path, size: int) -> None:
    content = shard.read_bytes()
    shard.write_bytes(content[:size])
    with pytest.raises(ValueError, match=rf"{SINGLE}.*(again)"):
        check_shard(shard)


def test_a_header_that_is_no_json_is_an_error(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[8] = 0
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="header cannot be read"):
        check_shard(shard)


def test_a_folder_without_weights_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"holds \['pytorch_model.bin'\].*safetensors only"):
        shard_files(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    with pytest.raises(ValueError, match=r"not there: \['one.safetensors'\]"):
        shard_files(tmp_path)


def test_the_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with whole_folder(target) as partial:
        (partial / "file").write_text("x")
        assert not target.exists()
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    assert (target / "file").read_text() == "x"


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with whole_folder(tmp_path / "model") as partial:
            save_file({"a": torch.ones(1)}, partial / SINGLE)
            (partial / "more").mkdir()
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "model", *sorted((tmp_path / "model").iterdir()))]
    assert modes == [0o755, 0o644, 0o755]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "out") as partial:
        (partial / "file").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_replaced_only_when_asked_and_only_when_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("x")
    with pytest.raises(ValueError, match="exists and is not empty.*`overwrite`"), whole_folder(target):
        pass
    with pytest.raises(ValueError, match="only a model folder is overwritten"), whole_folder(target, overwrite=True):
        pass
    (target / "config.json").write_text("{}")
    with pytest.raises(RuntimeError), whole_folder(target, overwrite=True):
        raise RuntimeError
    assert (target / "old").exists()
    with whole_folder(target, overwrite=True) as partial:
        (partial / "new").write_text("y")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to("real")
    with whole_folder(tmp_path / "link", overwrite=True) as partial:
        (partial / "new").write_text("y")
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_a_file_of_that_name_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with (
        pytest.raises(ValueError, match="must be a folder, but a file"),
        whole_folder(tmp_path / "out", overwrite=True),
    ):
        pass


KILLED = """
import sys, time
from pathlib import Path
from rankfold.shards import whole_folder
with whole_folder(Path(sys.argv[1])) as partial:
    (partial / "half").write_bytes(b"x" * 1000)
    print("writing", flush=True)
    time.sleep(60)
"""


def test_a_kill_half_way_leaves_nothing_at_the_target_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(target)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert not target.exists()
    assert len(list(tmp_path.iterdir())) == 1
    with whole_folder(target) as partial:
        (partial / "file").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_retired_by_a_killed_run_comes_back(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    retired = tmp_path / f".out.partial-{dead.pid}-x.old"
    retired.mkdir()
    (retired / "file").write_text("the only copy")
    (retired / "config.json").write_text("{}")
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "out", overwrite=True):
        raise RuntimeError
    assert (tmp_path / "out" / "file").read_text() == "the only copy"


def test_a_running_process_keeps_its_partial_folder(tmp_path: Path) -> None:
    other = tmp_path / f".out.partial-{os.getppid()}-x"
    other.mkdir()
    with whole_folder(tmp_path / "out") as partial:
        (partial / "file").write_text("x")
    assert other.exists()


def test_a_full_disk_leaves_nothing() -> None:
    """On a file system of 1 MB, which only root may make."""
    if os.geteuid() != 0 or sys.platform != "linux":
        pytest.skip("mounting a small file system needs root on Linux")
    script = textwrap.dedent("""
        import subprocess, sys, torch
        from pathlib import Path
        mount = Path(sys.argv[1])
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]).returncode:
            raise SystemExit(77)
        import tiny
        from rankfold import allocate, factorize, find_sites
        from rankfold.checkpoint import save
        model = tiny.build("llama")
        model.register_buffer("large", torch.zeros(1_000_000))
        factorize(model, allocate(find_sites(model).select(), keep=0.5, method="svd"))
        try:
            save(model, None, mount / "out")
        except ValueError as error:
            assert "could not be written" in str(error) and "nothing was left" in str(error), error
        else:
            raise SystemExit("the disk was not full")
        assert list(mount.iterdir()) == [], list(mount.iterdir())
    """)
    mount = Path(os.environ.get("TMPDIR", "/tmp")) / f"rankfold-full-disk-{time.time_ns()}"
    mount.mkdir()
    run = subprocess.run(
        ["unshare", "-m", sys.executable, "-c", script, str(mount)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    mount.rmdir()
    if run.returncode == 77 or "unshare" in run.stderr:
        pytest.skip(f"no small file system could be mounted here: {run.stderr.strip()[-200:]}")
    assert run.returncode == 0, run.stderr[-2000:]
