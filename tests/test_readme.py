"""What the README says is true."""

from __future__ import annotations

import ast
import re

from conftest import ROOT


def tree_of_the_readme() -> dict[str, str]:
    """Path and comment of every line of the README's tree."""
    block = re.search(r"```\nrankfold/\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert block
    found, folders = {}, []
    for line in block.group(1).splitlines():
        depth = (len(line) - len(line.lstrip())) // 2 - 1
        name, _, comment = line.strip().partition("  ")
        folders[depth:] = [name.rstrip("/")]
        found["/".join(folders)] = comment.strip()
    return found


def tree_of_the_package() -> dict[str, str]:
    """Path and docstring of every module; a folder has that of its `__init__`."""
    found = {}
    for path in (ROOT / "rankfold").rglob("*.py"):
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        relative = path.relative_to(ROOT / "rankfold")
        name = str(relative.parent) if path.name == "__init__.py" else str(relative)
        if name != ".":
            found[name] = docstring or ""
    return found


def test_the_tree_is_that_of_the_modules() -> None:
    assert tree_of_the_readme() == tree_of_the_package()


def test_every_module_docstring_is_one_sentence() -> None:
    for path, docstring in tree_of_the_package().items():
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
