"""What to prune and how, as frozen data with a JSON round trip."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from hf_cka.lookup import lookup
from hf_cka.pruning.width_budgets import BUDGETS, WidthSettings
from hf_cka.representations import Pooling

VERSION = 1

# method -> what it fills in where the config leaves it open
METHODS: dict[str, Mapping[str, Any]] = {
    "depth": {"criterion": "cka"},
    "width": {"criterion": "amp"},
    "mop": {"criterion": "cka", "width_criterion": "amp", "path": "cka"},
    "everything": {"criterion": "kl", "width_criterion": "kl", "path": "cka"},
    # presets of the above under their papers' names
    "consensus": {"criterion": "consensus"},
    "amp": {"criterion": "amp"},
}
# method -> the field of the criterion that whole experts need another default of
_OF_EXPERTS = {"width": "criterion", "mop": "width_criterion", "everything": "width_criterion"}
# method -> the pruner that carries it out
PRUNERS = {"depth": "depth", "consensus": "depth", "width": "width", "amp": "width", "mop": "mixture"} | {
    "everything": "mixture"
}
# rules that choose between a depth and a width branch; a string of L and G is one as well
PATHS: dict[str, str] = {
    "cka": "the branch whose readout has the higher CKA to its parent's",
    "cosine": "the branch whose last hidden states have the higher cosine to its parent's",
    "kl": "the branch whose output diverges less from its parent's",
    "perplexity": "the branch with the lower perplexity",
    "random": "a draw",
}
# name -> settings as its paper (or its released code) has them; give ratio or num_layers beside them
PAPERS: dict[str, Mapping[str, Any]] = {
    "cka": {"criterion": "cka_biased", "pooling": "last", "rescore": "full"},
    "consensus": {"method": "consensus", "pooling": "last"},
    "shortgpt": {"criterion": "block_influence", "steps": 1},
    "unreasonable": {"criterion": "angular", "steps": 1, "contiguous": True},
    "sleb": {"criterion": "perplexity", "rescore": "full"},
    "finercut": {"criterion": "kl", "structures": "sublayers", "rescore": "full"},
    "amp": {"method": "amp", "width": WidthSettings(rule="proportional")},
    "mop": {
        "method": "mop",
        "criterion": "third_to_last",
        "path": "random",
        "protect": (-2, -1),
        "reach": "at_least",
        "width": WidthSettings(rule="proportional", min_groups=2),
    },
    "everything": {"method": "everything"},
}
# the three paths of MoP's released code: L removes a layer, G narrows all of them
MOP_PATHS = ("LGGLLLGGLLGLGLLGGL", "GGLLGGGLGGGLLLGGLL", "LGLGGLLGLLGLGLGLGG")
# what depth pruning removes -> the kinds of structure; where a layer has but one branch, that is the layer
STRUCTURES: dict[str, tuple[str, ...]] = {
    "layers": ("layer",),
    "sublayers": ("attention", "mlp", "cross_attention"),
    "attention": ("attention",),
    "mlp": ("mlp",),
    "cross_attention": ("cross_attention",),
}
# which side of the ratio to end on
REACH = {"nearest": "as near as possible", "at_least": "not less", "at_most": "not more"}
RESCORE = {"lazy": "only what can change the decision", "full": "every structure after every removal"}


@dataclass(frozen=True)
class PruningConfig:
    """What to prune and how.

    Args:
        method: ``"depth"`` removes layers or sub-layers; ``"width"`` KV groups and MLP units; ``"mop"`` chooses step by
            step between a layer and as many parameters of width; ``"everything"`` does so with children that are
            tuned and kept. ``"consensus"`` and ``"amp"`` are depth and width with those criteria.
        ratio: removed parameters over all parameters, embeddings included. Give this or ``num_layers``.
        num_layers: how many structures to remove (layers, or sub-layers with ``structures="sublayers"``); of a
            mixture, how many steps, each of which costs a layer.
        criterion: by name, of depth or width, whichever the method does first; by default the method's.
        width_criterion: of the width branch of a mixture.
        path: how a mixture chooses: ``"cka"``, ``"cosine"``, ``"kl"``, ``"perplexity"``, ``"random"``, or a string of
            L (depth) and G (width), one letter a step.
        budget: over layers, of width pruning: ``"uniform"`` (loads in stock classes), ``"importance"`` or
            ``"global"``.
        layer_criterion: of depth, for the importance of layers under the budget ``"importance"``.
        width: which widths may go and how they are rounded.
        repair: closed-form correction of what is left, by name (``"least_squares"``), or None.
        structures: what depth pruning removes: ``"layers"``, ``"sublayers"``, ``"attention"``, ``"mlp"`` or
            ``"cross_attention"``.
        contiguous: remove each step's layers as one run of neighbours.
        steps: how many times to score on the way; None scores again after every removal, 1 scores once.
        protect: layers that stay, by index in the model given; negative ones count from the end. For several stacks:
            stack -> layers.
        stack: which stack of layers is pruned, by its path or an unambiguous part of it ("encoder"); several of them,
            one after the other, each by its share of the ratio; or ``"all"``. By default the largest that can lose
            layers and that any input reaches (a vision tower comes after the text).
        order: ``"reversed"`` removes the most important first, as a control.
        reach: end ``"nearest"`` to the ratio, or on one side of it (``"at_least"``, ``"at_most"``).
        rescore: ``"lazy"`` scores again only what can change the decision, where the criterion allows it;
            ``"full"`` everything.
        pooling: the readout: ``"mean"`` (on decoders without the first tokens, which are attention sinks),
            ``"last"``, ``"cls"``, or ``"auto"``. On SmolLM2 the mean tells layers apart better than the last token.
        seed: of everything random.
        version: of this format.

    Raises:
        ValueError: for an unknown name (near ones are listed), a ratio out of range, or settings that exclude each
            other.

    Example:
        >>> config = PruningConfig(method="depth", criterion="cka", ratio=0.2)
        >>> PruningConfig.from_json(config.to_json()) == config
        True
        >>> PruningConfig(criterion="ckaa", ratio=0.2)
        Traceback (most recent call last):
        ValueError: Unknown depth criterion 'ckaa'. Did you mean: 'cka'?
    """

    method: str = "depth"
    ratio: float | None = None
    num_layers: int | None = None
    criterion: str | None = None
    width_criterion: str | None = None
    path: str | None = None
    budget: str = "uniform"
    layer_criterion: str = "block_influence"
    width: WidthSettings = field(default_factory=WidthSettings)
    repair: str | None = None
    structures: str = "layers"
    contiguous: bool = False
    steps: int | None = None
    protect: tuple[int, ...] | Mapping[str, tuple[int, ...]] = ()
    stack: str | tuple[str, ...] | None = None
    order: str = "normal"
    reach: str = "nearest"
    rescore: str = "lazy"
    pooling: str = "mean"
    seed: int = 0
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise ValueError(f"This config has version {self.version}; this hf_cka reads version {VERSION}. Update it.")
        preset = lookup(METHODS, self.method, "pruning method")
        if self.width.inner == "experts" and self.method in _OF_EXPERTS:
            preset = {**preset, _OF_EXPERTS[self.method]: "reap"}
        for name, value in preset.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        object.__setattr__(self, "protect", _protected(self.protect))
        if isinstance(self.stack, list | tuple):
            object.__setattr__(self, "stack", tuple(self.stack))
        self._check_names()
        self._check_fit()
        if self.pooling != "auto":
            Pooling(self.pooling)
        if (self.ratio is None) == (self.num_layers is None):
            raise ValueError(
                f"ratio={self.ratio} and num_layers={self.num_layers}: give exactly one of them, for example ratio=0.2."
            )
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise ValueError(f"ratio={self.ratio} must lie between 0 and 1: removed parameters over all parameters.")
        for name in ("num_layers", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")

    def _check_names(self) -> None:
        from hf_cka.pruning.criteria import DEPTH
        from hf_cka.pruning.criteria.base import ORDERS
        from hf_cka.pruning.repair import REPAIRS

        width_first = self.pruner == "width"
        if width_first:
            _check_width_criterion(str(self.criterion), self.width)
        else:
            lookup(DEPTH, str(self.criterion), "depth criterion")
        lookup(DEPTH, self.layer_criterion, "depth criterion")
        if self.width_criterion is not None:
            _check_width_criterion(self.width_criterion, self.width)
        if self.repair is not None:
            lookup(REPAIRS, self.repair, "repair")
        if self.path is not None and not set(self.path) <= {"L", "G"}:
            lookup(PATHS, self.path, "path (or a string of L and G)")
        tables: tuple[tuple[Mapping[str, Any], str, str], ...] = (
            (BUDGETS, self.budget, "width budget"),
            (STRUCTURES, self.structures, "kind of structures"),
            (ORDERS, self.order, "order"),
            (REACH, self.reach, "reach"),
            (RESCORE, self.rescore, "rescore"),
        )
        for table, value, what in tables:
            lookup(table, value, what)

    def _check_fit(self) -> None:
        """Refuse settings that the method would ignore."""
        if self.contiguous and self.structures != "layers":
            raise ValueError(f"contiguous=True removes runs of whole layers, but structures={self.structures!r}.")
        if self.contiguous and self.steps is None:
            raise ValueError("contiguous=True needs steps: how many runs to remove. Give steps=1 for a single run.")
        ignored = {
            "depth": ("width_criterion", "path", "budget", "width"),
            "width": ("width_criterion", "path", "num_layers", "structures", "contiguous", "protect"),
            "mixture": ("steps", "structures", "contiguous", "budget"),
        }[self.pruner]
        defaults = {item.name: item.default for item in fields(self)} | {"width": WidthSettings()}
        set_anyway = [f"{name}={getattr(self, name)!r}" for name in ignored if getattr(self, name) != defaults[name]]
        if set_anyway:
            raise ValueError(f"method={self.method!r} does not use {', '.join(set_anyway)}. Leave it out.")

    @property
    def pruner(self) -> str:
        """Which pruner carries the method out: "depth", "width" or "mixture"."""
        return PRUNERS[self.method]

    @classmethod
    def paper(cls, name: str, **changes: Any) -> PruningConfig:
        """Return the settings of a paper, or of its released code.

        Args:
            name: one of ``PAPERS``.
            changes: fields to set beside or instead of them; ``ratio`` or ``num_layers`` at least.

        Raises:
            ValueError: for an unknown name; near ones are listed.

        Example:
            >>> config = PruningConfig.paper("unreasonable", num_layers=8)
            >>> config.criterion, config.contiguous
            ('angular', True)
        """
        return cls(**{**lookup(PAPERS, name, "paper"), **changes})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON data."""
        data = asdict(self)
        if isinstance(self.protect, Mapping):
            data["protect"] = {name: list(layers) for name, layers in self.protect.items()}
        else:
            data["protect"] = list(self.protect)
        return data | {"stack": list(self.stack) if isinstance(self.stack, tuple) else self.stack}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PruningConfig:
        """Read what ``to_dict`` wrote.

        Raises:
            ValueError: for an unknown field (near names are listed) or another version.
        """
        known = {item.name: item for item in fields(cls)}
        for name in data:
            lookup(known, name, "field of PruningConfig")
        given = dict(data)
        if "width" in given:
            importance = given["width"].get("layer_importance")
            given["width"] = WidthSettings(
                **{**given["width"], "layer_importance": None if importance is None else tuple(importance)}
            )
        return cls(**given)

    def to_json(self) -> str:
        """Return the config as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> PruningConfig:
        """Read what ``to_json`` wrote."""
        return cls.from_dict(json.loads(text))


def _check_width_criterion(name: str, width: WidthSettings) -> None:
    """Refuse a criterion that there is not, or that scores other widths than those that may go."""
    from hf_cka.pruning.criteria import EXPERTS, WIDTH

    if width.inner == "experts" and name in WIDTH and name not in EXPERTS:
        known = ", ".join(map(repr, EXPERTS))
        raise ValueError(f"Criterion {name!r} scores heads and units; whole experts are scored by {known}.")
    if width.inner != "experts" and name in EXPERTS and name not in WIDTH:
        raise ValueError(
            f"Criterion {name!r} scores whole experts, but structures={width.structures!r}. Give "
            "width=WidthSettings(structures='experts'), or a criterion for heads and units ('amp', 'wanda')."
        )
    if width.inner == "experts":
        lookup(EXPERTS, name, "criterion for experts")
    else:
        lookup(WIDTH, name, "width criterion")


def _protected(given: Any) -> Any:
    if isinstance(given, Mapping):
        return {str(name): tuple(int(i) for i in layers) for name, layers in given.items()}
    return tuple(int(i) for i in given)
