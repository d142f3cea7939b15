"""What to prune and how, as frozen data with a JSON round trip."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from hf_cka.lookup import lookup
from hf_cka.representations import Pooling

VERSION = 1

# method -> what it fills in where the config leaves it open
METHODS: dict[str, Mapping[str, Any]] = {
    "depth": {"criterion": "cka"},
}
# what depth pruning removes -> the kinds of structure
STRUCTURES: dict[str, tuple[str, ...]] = {
    "layers": ("layer",),
    "sublayers": ("attention", "mlp"),
    "attention": ("attention",),
    "mlp": ("mlp",),
}
# which side of the ratio to end on
REACH = {"nearest": "as near as possible", "at_least": "not less", "at_most": "not more"}
RESCORE = {"lazy": "only what can change the decision", "full": "every structure after every removal"}


@dataclass(frozen=True)
class PruningConfig:
    """What to prune and how.

    Args:
        method: ``"depth"``.
        ratio: removed parameters over all parameters, embeddings included. Give this or ``num_layers``.
        num_layers: how many structures to remove (layers, or sub-layers with ``structures="sublayers"``).
        criterion: of depth pruning, by name; by default the method's.
        structures: what depth pruning removes: ``"layers"``, ``"sublayers"``, ``"attention"`` or ``"mlp"``.
        contiguous: remove each step's layers as one run of neighbours.
        steps: how many times to score on the way; None scores again after every removal, 1 scores once.
        protect: layers that stay, by index in the model given; negative ones count from the end.
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
    structures: str = "layers"
    contiguous: bool = False
    steps: int | None = None
    protect: tuple[int, ...] = ()
    order: str = "normal"
    reach: str = "nearest"
    rescore: str = "lazy"
    pooling: str = "mean"
    seed: int = 0
    version: int = VERSION

    def __post_init__(self) -> None:
        from hf_cka.pruning.criteria.base import ORDERS
        from hf_cka.pruning.criteria.depth import DEPTH

        if self.version != VERSION:
            raise ValueError(f"This config has version {self.version}; this hf_cka reads version {VERSION}. Update it.")
        defaults = lookup(METHODS, self.method, "pruning method")
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        object.__setattr__(self, "protect", tuple(int(i) for i in self.protect))
        if self.criterion is not None:
            lookup(DEPTH, self.criterion, "depth criterion")
        for table, value, what in (
            (STRUCTURES, self.structures, "kind of structures"),
            (ORDERS, self.order, "order"),
            (REACH, self.reach, "reach"),
            (RESCORE, self.rescore, "rescore"),
        ):
            lookup(table, value, what)
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
        if self.contiguous and self.structures != "layers":
            raise ValueError(f"contiguous=True removes runs of whole layers, but structures={self.structures!r}.")
        if self.contiguous and self.steps is None:
            raise ValueError("contiguous=True needs steps: how many runs to remove. Give steps=1 for a single run.")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON data."""
        return {**asdict(self), "protect": list(self.protect)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PruningConfig:
        """Read what ``to_dict`` wrote.

        Raises:
            ValueError: for an unknown field (near names are listed) or another version.
        """
        known = {field.name: field for field in fields(cls)}
        for name in data:
            lookup(known, name, "field of PruningConfig")
        return cls(**{**data, "protect": tuple(data.get("protect", ()))})

    def to_json(self) -> str:
        """Return the config as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> PruningConfig:
        """Read what ``to_json`` wrote."""
        return cls.from_dict(json.loads(text))
