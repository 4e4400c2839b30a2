"""The report opens offline in a real browser, shows what the records say, and breaks on none of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rankfold.plan import Option, Plan
from rankfold.record import Record
from rankfold.reports.fronts import pareto
from rankfold.reports.page import read_records, write_page
from rankfold.reports.section import label

CONTEXT = {"model": "m", "seed": 0, "versions": {"python": "3.11", "rankfold": "0.1.0"}, "hardware": {"cpu": "x"}}
SITES = [f"model.layers.{block}.{kind}" for block in range(3) for kind in ("self_attn.q_proj", "mlp.up_proj")]


def record(
    subject: str, name: str, value: float | None, unit: str = "1", error: float | None = None, **more: Any
) -> Record:
    return Record(subject=subject, name=name, value=value, unit=unit, error=error, context={**CONTEXT, **more})


def everything() -> list[Record]:
    """Records of every verb."""
    records = []
    for trial in range(12):
        facts = {"trial": trial, "start": "dense" if trial == 0 else "", "on_front": trial % 2 == 0}
        records.append(record(f"trial {trial}", "quality", 0.1 * trial, "nat/token", 0.01, **facts))
        records.append(record(f"trial {trial}", "bytes", 1000 - 50 * trial, "byte", **facts))
    for subject, loss, memory, accuracy in (
        ("dense", 2.0, 1000, 0.6),
        ("int8", 2.01, 500, 0.59),
        ("nf4", 2.1, 250, 0.4),
    ):
        records.append(record(subject, "loss", loss, "nat/token", 0.01, data="text"))
        records.append(record(subject, "memory", memory, "byte"))
        records.append(record(subject, "decode", memory / 1e5, "second", contended=subject == "nf4"))
        records.append(record(subject, "energy", None, "joule", unavailable="no RAPL counter"))
        facts = {"metric": "acc", "items": 50}
        records.append(record(subject, "arc_easy acc", accuracy, error=0.07, **facts))
        if subject != "dense":
            facts |= {"minus": "dense", "mcnemar_p": 0.5}
            records.append(record(subject, "arc_easy acc", accuracy - 0.6, error=0.02, **facts))
    for number, site in enumerate(SITES):
        facts = {"by": "site", "group": site, "sites": [site], "share": 0.5, "ranks": [4], "removed_of_model": 0.01}
        records.append(record("m", "loss_rise", 0.01 * number, "nat/token", 0.001, **facts))
    for share in (0.25, 0.5):
        facts = {"by": "kind", "group": "mlp.up_proj", "sites": SITES[:3], "share": share, "ranks": [4]}
        records.append(record("m", "loss_rise", share, "nat/token", 0.01, removed_of_model=0.1 - share / 10, **facts))
    records.append(record(SITES[0], "break_even_rank", 8, kind="q_proj", spectrum=[1.0, 0.5, 0.1]))
    machine = {"bandwidth": 1e10, "arithmetic": 1e11, "compute_to_model_size": 1.0}
    records += [record("machine", name, value) for name, value in machine.items()]
    facts = {"tokens": 1, "intensity": 0.5, "flops": 1e7, "predicted": 1e-3, "dense": True}
    records.append(record("8 x 8, dense", "roofline", 1.1e-3, "second", **facts))
    records.append(
        record("nf4", "failure sign", None, sign="accuracy", text="20 points <script>alert(1)</script> below")
    )
    return records


def plan() -> Plan:
    option = Option(sites=(SITES[0],), form="low_rank", ranks=(4,), method="svd", parameters=100, bytes=400, loss=0.1)
    return Plan(options=(option,), method="svd")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_page(everything(), path, title="All of it <b>&</b>", plan=plan())
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, headless."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with api.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


def opened(browser: Any, page: Path, **settings: Any) -> tuple[Any, list[str]]:
    """The page in a tab that reaches no network, and what its console complains of."""
    context = browser.new_context(offline=True, viewport={"width": 1200, "height": 900}, **settings)
    tab = context.new_page()
    complaints: list[str] = []
    tab.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.goto(page.as_uri())
    tab.wait_for_selector(".plot .main-svg")
    return tab, complaints


def test_every_section_is_drawn_without_a_complaint(browser: Any, page: Path) -> None:
    tab, complaints = opened(browser, page)
    titles = tab.locator("h2").all_text_contents()
    assert titles == [
        "What was run", "Warnings", "Quality against cost", "Benchmarks", "The chosen plan", "Blocks and tensors",
        "What a rank costs", "Spectra", "Roofline", "All numbers", "How to repeat it",
    ]  # fmt: skip
    plots = tab.locator(".plot").count()
    assert plots == tab.locator(".plot > .plot-container").count() == 7
    assert complaints == []
    assert tab.title() == "All of it <b>&</b>"
    assert "<script>alert(1)" in tab.locator("#signs").inner_text()


def test_hovering_shows_the_trial_and_its_numbers(browser: Any, page: Path) -> None:
    tab, _ = opened(browser, page)
    point = tab.locator("#pareto-plot .scatterlayer .trace").nth(1).locator(".points path").first
    point.scroll_into_view_if_needed()
    shown = tab.locator("#pareto-plot .hoverlayer")
    # On a busy machine the page may still be moving when the place of the point is read.
    for _ in range(20):
        box = point.bounding_box()
        tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=4)
        tab.wait_for_selector("#pareto-plot .hoverlayer .hovertext")
        if "trial 1" in shown.text_content():
            break
        tab.mouse.move(0, 0)
    assert "trial 1" in shown.text_content()


def test_filter_and_cost_control_work_from_the_keyboard(browser: Any, page: Path) -> None:
    tab, complaints = opened(browser, page)
    tab.focus("[data-filter='numbers-table']")
    tab.keyboard.type("nf4 energy")
    rows = tab.locator("#numbers-table tbody tr:visible")
    assert rows.count() == 1
    assert "unavailable: no RAPL counter" in rows.first.inner_text()
    assert tab.locator("[data-count='numbers-table']").inner_text().startswith("1 of ")
    before = tab.locator("#pareto-plot .xtitle").text_content()
    tab.select_option("[data-choose='pareto-plot']", index=1)
    tab.wait_for_function("text => document.querySelector('#pareto-plot .xtitle').textContent !== text", arg=before)
    assert complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(browser: Any, page: Path, scheme: str) -> None:
    tab, _ = opened(browser, page, color_scheme=scheme)
    ink, paper = tab.evaluate(
        "() => [getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    axis = tab.evaluate("() => getComputedStyle(document.querySelector('#pareto-plot .xtitle')).fill")
    assert contrast(ink, paper) > 7
    assert contrast(axis, paper) > 7


def contrast(one: str, other: str) -> float:
    """Ratio of luminances, as WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        parts = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_it_can_be_printed_and_heard(browser: Any, page: Path) -> None:
    tab, _ = opened(browser, page, color_scheme="dark")
    tab.emulate_media(media="print")
    assert tab.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not tab.locator("nav").is_visible()
    assert len(tab.pdf()) > 10_000
    tab.emulate_media(media="screen")
    for plot in tab.locator(".plot").all():
        assert plot.get_attribute("role") == "img"
        assert len(plot.get_attribute("aria-label")) > 20
    assert tab.locator("figure details table").count() == 7
    assert tab.evaluate("() => document.documentElement.lang") == "en"


