"""Make the bundled texts from the standard library of the running interpreter.

    python experiments/make_sample.py

Three files in rankfold/calibration/sample: a mixed sample for calibration (Python source and the English of the
language reference), held-out Python (packages that `train_code_model.py` keeps out of training) and held-out English.
All of it is the work of the Python Software Foundation under PSF-2.0, as NOTICE says; each row names its file.
"""

from __future__ import annotations

import gzip
import json
import platform
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from train_code_model import HELD_OUT

from rankfold.calibration import overlap

SAMPLE = Path(__file__).parent.parent / "rankfold" / "calibration" / "sample"
SEED = 0


def python_rows(held_out: bool, characters: int) -> list[dict[str, str]]:
    """Files of the standard library in random order, up to a number of characters; long ones are cut at a line."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {
        "site-packages",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "encodings",
        "turtledemo",
        "distutils",
    }
    paths = [path for path in sorted(root.rglob("*.py")) if not skipped & set(path.relative_to(root).parts)]
    rows, total = [], 0
    for index in np.random.default_rng(SEED).permutation(len(paths)):
        path = paths[index].relative_to(root)
        text = paths[index].read_text(encoding="utf-8", errors="ignore")[:12_000].rpartition("\n")[0]
        if (path.parts[0].removesuffix(".py") in HELD_OUT) != held_out or len(text) < 500:
            continue
        rows.append(_row(text, str(path)))
        total += len(text)
        if total >= characters:
            break
    return rows


def english_rows(held_out: bool, characters: int) -> list[dict[str, str]]:
    """Topics of the language reference, every second one held out."""
    rows, total = [], 0
    topic_of = {text: topic for topic, text in sorted(topics.items())}
    for index, (text, topic) in enumerate(topic_of.items()):
        if (index % 2 == 1) == held_out and total < characters:
            rows.append(_row(text[:12_000], f"pydoc_data/topics.py#{topic}"))
            total += len(rows[-1]["text"])
    return rows


def unseen(rows: Iterable[dict[str, str]], calibration: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """The rows that share nothing with the calibration sample: topics of the reference quote each other."""
    known = [row["text"] for row in calibration]
    return [row for row in rows if overlap(known, [row["text"]]) == 0]


def _row(text: str, path: str) -> dict[str, str]:
    source = f"CPython {platform.python_version()} standard library"
    return {"source": source, "license": "PSF-2.0", "path": path, "text": text}


def write(name: str, rows: Iterable[dict[str, str]]) -> None:
    """Write one file, its bytes depending on nothing but the rows."""
    SAMPLE.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (SAMPLE / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode(), compresslevel=9, mtime=0))


if __name__ == "__main__":
    calibration = python_rows(False, 260_000) + english_rows(False, 140_000)
    write("calibration", calibration)
    write("python-held-out", unseen(python_rows(True, 260_000), calibration))
    write("english-held-out", unseen(english_rows(True, 140_000), calibration))
