"""What every criterion takes and returns. Scores only: nothing is removed, and no model is changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from hf_cka.anatomy import Anatomy
from hf_cka.data import Batch
from hf_cka.lookup import lookup
from hf_cka.representations import Pooling

if TYPE_CHECKING:
    from torch import nn

#: "layer", or the name of a branch: plain ("attention", "mlp", "cross_attention"), or qualified ("mlp:ffn2")
Kind = str
KINDS: tuple[Kind, ...] = ("layer", "attention", "mlp")
_BRANCHES = ("attention", "cross_attention", "mlp")


@dataclass(frozen=True, order=True)
class Structure:
    """Something that depth pruning can remove: a layer, one of its branches, or a run of layers.

    Args:
        kind: ``"layer"``, or the name of a branch: ``"attention"``, ``"mlp"``, ``"cross_attention"``, or a further one
            of these by its qualified name (``"mlp:ffn2"``).
        layer: its current index in the model that is scored; of a run, the first.
        length: layers in the run; 1 for anything else.

    Raises:
        ValueError: for another kind, a negative index, or a run of branches.

    Example:
        >>> print(Structure("attention", 3), "|", Structure("layer", 4, length=3))
        attention 3 | layers 4-6
    """

    kind: Kind
    layer: int
    length: int = 1

    def __post_init__(self) -> None:
        if self.kind != "layer" and self.branch_kind not in _BRANCHES:
            known = ", ".join(map(repr, ("layer", *_BRANCHES)))
            raise ValueError(f"Unknown kind of structure {self.kind!r}. Known: {known}.")
        if self.layer < 0 or self.length < 1:
            raise ValueError(f"layer={self.layer} and length={self.length} must be at least 0 and 1.")
        if self.length > 1 and self.kind != "layer":
            raise ValueError(f"length={self.length}: only whole layers come in runs, not {self.kind!r}.")

    @property
    def branch_kind(self) -> str:
        """What kind of branch it is, "" for a layer.

        Example:
            >>> Structure("mlp:ffn2", 0).branch_kind
            'mlp'
        """
        return "" if self.kind == "layer" else self.kind.partition(":")[0]

    @property
    def layers(self) -> range:
        """The indices of the layers it covers."""
        return range(self.layer, self.layer + self.length)

    def __str__(self) -> str:
        return f"layers {self.layer}-{self.layers[-1]}" if self.length > 1 else f"{self.kind} {self.layer}"


@dataclass(frozen=True)
class DepthScores:
    """How much each structure matters.

    Args:
        structures: what was scored.
        importance: per structure; higher = keep. Never NaN: a structure whose importance is undefined has ``inf``,
            so that it is never removed first, and a note that says why.
        details: further numbers per structure, for reports (each metric, each rank); NaN where undefined.
        notes: why an importance is undefined, by structure; or what to know about a metric, by its name.
        layer_calls: calls of a layer that it took, where that is counted.
        chunks: parts into which the batches were cut, likewise.

    Raises:
        ValueError: if lengths differ or an importance is NaN.

    Example:
        >>> scores = DepthScores((Structure("layer", 0), Structure("layer", 1)), (0.5, 0.1))
        >>> str(scores.weakest())
        'layer 1'
    """

    structures: tuple[Structure, ...]
    importance: tuple[float, ...]
    details: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    notes: Mapping[Any, str] = field(default_factory=dict)
    layer_calls: int = 0
    chunks: int = 0

    def __post_init__(self) -> None:
        for name, values in (("importance", self.importance), *self.details.items()):
            if len(values) != len(self.structures):
                raise ValueError(f"{len(values)} values of {name} for {len(self.structures)} structures.")
        nan = [str(s) for s, v in zip(self.structures, self.importance, strict=True) if math.isnan(v)]
        if nan:
            raise ValueError(
                f"The importance of {', '.join(nan[:8])} is NaN: the model's outputs are not finite there. Load it in "
                "bfloat16 or float32 instead of float16, or leave such samples out."
            )

    def ranking(self) -> tuple[Structure, ...]:
        """Return the structures, the first to remove first; among equals the lower layer."""
        order = sorted(range(len(self.structures)), key=lambda i: (self.importance[i], self.structures[i].layer, i))
        return tuple(self.structures[i] for i in order)

    def weakest(self) -> Structure:
        """Return the structure to remove first."""
        return self.ranking()[0]

    def of(self, structure: Structure) -> float:
        """Return the importance of one structure."""
        return self.importance[self.structures.index(structure)]

    def joined(self, other: DepthScores) -> DepthScores:
        """Return the scores of both, for disjoint structures."""
        return DepthScores(
            self.structures + other.structures,
            self.importance + other.importance,
            {name: values + other.details[name] for name, values in self.details.items()},
            {**self.notes, **other.notes},
            self.layer_calls + other.layer_calls,
            max(self.chunks, other.chunks),
        )

    def reversed(self) -> DepthScores:
        """Return the same scores with the order turned round, as a control; undefined ones stay undefined."""
        return replace(self, importance=tuple(v if v == math.inf else -v for v in self.importance))


@dataclass(frozen=True)
class WidthScores:
    """How much each KV group and each MLP unit (or each expert) matters; higher = keep.

    Args:
        kv_groups: per layer one value for each KV group (or head, or channel of another mixer), float64 on the CPU;
            empty where there are none, or they are not scored.
        units: per layer ``(intermediate_size,)``, likewise; from criteria for whole experts, one value per expert.

    Raises:
        ValueError: for another dtype or shape, or NaN.

    Example:
        >>> scores = WidthScores((torch.ones(2, dtype=torch.float64),), (torch.arange(3, dtype=torch.float64),))
        >>> scores.reversed().units[0].tolist()
        [-0.0, -1.0, -2.0]
    """

    kv_groups: tuple[torch.Tensor, ...]
    units: tuple[torch.Tensor, ...]

    def __post_init__(self) -> None:
        for name, per_layer in (("kv_groups", self.kv_groups), ("units", self.units)):
            for layer, values in enumerate(per_layer):
                if values.dtype != torch.float64 or values.ndim != 1 or values.device.type != "cpu":
                    raise ValueError(
                        f"{name}[{layer}] is {values.dtype} {tuple(values.shape)} on {values.device}; expected one "
                        "float64 value per structure, on the CPU."
                    )
                bad = values.isnan().nonzero().flatten().tolist()
                if bad:
                    raise ValueError(
                        f"{name}[{layer}] is NaN at {bad[:8]}: the model's activations are not finite there. Load it "
                        "in bfloat16 or float32 instead of float16, or leave such samples out."
                    )

    def reversed(self) -> WidthScores:
        """Return the same scores with the order turned round, as a control."""
        return WidthScores(tuple(-v for v in self.kv_groups), tuple(-v for v in self.units))


@dataclass(frozen=True)
class ScoringContext:
    """What a criterion may look at.

    Args:
        model: the model to score; criteria leave it as they found it.
        anatomy: of the model.
        batches: model-ready dicts, as often as wanted; with ``labels`` where a criterion needs them.
        pooling: how the tokens of a sample become its readout.
        seed: of everything random.
        progress: show bars.
    """

    model: nn.Module
    anatomy: Anatomy
    batches: Sequence[Batch]
    pooling: Pooling
    seed: int = 0
    progress: bool = False


@dataclass(frozen=True)
class CriterionEntry:
    """One row of a table of criteria.

    Args:
        name: what it is found by.
        score: ``(context, structures) -> DepthScores``, or ``(context) -> WidthScores``.
        description: one sentence: what is measured.
        source: the paper.
        kinds: the structures it can score; who scores attention scores every branch that mixes tokens.
        needs_data: it reads the batches.
        needs_logits: it reads the logits of the model's head.
        needs_next_token: it reads the logits as a prediction of the next token.
        needs_labels: every batch must hold ``labels``.
        needs_gradients: it takes gradients of the weights.
        needs_adapters: it reads LoRA adapters that the model carries.
        lazy: a score depends on that structure and the model alone, so that some can be scored without the others,
            and is expensive enough to do so.
    """

    name: str
    score: Callable[..., Any]
    description: str
    source: str
    kinds: tuple[Kind, ...] = KINDS
    needs_data: bool = True
    needs_logits: bool = False
    needs_next_token: bool = False
    needs_labels: bool = False
    needs_gradients: bool = False
    needs_adapters: bool = False
    lazy: bool = False

    def scores(self, structure: Structure) -> bool:
        """Return whether a structure is of a kind that the criterion can score."""
        kind = structure.branch_kind.removeprefix("cross_") or "layer"
        return kind in self.kinds


def check_usable(entry: CriterionEntry, context: ScoringContext, structures: Sequence[Structure] = ()) -> None:
    """Refuse a criterion that this model or this data cannot feed, before anything is computed.

    Args:
        entry: the criterion.
        context: the model and the data.
        structures: what is to be scored, for a depth criterion.

    Raises:
        ValueError: for a kind of structure that it cannot score, no data, no labels, no head, or an encoder where the
            next token is needed.
    """
    wrong = sorted({s.kind for s in structures if not entry.scores(s)})
    if wrong:
        raise ValueError(
            f"Criterion {entry.name!r} cannot score {', '.join(wrong)}; it scores {', '.join(entry.kinds)}."
        )
    if entry.needs_data and not len(context.batches):
        raise ValueError(f"Criterion {entry.name!r} needs calibration batches and got none.")
    if entry.needs_labels:
        without = [i for i, batch in enumerate(context.batches) if "labels" not in batch]
        if without:
            raise ValueError(
                f"Criterion {entry.name!r} needs labels, and batches {without[:8]} have none. Add a 'labels' tensor to "
                "every batch, or use a criterion without labels ('cka', 'kl')."
            )
    model = context.anatomy.model
    if entry.needs_gradients and getattr(model, "is_quantized", False):
        raise ValueError(
            f"Criterion {entry.name!r} needs gradients of the weights, and the model is quantized. Load it without "
            "quantization, or use 'cka'."
        )
    if entry.needs_adapters and not any("lora_A" in dict(m.named_children()) for m in model.modules()):
        raise ValueError(
            f"Criterion {entry.name!r} reads LoRA adapters, and {type(model).__name__} carries none. Add some "
            "and train them (get_peft_model), or use 'taylor'."
        )
    if entry.needs_next_token and not any(stack.causal for stack in context.anatomy.stacks):
        raise ValueError(
            f"Criterion {entry.name!r} measures the prediction of the next token, and {type(model).__name__} is an "
            "encoder. Use 'cka' or 'kl'."
        )
    if (entry.needs_logits or entry.needs_next_token) and context.anatomy.backbone is model:
        raise ValueError(
            f"Criterion {entry.name!r} reads logits, and {type(model).__name__} has no head. Load the model with its "
            "head (AutoModelForCausalLM, AutoModelForSequenceClassification), or use 'cka'."
        )


def score(
    entry: CriterionEntry,
    context: ScoringContext,
    structures: Sequence[Structure] | None = None,
    order: str = "normal",
) -> Any:
    """Check, score, and turn the order round if asked: the one place through which every criterion is called.

    Args:
        entry: a row of ``DEPTH``, ``WIDTH`` or ``EXPERTS``.
        context: the model and the data.
        structures: what to score, for a depth criterion; None for a width criterion.
        order: ``"normal"``, or ``"reversed"`` as a control.

    Returns:
        :class:`DepthScores`, or :class:`WidthScores` where there are no structures.

    Raises:
        ValueError: as :func:`check_usable`; for NaN scores; for another order.
    """
    lookup(ORDERS, order, "order")
    check_usable(entry, context, structures or ())
    scores = entry.score(context) if structures is None else entry.score(context, structures)
    return ORDERS[order](scores)


ORDERS: dict[str, Callable[[Any], Any]] = {
    "normal": lambda scores: scores,
    "reversed": lambda scores: scores.reversed(),
}
