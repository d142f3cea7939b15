"""The report is one well-formed, accessible page without anything from outside, and its data survive JSON."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from hf_cka.evaluation import (
    Curve,
    Curves,
    Frontier,
    Heatmap,
    LayerScores,
    Point,
    ReportData,
    Section,
    Strip,
    Table,
    lines,
    plots,
    write_report,
)
from hf_cka.evaluation.report import render

pytest.importorskip("jinja2")

VOID = {"meta", "br", "hr", "img", "link", "input"}


def _load(name: str) -> ModuleType:
    """A neighbour of this file, which is in no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sample = _load("sample_report").sample


class Reader(HTMLParser):
    """Collects the tags with their attributes, and every tag that is closed wrongly or never."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        self.wrong += self.open

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()
        else:
            self.wrong.append(tag)

    def handle_data(self, data) -> None:
        self.text.append(data)

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


@pytest.fixture(scope="module")
def page() -> str:
    return render(sample())


@pytest.fixture(scope="module")
def reader(page: str) -> Reader:
    return Reader(page)


def test_the_page_is_well_formed(page: str, reader: Reader) -> None:
    assert page.lstrip().startswith("<!DOCTYPE html>")
    assert reader.wrong == []
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.S):
        ElementTree.fromstring(svg)


def test_nothing_comes_from_outside(page: str, reader: Reader) -> None:
    for tag, attributes in reader.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed"}
        assert not {"src", "href", "srcset", "xlink:href"} & set(attributes)
    assert "url(" not in page
    assert "@import" not in page
    assert set(re.findall(r"https?://[^\"'\s<]+", page)) <= {"http://www.w3.org/2000/svg"}  # a name, never fetched
    policy = next(m for m in reader.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in (policy["content"] or "")


def test_the_page_is_accessible(reader: Reader) -> None:
    assert reader.all("html")[0]["lang"] == "en"
    assert len(reader.all("title")) >= 1
    assert any(meta.get("name") == "viewport" for meta in reader.all("meta"))
    assert len(reader.all("h1")) == 1
    headers = reader.all("th")
    assert headers
    assert all(header.get("scope") in ("col", "row") for header in headers)
    named = {attributes["id"] for _, attributes in reader.tags if "id" in attributes}
    charts = reader.all("svg")
    assert len(charts) == 6
    for chart in charts:
        assert chart["role"] == "img"
        assert set((chart["aria-labelledby"] or "").split()) <= named
    for region in (tag for tag in reader.all("div") if "scroll" in (tag.get("class") or "")):
        assert region["tabindex"] == "0"  # the keyboard can scroll it
        assert region["aria-label"]


def _luminance(colour: str) -> float:
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_contrast_is_sufficient(page: str, theme: int) -> None:
    """WCAG AA: 4.5 for text, 3 for the lines and marks of the charts, on the page and on the cards."""
    colours = dict(re.findall(r"--(\w+): (#\w{6});", re.findall(r":root \{(.*?)\}", page, flags=re.S)[theme]))
    for ground in ("page", "card"):
        for name, least in {
            "ink": 4.5,
            "soft": 4.5,
            "accent": 4.5,
            "good": 4.5,
            "bad": 4.5,
            "quiet": 3.0,
            "under": 3.0,
        }.items():
            light, dark = sorted((_luminance(colours[name]), _luminance(colours[ground])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= least, f"{name} on {ground}"


def test_what_is_said_is_shown(page: str, reader: Reader) -> None:
    text = re.sub(r"[ \n]+", " ", " ".join(reader.text))
    for words in (
        "SmolLM2 <135M> & friends",
        "134\u2009515\u2009008",
        "19.50",
        "∞",
        "–",
        "50 % ± 7",
        "failed",
        "A note.",
    ):
        assert words in text
    assert "<135M>" not in page  # escaped
    assert "from <the index>" in text
    assert "layer 0: 0.4 ± 0.02, chosen" in text
    assert "layer 4: constant, no score" in text
    assert "layer 20, attention: removed" in text
    assert "layer 20, MLP: kept" in text
    assert "pruned: removed layers 11, 12; attention of 20; MLP of 25." in text


def test_data_survive_json(tmp_path: Path) -> None:
    data = sample()
    file = write_report(data, tmp_path / "new" / "report.html")
    saved = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    again = ReportData.from_dict(saved)
    assert render(again) == file.read_text(encoding="utf-8")
    finite = dataclasses.replace(data, sections=data.sections[:1])
    assert ReportData.from_dict(json.loads(json.dumps(finite.to_dict()))) == finite


def test_a_report_from_the_future_is_refused() -> None:
    with pytest.raises(ValueError, match="format version 99"):
        ReportData.from_dict({**sample().to_dict(), "version": 99})


def test_an_unknown_block_lists_near_names() -> None:
    data = sample().to_dict()
    data["sections"][0]["blocks"][0]["kind"] = "layer_score"
    with pytest.raises(ValueError, match="Did you mean: 'layer_scores'"):
        ReportData.from_dict(data)


def test_the_path_must_be_html(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must end in .html"):
        write_report(sample(), tmp_path / "report.txt")
    assert not list(tmp_path.iterdir())


def test_without_jinja2_the_error_gives_the_command(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r'pip install "hf_cka\[report\]"'):
        write_report(sample(), tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_a_few_large_scores_do_not_flatten_the_others() -> None:
    """The axis becomes logarithmic then, and says so; and it stays linear where values are near zero or below."""
    skewed = plots.layer_scores_svg(LayerScores("s", (0.9, 0.01, 0.02, 0.015), (0,)), "a")
    assert "(log scale)" in skewed
    for scores in ((0.9, -0.01, 0.02, 0.015), (0.5, 0.4, 0.3, 0.2), (0.0, 0.0)):
        assert "(log scale)" not in plots.layer_scores_svg(LayerScores("s", scores, ()), "a")


def test_higher_scores_are_drawn_higher() -> None:
    for scores in ((0.9, 0.01, 0.02, 0.015), (0.5, 0.4, -0.3, 0.2)):
        chart = plots.layer_scores_svg(LayerScores("s", scores, ()), "a")
        heights = [float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', chart)]
        by_score = sorted(range(4), key=lambda i: scores[i])
        assert sorted(range(4), key=lambda i: -heights[i]) == by_score


@pytest.mark.parametrize("scores", [(), (None,), (0.0,), (0.3,), (0.2, 0.2, 0.2), (1e-9, 1.0, 1e-9), (None, 0.1) * 60])
def test_odd_scores_can_be_drawn(scores: tuple) -> None:
    ElementTree.fromstring(plots.layer_scores_svg(LayerScores("s", scores, ()), "a"))


@pytest.mark.parametrize(
    "values", [((1.0,),), ((None,),), ((float("nan"), 1.0),), ((1.0, 1.0), (1.0, 1.0)), ((0.5,) * 80,) * 3]
)
def test_odd_matrices_can_be_drawn(values: tuple) -> None:
    ElementTree.fromstring(plots.heatmap_svg(Heatmap("h", values), "a"))


def test_one_odd_layer_neither_hides_nor_flattens_the_rest() -> None:
    chart = plots.heatmap_svg(sample().sections[0].blocks[1], "a")
    assert chart.count('class="under"') == 60 + 1  # its row and column, and the legend
    assert "below 0.71" in chart
    assert len(set(re.findall(r'fill="(#\w+)"', chart))) > 20


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LayerScores("s", (0.1, 0.2), (2,)), r"selected names layer 2, but there are 2 layers \(0 to 1\)"),
        (lambda: LayerScores("s", (0.1,), (), controls={"random": (-1,)}), "random names layer -1"),
        (lambda: LayerScores("s", (0.1, 0.2), (), errors=(0.1,)), "errors has 1 entries, but there are 2 scores"),
        (lambda: Heatmap("h", ()), "rows of one length"),
        (lambda: Heatmap("h", ((1.0,), (1.0, 2.0))), "rows of one length"),
        (lambda: Heatmap("h", ((1.0, 0.5),), column_labels=("a",)), "column_labels has 1 entries for 2"),
        (lambda: Strip("s", 2, removed=(2,)), "removed names layer 2"),
        (lambda: Strip("s", 2, mlp_share=(0.5,)), "mlp_share must hold one share"),
        (lambda: Strip("s", 1, attention_share=(1.5,)), "attention_share must hold one share"),
        (lambda: Frontier("f", ()), "has no point"),
        (lambda: Frontier("f", (Point("a", 1.0, float("nan")),)), "'a' is at"),
        (lambda: Frontier("f", (Point("a", 1.0, 1.0),), better="more"), "better='more'"),
        (lambda: Curves("c", ()), "has 0 curves"),
        (lambda: Curves("c", (Curve("loss", ()),)), "'loss' of 'c' has no point"),
        (lambda: Table("t", ("a", "b"), (("x",),)), "Row 0 of 't' has 1 cells for 2 columns"),
    ],
)
def test_inconsistent_data_is_refused_when_made(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("values", [(1.0,), (3.0, 3.0), (0.0, -2.0, 5.0), (1e-9, 1e9), (5e9,) * 9])
def test_odd_lines_can_be_drawn(values: tuple) -> None:
    points = tuple(Point(f"<model> {i}", 1e8 - i, value) for i, value in enumerate(values))
    for better in ("lower", "higher"):
        ElementTree.fromstring(lines.frontier_svg(Frontier("f", points, better=better), "a"))
    curve = Curve("loss & more", tuple(enumerate(values)))
    ElementTree.fromstring(lines.curves_svg(Curves("c", (curve,)), "a"))


def test_the_frontier_holds_what_nothing_beats() -> None:
    """Against the definition, on every pair: no other point is at least as good in both and better in one."""
    spots = [(4, 1), (3, 2), (3, 1.5), (2, 5), (1, 4), (5, 1), (4, 1)]
    points = tuple(Point(str(i), x, y) for i, (x, y) in enumerate(spots))
    for sign, better in ((1, "lower"), (-1, "higher")):
        found = {(p.x, p.y) for p in Frontier("f", points, better=better).best}
        unbeaten = {
            (x, y) for x, y in spots
            if not any(a <= x and sign * b <= sign * y and (a, b) != (x, y) for a, b in spots)
        }  # fmt: skip
        assert found == unbeaten


def test_an_empty_report_is_a_page() -> None:
    assert Reader(render(ReportData("Title", "", (Section("Empty"),)))).wrong == []


OVERLONG = """[...document.querySelectorAll('main p, main dd, main li, h1, h2, figure')]
    .filter(e => e.scrollWidth > e.clientWidth + 1).length"""


def _measure(selector: str, side: str) -> str:
    return f"[...document.querySelectorAll('{selector}')].map(e => e.getBoundingClientRect().{side})"


def test_a_browser_shows_it(tmp_path: Path) -> None:
    """Light and dark, wide and 390 pixels: drawn, nothing scrolls sideways, nothing is asked for, nothing complains."""
    browsing = _load("browser")
    executable = browsing.find_chromium()
    if executable is None:
        pytest.skip("no Chromium on the path (apt-get install chromium)")
    file = write_report(sample(), tmp_path / "report.html")
    with browsing.browser(executable) as tab:
        grounds = set()
        for width, dark in ((1200, False), (390, False), (390, True)):
            tab.open(file, width=width, dark=dark)
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            assert all(200 < drawn < width for drawn in tab.evaluate(_measure("figure svg", "width")))
            assert min(tab.evaluate(_measure("svg text", "height"))) > 9  # letters one can read
            assert tab.evaluate(OVERLONG) == 0
            grounds.add(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert len(grounds) == 2
        assert tab.problems == []
        assert set(tab.requests) == {file.resolve().as_uri()}
