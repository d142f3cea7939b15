"""A report with every kind of block and every awkward value, for the tests of the page."""

from __future__ import annotations

import math

from hf_cka.evaluation import (
    Check,
    Checks,
    Curve,
    Curves,
    Excerpt,
    Excerpts,
    Frontier,
    Heatmap,
    Highlight,
    LayerScores,
    LayerStack,
    Point,
    ReportData,
    Section,
    Strip,
    Table,
    library_versions,
)  # fmt: skip

LAYERS = 30


def sample() -> ReportData:
    scores = tuple(None if i == 4 else 0.4 if i in (0, 29) else 0.01 + 0.001 * i for i in range(LAYERS))

    def similarity(i: int, j: int) -> float | None:
        if (i, j) == (3, 5):
            return None
        return 0.02 if 30 in (i, j) and i != j else 1 - 0.01 * abs(i - j)

    matrix = tuple(tuple(similarity(i, j) for j in range(31)) for i in range(31))
    return ReportData(
        title="SmolLM2 <135M> & friends",
        summary="A summary with a_very_long_unbroken_name_" + "x" * 120,
        highlights=(Highlight("Parameters", "−10.5 %", "134.5 M to 120.4 M"), Highlight("Perplexity", "19.5 → 35.8")),
        sections=(
            Section(
                "Which layers matter",
                (
                    LayerScores(
                        "Scores", scores, selected=(0, 29), errors=tuple(0.02 if s else None for s in scores),
                        status=tuple("constant" if s is None else "ok" for s in scores),
                        controls={"random": (1, 2), "block influence": (3,)}, note="A note.",
                    ),
                    Heatmap("Similarity", matrix, rows="layer input", columns="layer input"),
                    Heatmap(
                        "Dense and pruned", tuple(row[:3] for row in matrix), rows="dense layer",
                        columns="pruned layer", column_labels=("0", "17", "29"),
                    ),
                ),
                text="Some text.",
            ),
            Section(
                "Pruning",
                (
                    LayerStack(
                        "What was removed",
                        (
                            Strip("dense", 30), Strip("pruned", 30, (11, 12), (20,), (25,)),
                            Strip("narrower", 30, attention_share=(0.67,) * 30, mlp_share=(1.0, 0.2, 0.5) * 10),
                        ),
                    ),
                    Frontier(
                        "Quality over size",
                        (
                            Point("dense", 134515008, 19.5), Point("depth", 120354624, 35.8),
                            Point("width", 120e6, 25.9), Point("magnitude <all>", 121e6, 172345.0),
                            Point("width, repaired and recovered", 106e6, 35.0),
                        ),
                    ),
                    Curves(
                        "Recovery",
                        (
                            Curve("training", tuple((i, 3 - 0.02 * i + 0.1 * (i % 5)) for i in range(60))),
                            Curve("evaluation", ((0, 3.4), (30, 2.6), (59, math.inf))),
                        ),
                    ),
                    Excerpts(
                        "Where they disagree",
                        (
                            Excerpt("A text <b>with</b> a long word " + "z" * 120, {"KL": 1.25, "dense says": " cat"}),
                            Excerpt("Two\nlines", {"KL": None}),
                        ),
                        note="Most first.",
                    ),
                    Table(
                        "Before and after", ("model", "parameters", "perplexity", "tokens per second", "exact match"),
                        (("dense", 134515008, 19.5019, 31.2, "50 % ± 7"), ("pruned", 120354624, math.inf, None, "0 %")),
                        note="One seed.",
                    ),
                    Checks("Checks", (Check("reloads", True, "out/" + "y" * 90), Check("cache", False))),
                ),
            ),
        ),
        settings={"model": "from <the index>", "seed": 0},
        versions=library_versions(),
        command="hf-cka demo --output out",
        created="today",
        results=({"model": "dense", "perplexity": 19.5}, {"model": "broken", "perplexity": math.inf}),
        notes="On one text.",
    )  # fmt: skip
