"""The demo's numbers as tables and as a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from hf_cka.cli.demo_steps import Adapted, Pruned
from hf_cka.evaluation.blocks import Block, Check, Checks, Heatmap, LayerScores, LayerStack, Strip, Table
from hf_cka.evaluation.report import Highlight, ReportData, Section, library_versions
from hf_cka.selection import LayerSelection

if TYPE_CHECKING:
    import numpy as np


def adapted_table(rows: Sequence[Adapted]) -> Table:
    """Return the LoRA runs side by side."""
    return Table(
        "LoRA in all layers, the CKA half and a random half",
        ("LoRA in", "layers", "trainable", "held-out loss", "exact match", "s / step", "peak MiB"),
        tuple(
            (r.name, r.layers, r.trainable, r.loss, r.exact, r.seconds_per_step, r.peak_mib and round(r.peak_mib))
            for r in rows
        ),
        note="One seed, and a short run: a difference between the two halves that is smaller than what another seed "
        "would give says nothing. Peak memory is that of the whole process.",
    )


def pruned_table(rows: Sequence[Pruned]) -> Table:
    """Return the dense and the pruned models side by side."""
    return Table(
        "Before and after pruning, without any training in between",
        ("model", "removed layers", "parameters", "held-out perplexity", "tokens / s"),
        tuple(
            (r.name, ", ".join(map(str, r.removed)) or "none", r.parameters, r.perplexity, r.tokens_per_second)
            for r in rows
        ),
        note="Perplexity on documentation text that no layer was chosen by. Lower is better.",
    )


def build(
    selection: LayerSelection,
    choices: Mapping[str, LayerSelection],
    heat: np.ndarray,
    adapted: Sequence[Adapted],
    pruned: Sequence[Pruned],
    inside: Sequence[Block],
    saved: str,
    checks: Sequence[tuple[str, bool]],
    *,
    settings: Mapping[str, Any],
    command: str,
) -> ReportData:
    """Put everything the demo measured into one report.

    Args:
        selection: by CKA.
        choices: the layers of each LoRA run, by name.
        heat: CKA of every point between layers with every other, ``(layers + 1, layers + 1)``.
        adapted: the LoRA runs, the untuned model first.
        pruned: dense first, then the pruned models.
        inside: how dense and pruned differ inside and in what they say.
        saved: what was saved, as one line.
        checks: what was verified, and whether it held.
        settings: what decided the numbers.
        command: that made them.
    """
    by_name = {row.name: row for row in adapted}
    every, half = by_name["all layers"], by_name["CKA half"]
    dense, small = pruned[0], pruned[1]
    controls = {name: choice.layers for name, choice in choices.items() if choice.criterion == "random"}
    return ReportData(
        title="hf_cka demo",
        summary="Layers scored by CKA, LoRA in the ones that matter, and the ones that matter least removed: "
        "every number below was measured in this run.",
        highlights=(
            Highlight(
                "trainable parameters",
                f"{half.trainable / every.trainable:.0%}",
                "of LoRA in all layers, with the CKA half",
            ),
            Highlight("held-out loss", f"{half.loss:.3f}", f"with half the layers; {every.loss:.3f} with all of them"),
            Highlight(
                "parameters left",
                f"{small.parameters / dense.parameters:.0%}",
                f"after removing {len(small.removed)} layers",
            ),
            Highlight(
                "perplexity",
                f"{small.perplexity:.1f}",
                f"after pruning, before any recovery; {dense.perplexity:.1f} dense",
            ),
        ),
        sections=(
            Section(
                "What each layer does",
                (
                    LayerScores(
                        "Change that each layer makes",
                        scores=selection.scores,
                        selected=selection.layers,
                        errors=selection.errors,
                        status=selection.status,
                        controls=controls,
                        note=_ties_note(selection),
                    ),
                    Heatmap(
                        "CKA between all points of the model",
                        tuple(tuple(None if v != v else float(v) for v in row) for row in heat),
                        rows="point (0: embeddings, i: output of layer i - 1)",
                        columns="point",
                    ),
                ),
                text="A layer whose output is unlike its input matters more for adaptation.",
            ),
            Section("Adaptation", (adapted_table(adapted),), text="Through TRL's SFTTrainer, on a generated task."),
            Section(
                "Pruning",
                (
                    pruned_table(pruned),
                    LayerStack(
                        "Layers kept and removed",
                        tuple(Strip(row.name, selection.num_hidden_layers, removed=row.removed) for row in pruned),
                    ),
                ),
            ),
            Section(
                "What pruning changed",
                tuple(inside),
                text="The same texts through the dense model and the one pruned by CKA, before any recovery.",
            ),
            Section(
                "The saved checkpoint",
                (Checks("What was verified", tuple(Check(name, passed) for name, passed in checks)),),
                text=saved,
            ),
        ),
        settings=dict(settings),
        versions=library_versions(),
        command=command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _ties_note(selection: LayerSelection) -> str:
    if not selection.ties:
        return ""
    layers = ", ".join(map(str, selection.ties))
    return f"Layers {layers} lie within one standard error of the cut: more samples may choose otherwise."
