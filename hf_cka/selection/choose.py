"""The criteria that score layers, and the choice from their scores."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_cka.anatomy import Anatomy, find_anatomy
from hf_cka.data import Batch, CalibrationInfo
from hf_cka.lookup import lookup
from hf_cka.representations import Pooling, Readouts, collect, distributed, resolve_pooling, stream_cka
from hf_cka.selection.record import LayerSelection, ranking
from hf_cka.similarity import RBF, SimilarityResult, measure, pairwise_similarity


@dataclass(frozen=True)
class Scores:
    """What a criterion returns: one score, error and status a layer; higher matters more."""

    scores: tuple[float | None, ...]
    errors: tuple[float | None, ...]
    status: tuple[str, ...]


def select_layers(
    model: nn.Module,
    batches: Iterable[Batch] | Readouts | None = None,
    keep_ratio: float = 0.5,
    *,
    criterion: str = "cka",
    kernel: str | RBF = "linear",
    estimator: str = "debiased",
    pooling: str | Pooling = "auto",
    paper: bool = False,
    exclude: Sequence[int] = (),
    stack: str | Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> LayerSelection:
    """Choose the layers that matter, in one pass over the calibration batches.

    Keeps the ``floor(keep_ratio * num_layers)`` layers with the highest score; equal scores keep the lower layer.
    A layer whose representation is constant or noise has no score and is taken only when too few others are left.

    Args:
        model: a transformers model, or a PEFT model around one. It is left as it was.
        batches: model-ready dicts, read once; or what :func:`hf_cka.collect` read from this model, to try several
            choices on one pass. Not needed for ``random``, ``first``, ``last`` and ``all``.
        keep_ratio: share of the layers to keep, above 0 and at most 1.
        criterion: ``cka``, ``block_influence``, ``random``, ``first``, ``last`` or ``all``.
        kernel: of CKA: ``"linear"``, ``"rbf"`` or an :class:`hf_cka.similarity.RBF`.
        estimator: of CKA: ``"debiased"`` or ``"biased"``.
        pooling: ``"auto"`` (last token for decoders, mean for encoders), ``"last"``, ``"cls"``, ``"mean"``,
            ``"tokens"`` or a :class:`hf_cka.representations.Pooling`.
        paper: reproduce arXiv 2602.05988: biased linear CKA, CLS for encoders and last token for decoders, and never
            the first layer of an encoder.
        exclude: layers that are never chosen.
        stack: which stack of layers to choose in, by path or part of it; several; or ``"all"``. By default the
            largest that any input reaches, and of an encoder-decoder both. The selection's ``others`` hold all but
            the first.
        seed: of ``random``.
        progress: show a bar.

    Returns:
        The selection.

    Raises:
        ValueError: for a ratio that keeps nothing or is above 1, an unknown criterion, layers to exclude that do not
            exist, missing or empty calibration, an unsupported model, and as :func:`hf_cka.collect`.
        RuntimeError: under DeepSpeed ZeRO-3.

    Example:
        >>> selection = select_layers(model, batches, keep_ratio=0.5)  # doctest: +SKIP
        >>> config = LoraConfig(r=16, **selection.lora_kwargs())  # doctest: +SKIP
    """
    score = lookup(CRITERIA, criterion, "criterion")
    anatomy = find_anatomy(model)
    if isinstance(batches, Readouts) and stack is None:
        stack = anatomy.layers_path
    paths = _stacks(anatomy, stack)
    if len(paths) > 1:
        data = batches if batches is None or isinstance(batches, (Sequence, Readouts)) else list(batches)
        options: dict[str, Any] = {"criterion": criterion, "kernel": kernel, "estimator": estimator, "pooling": pooling}
        options |= {"paper": paper, "exclude": exclude, "seed": seed, "progress": progress}
        first, *rest = [select_layers(model, data, keep_ratio, stack=path, **options) for path in paths]
        return replace(first, others=tuple(rest))
    anatomy = anatomy.on(paths[0])
    if paper:
        if criterion != "cka" or kernel != "linear":
            raise ValueError(f"paper=True is linear CKA; got criterion={criterion!r}, kernel={kernel!r}.")
        estimator = "biased"
        pooling = "last" if anatomy.kind == "decoder" else "cls"
        if anatomy.kind == "encoder":
            exclude = (*exclude, 0)
    exclude = tuple(sorted(set(exclude)))
    count = _count(keep_ratio, anatomy.num_layers, exclude, criterion)
    rule = _rule(pooling, anatomy, batches)
    question = _Question(model, anatomy, batches, kernel, estimator, rule, seed, progress)
    result, calibration = score(question)
    # Every process must adapt the same layers, or training would hang: the first one decides.
    result = _from_first_process(result)
    order = [i for i in ranking(result.scores) if i not in exclude]
    order += [i for i in range(anatomy.num_layers) if i not in order and i not in exclude]
    measured = calibration is not None
    settings: dict[str, Any] = {"exclude": list(exclude), "paper": paper}
    if measured:
        settings["pooling"] = asdict(rule)
    if criterion == "cka":
        settings |= {"estimator": estimator, "kernel": kernel if isinstance(kernel, str) else repr(kernel)}
    if criterion == "random":
        settings["seed"] = seed
    return LayerSelection(
        layers=tuple(sorted(order[:count])),
        scores=result.scores,
        errors=result.errors,
        status=result.status,
        criterion=criterion,
        keep_ratio=keep_ratio,
        model_type=str(getattr(anatomy.model.config, "model_type", "")),
        layers_path=anatomy.layers_path,
        projections=anatomy.linear_names,
        modules=_modules(anatomy),
        experts=_experts(anatomy),
        ambiguous=_ambiguous(anatomy),
        settings=settings,
        calibration=calibration,
    )


def _stacks(anatomy: Anatomy, stack: str | Sequence[str] | None) -> list[str]:
    """Paths of the stacks to choose in."""
    if stack is None:
        towers = anatomy.stacks[:2] if getattr(anatomy.model.config, "is_encoder_decoder", False) else ()
        both = {word for s in towers for word in ("encoder", "decoder") if word in s.path.split(".")}
        return [s.path for s in towers] if len(both) == 2 else [anatomy.layers_path]
    if stack == "all":
        return [s.path for s in anatomy.stacks]
    return [anatomy.on(name).layers_path for name in ([stack] if isinstance(stack, str) else stack)]


def _modules(anatomy: Anatomy) -> tuple[tuple[str, ...], ...]:
    """Full names of the projections of every layer, where they do not follow from number and projection."""
    layers = anatomy.stack.layers
    plain = all(
        layer.path == f"{anatomy.layers_path}.{i}" and layer.linears == anatomy.linear_names
        for i, layer in enumerate(layers)
    )
    return () if plain else tuple(tuple(f"{layer.path}.{n}" for n in layer.linears) for layer in layers)


def _experts(anatomy: Anatomy) -> tuple[tuple[str, ...], ...]:
    """Full names of the parameters in which experts lie one behind the other, of every layer."""
    found = []
    for i, layer in enumerate(anatomy.stack.layers):
        sizes = {name: p.ndim for name, p in anatomy.layer(i).named_parameters()}
        names = dict.fromkeys(s.parameter for w in layer.widths if w.kind == "experts" for s in w.slices)
        found.append(tuple(f"{layer.path}.{name}" for name in names if sizes.get(name) == 3))
    return tuple(found) if any(found) else ()


@dataclass(frozen=True)
class _Question:
    """What a criterion may look at."""

    model: nn.Module
    anatomy: Anatomy
    batches: Iterable[Batch] | Readouts | None
    kernel: str | RBF
    estimator: str
    pooling: Pooling
    seed: int
    progress: bool

    def data(self) -> Iterable[Batch] | Readouts:
        if self.batches is None:
            raise ValueError(
                "This criterion measures the model: pass calibration batches, for example "
                "hf_cka.calibration(texts, tokenizer)."
            )
        return self.batches

    def readouts(self) -> Readouts:
        data = self.data()
        if isinstance(data, Readouts):
            return data
        return collect(self.model, data, pooling=self.pooling, stack=self.anatomy.layers_path, progress=self.progress)


_Answer = tuple[Scores, CalibrationInfo | None]


def _cka(question: _Question) -> _Answer:
    data = question.data()
    if question.pooling.kind == "tokens" and not isinstance(data, Readouts):
        if question.kernel != "linear":
            raise ValueError(f"Streamed token statistics are linear CKA only; got kernel={question.kernel!r}.")
        where = question.anatomy.layers_path
        result, info = stream_cka(
            question.model, data, pooling=question.pooling, stack=where, progress=question.progress
        )
        pairs = list(result.pairs)
    else:
        readouts = question.readouts()
        features, pairs = readouts.distinct()
        info = readouts.info
        result = pairwise_similarity(features, pairs=pairs, kernel=question.kernel, estimator=question.estimator)
    values = result.biased if question.estimator == "biased" else result.debiased
    return _from_similarity(result, pairs, np.asarray(values)), info


def _block_influence(question: _Question) -> _Answer:
    readouts = question.readouts()
    change = measure("block_influence")
    scores = tuple(
        _or_none(change(entered, left)) if entered.shape == left.shape else None
        for entered, left in zip(readouts.inputs, readouts.outputs, strict=True)
    )
    status = tuple("another shape" if score is None else "ok" for score in scores)
    return Scores(scores, (None,) * len(scores), status), readouts.info


def _from_similarity(result: SimilarityResult, pairs: Sequence[tuple[int, int]], values: np.ndarray) -> Scores:
    errors = result.standard_error
    status = []
    for entered, left in pairs:
        bad = [s for s in (result.status[entered], result.status[left]) if s != "ok"]
        status.append(bad[0] if bad else "ok")
    return Scores(
        scores=tuple(_or_none(1.0 - value) for value in values),
        errors=tuple(None if errors is None else _or_none(error) for error in errors),
        status=tuple(status),
    )


def _positions(order: Callable[[int, int], list[float]]) -> Callable[[_Question], _Answer]:
    def score(question: _Question) -> _Answer:
        count = question.anatomy.num_layers
        return Scores(tuple(order(count, question.seed)), (None,) * count, ("ok",) * count), None

    return score


def _shuffled(count: int, seed: int) -> list[float]:
    return [float(i) for i in random.Random(seed).sample(range(count), count)]


# Each returns scores for which higher matters more. The last four look at no data: they are the controls.
CRITERIA: dict[str, Callable[[_Question], _Answer]] = {
    "cka": _cka,
    "block_influence": _block_influence,
    "random": _positions(_shuffled),
    "first": _positions(lambda count, seed: [float(-i) for i in range(count)]),
    "last": _positions(lambda count, seed: [float(i) for i in range(count)]),
    "all": _positions(lambda count, seed: [0.0] * count),
}


def _or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _rule(pooling: str | Pooling, anatomy: Anatomy, batches: Iterable[Batch] | Readouts | None) -> Pooling:
    rule = resolve_pooling(pooling, anatomy.kind)
    if not isinstance(batches, Readouts):
        return rule
    if len(batches.outputs) != anatomy.num_layers:
        raise ValueError(f"The readouts are of {len(batches.outputs)} layers, the model has {anatomy.num_layers}.")
    if pooling != "auto" and rule != batches.pooling:
        raise ValueError(f"The readouts were pooled by {batches.pooling}, not by {rule}: leave pooling out.")
    return batches.pooling


def _count(keep_ratio: float, layers: int, exclude: Sequence[int], criterion: str) -> int:
    if not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio must be above 0 and at most 1, got {keep_ratio}.")
    strange = [i for i in exclude if not 0 <= i < layers]
    if strange:
        raise ValueError(f"exclude names layers {strange}, but the model has layers 0 to {layers - 1}.")
    if criterion == "all":
        return layers - len(exclude)
    if layers == 1 and not exclude:
        return 1  # there is nothing to choose from
    # The small addition makes 0.29 * 100 twenty-nine: floats fall just below.
    count = math.floor(keep_ratio * layers + 1e-9)
    if count < 1:
        raise ValueError(
            f"keep_ratio={keep_ratio} of {layers} layers keeps none; use at least {math.ceil(1e4 / layers) / 1e4}."
        )
    return min(count, layers - len(exclude))


def _ambiguous(anatomy: Anatomy) -> bool:
    """Say whether PEFT's rule (layer pattern, number, suffix) would reach modules outside these layers."""
    pattern = anatomy.layers_path.rpartition(".")[2]
    inside = f"{anatomy.layers_path}."
    rule = re.compile(rf"(?:^|.*?\.){re.escape(pattern)}\.\d+\.")
    return any(
        rule.match(name) and any(name.endswith(f".{p}") for p in anatomy.linear_names)
        for name, _ in anatomy.model.named_modules()
        if not name.startswith(inside)
    )


def _from_first_process(result: Scores) -> Scores:
    if not distributed():
        return result
    box = [result]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
