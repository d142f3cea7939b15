"""Readouts of every layer: stored, or streamed into exact statistics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_cka.anatomy import find_anatomy
from hf_cka.data import Batch, CalibrationInfo
from hf_cka.representations.pooling import Pooling, resolve_pooling
from hf_cka.representations.running import Counted, distributed, run
from hf_cka.similarity import SimilarityResult, StreamingCKA


@dataclass(frozen=True)
class Readouts:
    """What entered and what left each layer, one row a sample.

    Args:
        inputs: per layer, ``(n_samples, hidden_size)``, on the CPU.
        outputs: per layer, the same; ``inputs[i + 1] is outputs[i]`` where the model hands one to the other.
        pooling: how tokens became rows.
        info: what was measured.
    """

    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]
    pooling: Pooling
    info: CalibrationInfo

    def distinct(self) -> tuple[list[torch.Tensor], list[tuple[int, int]]]:
        """Return every distinct feature matrix once, and for each layer the indices of its input and output."""
        features: list[torch.Tensor] = []
        index: dict[int, int] = {}
        for matrix in (m for pair in zip(self.inputs, self.outputs, strict=True) for m in pair):
            if id(matrix) not in index:
                index[id(matrix)] = len(features)
                features.append(matrix)
        return features, [(index[id(a)], index[id(b)]) for a, b in zip(self.inputs, self.outputs, strict=True)]


def collect(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    pooling: str | Pooling = "auto",
    stack: str | None = None,
    progress: bool = True,
) -> Readouts:
    """Read every layer's input and output at one vector per sample.

    Memory grows by one readout per sample and layer, in the model's own dtype. In a distributed run each process
    passes its own part of the data (or all of it), and every process gets the readouts of all.

    Args:
        model: any supported model, with or without a head, adapters or a ``device_map``.
        batches: model-ready dicts; read once.
        pooling: ``"auto"``, a name, or a :class:`Pooling` other than ``tokens``.
        stack: which stack of layers, by path or part of it; by default the one with most parameters.
        progress: show a bar.

    Raises:
        ValueError: for no samples or one, an all-padding row, NaN or infinite activations, meta weights.
        RuntimeError: under DeepSpeed ZeRO-3, where no forward pass is possible before training starts.

    Example:
        >>> readouts = collect(model, batches, pooling="mean")  # doctest: +SKIP
        >>> readouts.outputs[3].shape  # doctest: +SKIP
        torch.Size([128, 576])
    """
    anatomy = find_anatomy(model, stack)
    rule = resolve_pooling(pooling, anatomy.kind)
    if rule.kind == "tokens":
        raise ValueError("pooling='tokens' has no fixed number of rows per sample: use stream_cka for it.")
    store = _Store()
    counted = run(anatomy, batches, rule, store, progress=progress)
    counted, parts, pairs = _gather(counted, store)
    if counted.num_samples < 2:
        raise ValueError(f"Calibration needs at least 2 samples, got {counted.num_samples}: pass more batches.")
    features = [torch.cat([part[i] for part in parts]) for i in range(len(parts[0]))]
    return Readouts(
        inputs=tuple(features[a] for a, _ in pairs),
        outputs=tuple(features[b] for _, b in pairs),
        pooling=rule,
        info=counted.info(batches),
    )


def stream_cka(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    pooling: str | Pooling = "tokens",
    stack: str | None = None,
    progress: bool = True,
) -> tuple[SimilarityResult, CalibrationInfo]:
    """Compute CKA between each layer's input and output without storing readouts.

    Made for token-level readouts: memory depends on the width of the model and not on the amount of data.

    Args:
        model: as in :func:`collect`.
        batches: as in :func:`collect`.
        pooling: any pooling.
        stack: as in :func:`collect`.
        progress: show a bar.

    Returns:
        The similarity of every layer's (input, output) pair, in layer order, and what was measured.

    Raises:
        ValueError, RuntimeError: as :func:`collect`.

    Example:
        >>> result, info = stream_cka(model, batches)  # doctest: +SKIP
    """
    anatomy = find_anatomy(model, stack)
    stream = _Stream()
    counted = run(anatomy, batches, resolve_pooling(pooling, anatomy.kind), stream, progress=progress)
    counted, parts, _ = _gather(counted, stream)
    engine = parts[0]
    for other in parts[1:]:
        engine.merge(other)
    return engine.result(), counted.info(batches)


class _Store:
    """Keeps the readouts of every batch."""

    def __init__(self) -> None:
        self.batches: list[list[torch.Tensor]] = []
        self.pairs: list[tuple[int, int]] = []

    def __call__(self, points: Sequence[torch.Tensor], pairs: Sequence[tuple[int, int]]) -> None:
        self.batches.append(list(points))
        self.pairs = list(pairs)

    def part(self) -> list[torch.Tensor] | None:
        if not self.batches:
            return None
        return [torch.cat([batch[i] for batch in self.batches]).cpu() for i in range(len(self.batches[0]))]


class _Stream:
    """Adds the readouts of every batch to exact statistics."""

    def __init__(self) -> None:
        self.engine: StreamingCKA | None = None
        self.pairs: list[tuple[int, int]] = []

    def __call__(self, points: Sequence[torch.Tensor], pairs: Sequence[tuple[int, int]]) -> None:
        if self.engine is None:
            self.engine = StreamingCKA(len(points), pairs=list(pairs))
            self.pairs = list(pairs)
        self.engine.update([point.to(points[0].device) for point in points])

    def part(self) -> StreamingCKA | None:
        return self.engine


def _gather(counted: Counted, consumer: Any) -> tuple[Counted, list[Any], list[tuple[int, int]]]:
    """Put the parts of all processes together; processes that saw the very same samples count once."""
    part, pairs = consumer.part(), consumer.pairs
    if not distributed():
        return counted, [part], pairs
    world = torch.distributed.get_world_size()
    everyone: list[Any] = [None] * world
    torch.distributed.all_gather_object(everyone, (counted, part, pairs))
    filled = [entry for entry in everyone if entry[0].num_samples]
    if not filled:
        raise ValueError("Calibration is empty in every process: no batch came out of it.")
    if all(sorted(entry[0].digests) == sorted(filled[0][0].digests) for entry in filled):
        filled = filled[:1]
    return Counted.merged([entry[0] for entry in filled]), [entry[1] for entry in filled], filled[0][2]
