"""The page that a comparison writes, in a browser: drawn, named, of its own, and readable on a phone."""

from __future__ import annotations

import copy

import pytest

from hf_cka import PruningPlan, apply_plan
from hf_cka.evaluation import ComparisonSettings, compare, write_report
from tests.evaluation.browser import browser, find_chromium
from tests.tiny import tiny_model, tiny_tokenizer

pytest.importorskip("jinja2")

ROWS = [
    *(" ".join(f"w{(i * j) % 90 + 1}" for j in range(20)) for i in range(1, 7)),
    *({"question": f"w{i} w{2 * i} w3", "choices": [f"w{i}", "w8 w9"], "gold": i % 2} for i in range(1, 5)),
    *({"prompt": f"w{i} w4", "completion": f" w{i + 1} w5"} for i in range(1, 5)),
]
# text that is wider than its box
OVERLONG = """[...document.querySelectorAll('main p, main dd, main li, h1, h2, figure, figcaption')]
    .filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.textContent)"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    dense = tiny_model("llama")
    pruned = apply_plan(copy.deepcopy(dense), PruningPlan(num_layers=4, model_type="llama", removed_layers=(2,)))
    settings = ComparisonSettings(context=32, max_tokens=64, rows=4, num_samples=6, max_length=24, repeats=1)
    logs = {"pruned": [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}]}
    found = compare(dense, {"pruned": pruned}, ROWS, tokenizer=tiny_tokenizer(), settings=settings, logs=logs)
    return write_report(found.report(), tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="module")
def tab():
    executable = find_chromium()
    if executable is None:
        pytest.skip("no Chromium on the path (apt-get install chromium)")
    with browser(executable) as opened:
        yield opened


def test_it_fits_a_phone_and_a_desk_in_both_colour_schemes(tab, page) -> None:
    grounds = {}
    for width in (390, 1200):
        for dark in (False, True):
            tab.open(page, width=width, dark=dark)
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            assert tab.evaluate(OVERLONG) == []
            grounds[width, dark] = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert grounds[390, False] == grounds[1200, False] != grounds[390, True] == grounds[1200, True]
    assert tab.problems == []
    assert set(tab.requests) == {page.resolve().as_uri()}


def test_every_chart_has_a_name(tab, page) -> None:
    """What a screen reader says: the browser's own accessibility tree."""
    tab.open(page, width=390)
    nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
    named = [
        (node["role"]["value"], node.get("name", {}).get("value", "").strip())
        for node in nodes
        if not node["ignored"] and node["role"]["value"] in ("image", "figure", "graphics-document")
    ]
    charts = tab.evaluate("document.querySelectorAll('svg, img').length")
    assert charts >= 5  # layers, frontier, similarity, change, training
    assert sum(role != "figure" for role, _ in named) == charts
    assert [one for one in named if not one[1]] == []
