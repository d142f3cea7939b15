"""How alike the layers of two models are, on the same samples: every layer with every other, and what changed.

Layers are named by their index in the model that was pruned, so that the same number means the same layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hf_cka.data import Batch
from hf_cka.evaluation.blocks import Heatmap, LayerScores
from hf_cka.evaluation.structure import num_original_layers, original_layers
from hf_cka.representations import Pooling, Readouts, collect
from hf_cka.similarity import pairwise_similarity

Matrix = tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class LayerSimilarity:
    """Debiased CKA of the output of every layer of one model with that of every layer of another.

    Args:
        values: a row for each layer of the base, a column for each layer of the other; None where it is undefined.
        errors: standard errors, likewise.
        base_layers: original index of each row.
        other_layers: original index of each column.
        num_layers: of the model both come from.
        num_samples: samples measured.
        pooling: how tokens became one vector a sample.

    Example:
        >>> values, errors = ((1.0, 0.5), (0.6, 0.7)), ((0.0, 0.1), (0.1, 0.1))
        >>> similarity = LayerSimilarity(values, errors, (0, 1), (0, 1), 2, 8, "last")
        >>> similarity.ranked
        (1, 0)
    """

    values: Matrix
    errors: Matrix
    base_layers: tuple[int, ...]
    other_layers: tuple[int, ...]
    num_layers: int
    num_samples: int
    pooling: str

    @property
    def changes(self) -> dict[int, tuple[float, float | None]]:
        """By original index, ``1 - CKA`` of a layer's output before and after, and its standard error."""
        found = {}
        for column, layer in enumerate(self.other_layers):
            if layer in self.base_layers:
                row = self.base_layers.index(layer)
                value = self.values[row][column]
                if value is not None:
                    found[layer] = (1.0 - value, self.errors[row][column])
        return found

    @property
    def ranked(self) -> tuple[int, ...]:
        """Layers by original index, the most changed one first; equal ones keep the lower layer first."""
        changes = self.changes
        return tuple(sorted(changes, key=lambda layer: (-changes[layer][0], layer)))

    def heatmap(self, base: str = "dense", other: str = "pruned") -> Heatmap:
        """Return the matrix as a chart.

        Args:
            base: name of the model of the rows.
            other: name of the model of the columns.
        """
        counted = tuple(range(len(self.other_layers))) == self.other_layers
        return Heatmap(
            f"CKA of every layer of {base} with every layer of {other}",
            self.values,
            rows=f"layer of {base}",
            columns=f"layer of {other}",
            column_labels=() if counted else tuple(map(str, self.other_layers)),
            note=f"Outputs of the layers by original index, on {self.num_samples} samples ({self.pooling} readout).",
        )

    def change_chart(self, other: str = "pruned") -> LayerScores:
        """Return what changed, layer by layer, as a chart; removed layers have no score.

        Args:
            other: name of the changed model.
        """
        changes = self.changes
        status = tuple(
            "ok" if i in changes else "removed" if i not in self.other_layers else "undefined"
            for i in range(self.num_layers)
        )
        most = ", ".join(f"{i} ({changes[i][0]:.3g})" for i in self.ranked[:5])
        return LayerScores(
            f"What changed in {other}",
            scores=tuple(changes[i][0] if i in changes else None for i in range(self.num_layers)),
            errors=tuple(changes[i][1] if i in changes else None for i in range(self.num_layers)),
            selected=(),
            status=status,
            label="1 - CKA(before, after)",
            note=f"Most changed layers: {most}." if most else "",
        )


def layer_similarity(
    base: Any,
    other: Any,
    batches: Iterable[Batch],
    *,
    pooling: str | Pooling = "auto",
    base_readouts: Readouts | None = None,
    progress: bool = True,
) -> LayerSimilarity:
    """Compare every layer of one model with every layer of another on the same batches.

    Memory is one readout a sample and layer; widths may differ, the tokenizer may not.

    Args:
        base: the model of the rows, usually dense.
        other: the model of the columns: pruned, tuned, or both.
        batches: a list of model-ready dicts; each model reads it once.
        pooling: ``"auto"``, a name, or a :class:`Pooling` other than tokens.
        base_readouts: of the base on these very batches, where it is compared more than once.
        progress: show a bar.

    Raises:
        ValueError: for fewer than 4 samples, an iterator that can be read only once, readouts of other batches, or
            models that do not come from the same number of layers.

    Source: CKA as in Kornblith et al. 2019, debiased as in Murphy et al. 2024.

    Example:
        >>> similarity = layer_similarity(dense, pruned, batches)  # doctest: +SKIP
        >>> similarity.ranked[:3]  # doctest: +SKIP
        (17, 16, 29)
    """
    if iter(batches) is batches:
        raise ValueError("batches is an iterator, which only one of two models could read; pass a list.")
    rows, columns = original_layers(base), original_layers(other)
    count, theirs = num_original_layers(base), num_original_layers(other)
    if count != theirs:
        raise ValueError(
            f"The base comes from a model with {count} layers, the other from one with {theirs}: they are not related."
        )
    before = base_readouts or collect(base, batches, pooling=pooling, progress=progress)
    after = collect(other, batches, pooling=pooling, progress=progress)
    if before.info.hash != after.info.hash:
        raise ValueError("base_readouts were collected on other samples than batches holds; collect them again.")
    width = len(columns)
    pairs = [(i, len(rows) + j) for i in range(len(rows)) for j in range(width)]
    result = pairwise_similarity([*before.outputs, *after.outputs], pairs=pairs)
    return LayerSimilarity(
        values=_matrix(result.debiased, width),
        errors=_matrix(result.standard_error, width),
        base_layers=rows,
        other_layers=columns,
        num_layers=count,
        num_samples=result.n,
        pooling=before.pooling.kind,
    )


def _matrix(values: Any, width: int) -> Matrix:
    flat = [None if math.isnan(value) else float(value) for value in values]
    return tuple(tuple(flat[i : i + width]) for i in range(0, len(flat), width))
