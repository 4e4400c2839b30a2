"""Write docs/architecture.md from the package itself: python experiments/architecture_page.py."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent

HEAD = """# Architecture

Written by `python experiments/architecture_page.py` from the modules' docstrings and the floors of `pyproject.toml`; a test
keeps it current. Rooms are nouns, verbs are functions: no function bears the name of a folder.

## Floors

Each room imports only from the floors below it, and rooms on one floor do not import each other. `import-linter` enforces it
(`make check`).

"""

JOINTS = """
## Joints

Whatever is likely to get a second member is a table of entries, open from outside through an entry point of the same name:

| table | an entry says | entry point |
|---|---|---|
| `rankfold.factorization.METHODS` | how a matrix becomes factors, at one rank or at all ranks at once | `rankfold.methods` |
| `rankfold.modules.FORMS` | which matrices stand for a weight: parameters, ranks within a budget, the module, its state on disk | `rankfold.forms` |
| `rankfold.quantization.QUANTIZERS` | how a number is stored: bits, bytes of a shape, quantize, load | `rankfold.quantizers` |
| `rankfold.allocation.ALLOCATIONS` | a choice among the options of every site within a budget | `rankfold.allocations` |

Everything else asks the entry and knows no names. [How to add one](guide/add-a-method.md).

## Modules

"""


def floors() -> list[str]:
    """The floors of `pyproject.toml`, the highest first."""
    text = (ROOT / "pyproject.toml").read_text()
    block = re.search(r"layers = \[\n(.*?)\n\]", text, re.S)
    assert block
    return re.findall(r'"([^"]+)"', block.group(1))


def modules() -> dict[str, str]:
    """Path and docstring of every module; a folder has that of its `__init__`."""
    found = {}
    for path in sorted((ROOT / "rankfold").rglob("*.py")):
        relative = path.relative_to(ROOT / "rankfold")
        name = f"{relative.parent}/" if path.name == "__init__.py" else str(relative)
        if name != "./":
            found[name] = ast.get_docstring(ast.parse(path.read_text())) or ""
    return dict(sorted(found.items()))


def page() -> str:
    """The page."""
    stairs = [f"{len(floors()) - number}. {floor.replace(' | ', ', ')}" for number, floor in enumerate(floors())]
    tree = []
    for name, docstring in modules().items():
        depth = name.rstrip("/").count("/")
        shown = name.rstrip("/").rpartition("/")[2] + ("/" if name.endswith("/") else "")
        tree.append(f"{'  ' * (depth + 1)}{shown}  {docstring}")
    return HEAD + "```\n" + "\n".join(stairs) + "\n```\n" + JOINTS + "```\nrankfold/\n" + "\n".join(tree) + "\n```\n"


if __name__ == "__main__":
    (ROOT / "docs" / "architecture.md").write_text(page())
