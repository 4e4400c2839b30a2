"""One page that opens offline, from records alone: what was run, what it cost, what it gave, and how to repeat it."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from rankfold.errors import InputError
from rankfold.plan import Plan
from rankfold.record import Record
from rankfold.reports.section import Figure, Section, model_name
from rankfold.reports.sections import SECTIONS


def read_records(files: Sequence[Path]) -> list[Record]:
    """The records of some files, each with the label under which pages show its subject.

    Raises:
        ValueError: If a file is missing, empty, or holds something else or what a newer rankfold wrote.
    """
    records: list[Record] = []
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{file}: the records cannot be read ({error}). Name a file that rankfold wrote."
            ) from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = Record.from_json(line)
                if not math.isfinite(float(record.value or 0)) or not math.isfinite(float(record.error or 0)):
                    raise InputError(f"{record.name} is not finite")
            except (ValueError, TypeError) as error:
                raise InputError(
                    f"{file}, line {number}: not a record that this rankfold knows ({error}). If a newer version "
                    "wrote it, install that: pip install --upgrade rankfold"
                ) from error
            records.append(replace(record, context={**record.context, "file": file.stem}))
    if not records:
        raise InputError(f"{', '.join(map(str, files))}: a report needs at least one record, but there is none.")
    return labelled(records)


def labelled(records: Sequence[Record]) -> list[Record]:
    """Records with a label for what they observe, so that subjects of the same name are told apart.

    `dense`, `compressed` and `model` are parts that a model plays: where records of several models play the same
    part, the model's own name joins the label. Two of the same name are told apart by their files or their digests.
    """
    players: dict[str, dict[str, dict[tuple[str, str], None]]] = {}
    for record in records:
        place = (str(record.context.get("file", "")), str(_digest(record)))
        players.setdefault(record.subject, {}).setdefault(model_name(record), {})[place] = None
    result = []
    for record in records:
        label, name = record.subject, model_name(record)
        named, same = players[record.subject], list(players[record.subject][name])
        played = record.subject in ("compressed", "model")
        if played or len(named) > 1:
            label = (name if played else f"{record.subject}, {name}") if name else record.subject
        if len(same) > 1 and (played or len({digest for _, digest in same}) > 1):
            file, digest = str(record.context.get("file", "")), str(_digest(record))
            alone = len([place for place in same if place[0] == file]) == 1
            label += f" ({file})" if file and alone else f" ({digest[:6]})"
        result.append(replace(record, context={**record.context, "label": label}))
    return result


def _digest(record: Record) -> Any:
    model = record.context.get("model")
    return model.get("digest") if isinstance(model, Mapping) else None


def report(
    records: Sequence[Record],
    path: str | Path = "report.html",
    *,
    title: str = "Rankfold report",
    plan: Plan | None = None,
) -> Path:
    """Make one self-contained page from records, which opens offline.

    Args:
        records: From any verb, of one model or of several.
        path: The file, `.html`.
        title: Title of the page.
        plan: The plan that was chosen, if any.

    Raises:
        ValueError: If there are no records, the folder does not exist, or plotly is missing.
    """
    if not records:
        raise InputError("A report needs at least one record, but got none.")
    write_page(labelled(records), Path(path), title=title, plan=plan)
    return Path(path)


def write_page(
    records: Sequence[Record], path: Path, *, title: str = "Rankfold report", plan: Plan | None = None
) -> None:
    """Write the report, whole or not at all.

    Args:
        records: What it shows; each section appears where there is something for it.
        path: The file, `.html`.
        title: Title of the page.
        plan: The plan that was chosen, if any.

    Raises:
        ValueError: If the folder does not exist or plotly is missing.
    """
    if path.suffix != ".html":
        raise InputError(f"{path}: a report must be named .html.")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist. Make it first.")
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise InputError("A report needs plotly: pip install 'rankfold[report]'") from error
    sections = [section for make in SECTIONS for section in make(records, plan)]
    figures = [figure for section in sections for figure in section.figures]
    template = resources.files("rankfold.reports").joinpath("page.html").read_text(encoding="utf-8")
    parts = {
        "title": html.escape(title),
        "contents": "".join(f'<li><a href="#{s.name}">{html.escape(s.title)}</a></li>' for s in sections),
        "body": "".join(map(_section, sections)),
        "figures": _script_json({figure.name: {"data": figure.data, "layout": figure.layout} for figure in figures}),
        "plotly": get_plotlyjs() if figures else "",
    }
    for name, text in parts.items():
        template = template.replace(f"<!--{name}-->", text)
    made = path.with_name(f".{path.name}.part")
    try:
        made.write_text(template, encoding="utf-8")
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)


def _script_json(value: Any) -> str:
    """JSON that no text within it can break out of its script."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")


def _section(section: Section) -> str:
    text = "".join(f"<p>{html.escape(line)}</p>" for line in section.text)
    figures = "".join(map(_figure, section.figures))
    tables = "".join(_table(section.name, *table) for table in section.tables)
    code = "".join(f"<pre><code>{html.escape(block)}</code></pre>" for block in section.code)
    return (
        f'<section id="{section.name}" aria-labelledby="{section.name}-title">'
        f'<h2 id="{section.name}-title">{html.escape(section.title)}</h2>{text}{figures}{tables}{code}</section>'
    )


def _figure(figure: Figure) -> str:
    """A figure, a control that chooses its axis where there are several, and its numbers for who cannot see it."""
    control = ""
    if figure.choices:
        options = "".join(
            f'<option value="{number}">{html.escape(name)}</option>' for number, name in enumerate(figure.choices)
        )
        control = f'<label class="control">Cost <select data-choose="{figure.name}">{options}</select></label>'
    caption = html.escape(figure.caption)
    table = _table(figure.name, "", figure.header, figure.rows, filtered=False)
    return (
        f"<figure>{control}"
        f'<div class="plot" id="{figure.name}" role="img" aria-label="{caption}"></div>'
        f"<figcaption>{caption}</figcaption>"
        f"<details><summary>Numbers</summary>{table}</details></figure>"
    )


def _table(name: str, caption: str, header: Sequence[str], rows: Iterable[Sequence[str]], filtered: bool = True) -> str:
    rows = list(rows)
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    label = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    control = ""
    if filtered and len(rows) > 12:
        control = (
            f'<label class="control">Filter <input type="search" data-filter="{name}-table" '
            f'placeholder="model or measure"> <output data-count="{name}-table">{len(rows)} rows</output></label>'
        )
    table = f"{label}<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'{control}<div class="scroll" tabindex="0"><table id="{name}-table">{table}</table></div>'
