"""Pages: every snippet in them runs, what is generated is current, and the site builds without a warning."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import run
from conftest import ROOT

import rankfold
from rankfold.cli import VERBS
from rankfold.pipeline import read_text

PAGES = [ROOT / "README.md", ROOT / "docs" / "index.md", *sorted((ROOT / "docs" / "guide").glob("*.md"))]

DEEP = "HuggingFaceTB/SmolLM2-135M"
"""The model of the pages."""

NAMES = {"240MB": "500KB", "120MB": "500KB", "--speedup 1.5": "--keep 0.8"}
"""What a page says, and what suits the small model that stands for its own here; no time does."""

BRIEF = {
    "compress": "--sequences 4 --length 32",
    "quantize": "--sequences 4 --length 32",
    "adapt": "--sequences 4 --length 32",
    "measure": "--windows 2 --no-latency",
    "recover": "--steps 2 --batch 2 --length 32",
    "sensitivity": "--share 0.5 --sequences 4 --windows 2",
    "explore": "--sequences 4 --windows 2",
}
"""What makes a command brief; a page shows its defaults."""


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.S | re.M)


@pytest.fixture(scope="module")
def small(shallow: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed model, which many pages begin with."""
    folder = tmp_path_factory.mktemp("docs") / "small"
    run("compress", str(shallow), str(folder), "--method", "svd")
    return folder


@pytest.fixture
def desk(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what pages take for granted; the one call reads little text."""
    texts = [f"def function_{i}(x):\n    return x + {i}\n" for i in range(400)]
    for name in ("my_text.jsonl", "other_text.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "my_texts.txt").write_text("".join("word " * 60 + "\n" for _ in range(6)))
    monkeypatch.chdir(tmp_path)

    def briefly(*given: Any, **settings: Any) -> Any:
        return read_text(*given, **{**settings, "sequences": 4, "length": 32})

    monkeypatch.setattr("rankfold.pipeline.front_door.read_text", briefly)
    return tmp_path


def here(text: str, shallow: Path) -> str:
    for name, other in ({DEEP: str(shallow)} | NAMES).items():
        text = text.replace(name, other)
    return text


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page: Path, desk: Path, small: Path, shallow: Path) -> None:
    from rankfold.allocation import ALLOCATIONS
    from rankfold.factorization import METHODS

    space: dict[str, Any] = {}
    added = {id(table): set(table) for table in (METHODS, ALLOCATIONS)}
    try:
        for block in blocks(page, "python"):
            # A page that saves a model does not expect it to be there, and one that only loads it does.
            shutil.rmtree("small", ignore_errors=True)
            if ".save(" not in block:
                shutil.copytree(small, "small")
            exec(compile(here(block, shallow), str(page), "exec"), space)
    finally:
        for table in (METHODS, ALLOCATIONS):
            for name in set(table) - added[id(table)]:
                del table[name]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh")], ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(page: Path, desk: Path, small: Path, shallow: Path) -> None:
    lines = [line.partition("    #")[0] for block in blocks(page, "sh") for line in block.splitlines()]
    commands = [shlex.split(here(line, shallow)) for line in lines if line.startswith("rankfold ")]
    made = {argument for _, verb, *rest in commands if verb in ("compress", "export") for argument in rest[1:2]}
    if "small/" not in made:
        shutil.copytree(small, "small")
    for _, verb, *arguments in commands:
        assert verb in VERBS
        if verb == "benchmark":
            pytest.importorskip("lm_eval")
        run(verb, *arguments, *shlex.split(BRIEF.get(verb, "")))
    for line in lines:
        assert line.startswith(("rankfold ", "make ", "pip install ", "python ")) or not line.strip(), line


def test_the_command_line_page_is_that_of_the_parser() -> None:
    from cli_page import page

    assert (ROOT / "docs" / "reference" / "cli.md").read_text() == page()


def test_the_page_of_figures_is_that_of_the_program() -> None:
    from figures import page

    assert (ROOT / "docs" / "figures.md").read_text() == page()


def test_the_readme_is_one_screen_first() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.encode()) < 6000
    assert readme.index("```sh") < readme.index("```python") < readme.index("<!-- numbers:begin -->")


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs mkdocs: pip install -e '.[docs]'")
    pytest.importorskip("mkdocstrings", reason="needs mkdocstrings: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr
    page = (tmp_path / "site" / "reference" / "api" / "index.html").read_text()
    for name in rankfold.__all__:
        assert name in page, f"the API reference lacks {name}"


def test_the_paths_that_pages_and_tests_cite_exist() -> None:
    """Programs, pages and results that a reader would look for."""
    cited = re.compile(r"\b((?:docs|benchmarks|experiments|examples|models|tests)/[\w./-]*\w\.(?:py|md|jsonl|ipynb))\b")
    places = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "rankfold").rglob("*.py")]
    places += [*(ROOT / "tests").rglob("*.py"), *(ROOT / "experiments").glob("*.py"), ROOT / "Makefile"]
    missing = {
        f"{place.relative_to(ROOT)}: {path}"
        for place in places
        if place.name not in ("log.md", "CHANGELOG.md")
        for path in cited.findall(place.read_text())
        if not (ROOT / path).exists()
    }
    assert not missing
