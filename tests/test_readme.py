"""What the README says is true."""

from __future__ import annotations

import re

from conftest import ROOT


def test_the_page_on_architecture_is_that_of_the_modules() -> None:
    from architecture_page import page

    assert (ROOT / "docs" / "architecture.md").read_text() == page()


def test_what_makes_figures_can_be_asked_to_measure_anew() -> None:
    from figures import MEASURE

    for program in MEASURE:
        code = (ROOT / program.command.split()[0]).read_text()
        assert "Results(" in code or "asked_afresh()" in code, program.name


def test_every_module_docstring_is_one_sentence() -> None:
    from architecture_page import modules

    for path, docstring in modules().items():
        assert docstring.endswith("."), path
        assert "\n" not in docstring, path


def test_the_paths_that_documents_name_exist() -> None:
    for document in ("README.md", "CONTRIBUTING.md", "docs/mathematics.md"):
        for path in re.findall(
            r"\]\(((?:docs|benchmarks|experiments|models|examples)/[^)#]+)\)", (ROOT / document).read_text()
        ):
            assert (ROOT / path).exists(), f"{document}: {path}"


def test_every_cited_equation_exists() -> None:
    equations = set(re.findall(r"^\*\*\((\d+)\)", (ROOT / "docs" / "mathematics.md").read_text(), re.M))
    for path in (ROOT / "rankfold").rglob("*.py"):
        for number in re.findall(r"mathematics\.md, eq\. (\d+)", path.read_text()):
            assert number in equations, f"{path.name} cites equation {number}"


def test_the_numbers_are_those_of_the_results() -> None:
    from readme_numbers import with_numbers

    readme = (ROOT / "README.md").read_text()
    assert with_numbers(readme) == readme


def test_the_page_on_lord_is_that_of_the_results() -> None:
    from lord_page import page

    assert (ROOT / "docs" / "lord.md").read_text() == page()


def test_results_name_no_path_of_one_machine() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("*.jsonl"):
        assert not re.search(r'"/[a-z]', path.read_text()), path.name


def test_the_page_on_characterization_is_that_of_the_results() -> None:
    from characterization_page import page

    assert (ROOT / "docs" / "characterization.md").read_text() == page()