def test_a_report_of_few_records_has_few_sections(tmp_path: Path) -> None:
    write_page([record("model", "perplexity", 6.0)], tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "All numbers" in text
    assert "Roofline</h2>" not in text
    assert "https://" not in text.split("<script>")[0]


def test_bad_records_are_named(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    with pytest.raises(ValueError, match="cannot be read"):
        read_records([file])
    file.write_text("")
    with pytest.raises(ValueError, match="at least one record"):
        read_records([file])
    file.write_text(json.dumps({"subject": "x"}) + "\n")
    with pytest.raises(ValueError, match=r"line 1: not a record"):
        read_records([file])
    newer = {"subject": "x", "name": "y", "value": 1, "unit": "1", "error": None, "context": {}, "quantile": 0.5}
    file.write_text(json.dumps(newer) + "\n")
    with pytest.raises(ValueError, match="If a newer version wrote it"):
        read_records([file])
    with pytest.raises(ValueError, match=r"must be named \.html"):
        write_page(everything(), tmp_path / "report.pdf")
    with pytest.raises(ValueError, match="does not exist"):
        write_page(everything(), tmp_path / "nowhere" / "report.html")
    assert list(tmp_path.glob(".*.part")) == []


def test_trials_of_two_studies_are_not_mixed(tmp_path: Path) -> None:
    records = []
    for model, quality in (("a", 0.1), ("b", 0.2)):
        for name, value in (("quality", quality), ("bytes", 10.0)):
            facts = {**CONTEXT, "model": model, "trial": 0, "start": "", "on_front": True}
            records.append(Record(subject="trial 0", name=name, value=value, unit="1", context=facts))
    (section,) = pareto(records, None)
    assert [row[1] for row in section.figures[0].rows] == ["a, trial 0", "b, trial 0"]


def test_names_of_files_tell_models_apart(tmp_path: Path) -> None:
    for name in ("int8", "rank"):
        line = record("compressed", "loss", 1.0, data="d").to_json()
        (tmp_path / f"{name}.jsonl").write_text(line + "\n")
    found = read_records([tmp_path / "int8.jsonl", tmp_path / "rank.jsonl"])
    assert [label(r) for r in found] == ["m (int8)", "m (rank)"]
    (tmp_path / "other.jsonl").write_text(record("dense", "loss", 1.0, model={"name": "n", "digest": "1"}).to_json())
    (tmp_path / "dense.jsonl").write_text(record("dense", "loss", 1.0).to_json())
    found = read_records([tmp_path / "dense.jsonl", tmp_path / "other.jsonl"])
    assert [label(r) for r in found] == ["dense, m", "dense, n"]
    names = [record("compressed", "loss", 1.0, model={"name": "m", "digest": digest}) for digest in ("aaaaaaaa", "b2")]
    (tmp_path / "both.jsonl").write_text("".join(made.to_json() + "\n" for made in names))
    assert [label(r) for r in read_records([tmp_path / "both.jsonl"])] == ["m (aaaaaa)", "m (b2)"]
