"""What is removed from a model, as data: by index in the original model, never as shapes.

A plan holds decisions. Which criterion made them, and how a model is changed, never belong here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from hf_cka.anatomy import Anatomy, Family, LayerSizes, find_anatomy

if TYPE_CHECKING:
    from hf_cka.modeling.structure import LayerShape

_VERSION = 1


def _indices(values: Iterable[int], what: str) -> tuple[int, ...]:
    found = [int(v) for v in values]
    if len(set(found)) != len(found):
        raise ValueError(f"{what} names an index twice: {sorted(v for v in set(found) if found.count(v) > 1)}.")
    return tuple(sorted(found))


def as_ranges(indices: Iterable[int]) -> str:
    """Write ascending indices as text: thousands of units would fill a config file otherwise.

    Args:
        indices: ascending.

    Example:
        >>> as_ranges([0, 1, 2, 5, 7, 8])
        '0-2,5,7-8'
    """
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def from_ranges(text: str) -> list[int]:
    """Read what `as_ranges` wrote.

    Args:
        text: for example "0-2,5".

    Raises:
        ValueError: for anything else.

    Example:
        >>> from_ranges("0-2,5")
        [0, 1, 2, 5]
    """
    found: list[int] = []
    for run in filter(None, text.split(",")):
        first, _, last = run.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def _kept(table: Mapping[int, Iterable[int]], what: str) -> Mapping[int, tuple[int, ...]]:
    return MappingProxyType({int(k): _indices(v, f"{what}[{k}]") for k, v in sorted(table.items(), key=_by_int)})


def _new_ones(layers: tuple[int, ...], after: tuple[int, ...], before: tuple[int, ...]) -> tuple[int, ...]:
    """Current indices of the layers that are named after and were not before."""
    return tuple(now for now, index in enumerate(layers) if index in after and index not in before)


def _by_int(item: tuple[int, Any]) -> int:
    return int(item[0])


@dataclass(frozen=True)
class PruningPlan:
    """What is removed from a model, by original index.

    Attributes:
        num_layers: layers of the model the plan is for.
        model_type: its family ("llama"); a plan never applies to another one.
        removed_layers: whole layers.
        removed_attention: layers that lose their attention.
        removed_mlp: layers that lose their MLP.
        kept_groups: layer -> KV groups it keeps (a key/value head with the query heads that read it; without grouped
            attention, a head). Layers that are not named keep all.
        kept_units: layer -> MLP units it keeps. Layers that are not named keep all.
        version: of this format.

    Raises:
        ValueError: for an index that is out of range, named twice or removed twice, or a plan that leaves nothing.

    Example:
        >>> plan = PruningPlan(num_layers=30, model_type="llama", removed_layers=(7, 3), kept_units={0: range(4)})
        >>> plan.removed_layers, plan.kept_units[0]
        ((3, 7), (0, 1, 2, 3))
        >>> PruningPlan.from_json(plan.to_json()) == plan
        True
    """

    num_layers: int
    model_type: str
    removed_layers: tuple[int, ...] = ()
    removed_attention: tuple[int, ...] = ()
    removed_mlp: tuple[int, ...] = ()
    kept_groups: Mapping[int, tuple[int, ...]] = field(default_factory=lambda: MappingProxyType({}))
    kept_units: Mapping[int, tuple[int, ...]] = field(default_factory=lambda: MappingProxyType({}))
    version: int = _VERSION

    def __post_init__(self) -> None:
        if self.version != _VERSION:
            raise ValueError(f"This plan has version {self.version}; this hf_cka reads version {_VERSION}. Update it.")
        for name in ("removed_layers", "removed_attention", "removed_mlp"):
            object.__setattr__(self, name, _indices(getattr(self, name), name))
        for name in ("kept_groups", "kept_units"):
            object.__setattr__(self, name, _kept(getattr(self, name), name))
        self._check_layers()

    def _check_layers(self) -> None:
        names = ("removed_layers", "removed_attention", "removed_mlp", "kept_groups", "kept_units")
        for name in names:
            wrong = [i for i in getattr(self, name) if not 0 <= i < self.num_layers]
            if wrong:
                raise ValueError(
                    f"{name} names layers {wrong}, but the model has {self.num_layers} (0 to {self.num_layers - 1})."
                )
        for name in names[1:]:
            twice = sorted(set(self.removed_layers) & set(getattr(self, name)))
            if twice:
                raise ValueError(f"Layers {twice} are in removed_layers and in {name}; name each in one of them.")
        for removed, kept in (("removed_attention", "kept_groups"), ("removed_mlp", "kept_units")):
            twice = sorted(set(getattr(self, removed)) & set(getattr(self, kept)))
            if twice:
                raise ValueError(f"Layers {twice} are in {removed} and in {kept}; name each in one of them.")
        if len(self.removed_layers) == self.num_layers:
            raise ValueError(f"The plan removes all {self.num_layers} layers; at least one must stay.")
        for name in ("kept_groups", "kept_units"):
            empty = [i for i, kept in getattr(self, name).items() if not kept]
            if empty:
                other = "removed_attention" if name == "kept_groups" else "removed_mlp"
                raise ValueError(f"{name} keeps nothing in layers {empty}; put those layers into {other} instead.")

    # ---- what it says ----

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """Original indices of the layers that stay, in order."""
        return tuple(i for i in range(self.num_layers) if i not in set(self.removed_layers))

    def __str__(self) -> str:
        parts = [
            f"{len(value)} {what}"
            for value, what in (
                (self.removed_layers, "layers"),
                (self.removed_attention, "attention sub-layers"),
                (self.removed_mlp, "MLP sub-layers"),
            )
            if value
        ]
        parts += [
            f"{what} of {len(table)} layers"
            for table, what in ((self.kept_groups, "KV groups"), (self.kept_units, "MLP units"))
            if table
        ]
        return f"{self.model_type}, {self.num_layers} layers: removes " + (", ".join(parts) or "nothing")

    # ---- as text ----

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data, ready for JSON.

        Example:
            >>> PruningPlan(num_layers=4, model_type="llama", removed_mlp=(1,)).to_dict()["removed_mlp"]
            [1]
        """
        return {
            "version": self.version,
            "model_type": self.model_type,
            "num_layers": self.num_layers,
            "removed_layers": list(self.removed_layers),
            "removed_attention": list(self.removed_attention),
            "removed_mlp": list(self.removed_mlp),
            "kept_groups": {str(k): as_ranges(v) for k, v in self.kept_groups.items()},
            "kept_units": {str(k): as_ranges(v) for k, v in self.kept_units.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PruningPlan:
        """Read what `to_dict` wrote.

        Args:
            data: the fields of the plan.

        Raises:
            ValueError: for unknown or missing fields.
        """
        known = set(cls.__dataclass_fields__)
        unknown, missing = sorted(set(data) - known), sorted({"num_layers", "model_type"} - set(data))
        if unknown or missing:
            raise ValueError(f"Not a pruning plan: unknown fields {unknown}, missing fields {missing}.")
        tables = {
            name: {int(i): from_ranges(v) if isinstance(v, str) else v for i, v in data.get(name, {}).items()}
            for name in ("kept_groups", "kept_units")
        }
        return cls(**{**data, **tables})

    def to_json(self) -> str:
        """Return the plan as JSON."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """Read what `to_json` wrote."""
        return cls.from_dict(json.loads(text))

    # ---- with other plans, and with a model ----

    def then(self, second: PruningPlan) -> PruningPlan:
        """Return the one plan that does this one and then another one, made for the pruned model.

        Args:
            second: a plan whose indices count the layers, groups and units that this plan leaves.

        Raises:
            ValueError: if the second plan is not for the model that this one leaves.

        Example:
            >>> first = PruningPlan(num_layers=6, model_type="llama", removed_layers=(1,))
            >>> first.then(PruningPlan(num_layers=5, model_type="llama", removed_layers=(1,))).removed_layers
            (1, 2)
        """
        layers = self.kept_layers
        if second.model_type != self.model_type or second.num_layers != len(layers):
            raise ValueError(
                f"The second plan is for a {second.model_type!r} with {second.num_layers} layers, but this plan leaves "
                f"a {self.model_type!r} with {len(layers)}."
            )
        for name in ("removed_attention", "removed_mlp"):
            again = [i for i in getattr(second, name) if layers[i] in getattr(self, name)]
            if again:
                raise ValueError(f"The second plan's {name} names layers {again}, which have none left.")
        tables: dict[str, dict[int, tuple[int, ...]]] = {}
        gone = {layers[i] for i in second.removed_layers} | set(self.removed_layers)
        for name, removed in (("kept_groups", "removed_attention"), ("kept_units", "removed_mlp")):
            without = gone | {layers[i] for i in getattr(second, removed)} | set(getattr(self, removed))
            table = dict(getattr(self, name))
            for index, kept in getattr(second, name).items():
                before = table.get(layers[index])
                if before is not None and kept[-1] >= len(before):
                    raise ValueError(
                        f"The second plan's {name}[{index}] names {kept[-1]}, but the layer has {len(before)} left."
                    )
                table[layers[index]] = kept if before is None else tuple(before[k] for k in kept)
            tables[name] = {i: kept for i, kept in table.items() if i not in without}
        return PruningPlan(
            num_layers=self.num_layers,
            model_type=self.model_type,
            removed_layers=tuple(gone),
            removed_attention=tuple({*self.removed_attention, *(layers[i] for i in second.removed_attention)} - gone),
            removed_mlp=tuple({*self.removed_mlp, *(layers[i] for i in second.removed_mlp)} - gone),
            kept_groups=tables["kept_groups"],
            kept_units=tables["kept_units"],
        )

    def since(self, first: PruningPlan) -> PruningPlan:
        """Return what is left to do of this plan once another one, a part of it, was applied: `then` turned round.

        Args:
            first: a plan for the same model that removes nothing which this one keeps.

        Raises:
            ValueError: if it does.

        Example:
            >>> whole = PruningPlan(num_layers=6, model_type="llama", removed_layers=(1, 2))
            >>> whole.since(PruningPlan(num_layers=6, model_type="llama", removed_layers=(1,))).removed_layers
            (1,)
        """
        layers, gone = first.kept_layers, set(self.removed_layers)
        tables: dict[str, dict[int, tuple[int, ...]]] = {"kept_groups": {}, "kept_units": {}}
        for name, table in tables.items():
            before, after = getattr(first, name), getattr(self, name)
            for now, index in enumerate(layers):
                if index in after and after[index] != before.get(index):
                    have = before.get(index)
                    lost = () if have is None else set(after[index]) - set(have)
                    if lost:
                        raise ValueError(f"{name}[{index}] keeps {sorted(lost)[:5]}, which the first plan removed.")
                    table[now] = after[index] if have is None else tuple(map(have.index, after[index]))
        rest = PruningPlan(
            num_layers=len(layers),
            model_type=self.model_type,
            removed_layers=tuple(now for now, index in enumerate(layers) if index in gone),
            removed_attention=_new_ones(layers, self.removed_attention, first.removed_attention),
            removed_mlp=_new_ones(layers, self.removed_mlp, first.removed_mlp),
            kept_groups=tables["kept_groups"],
            kept_units=tables["kept_units"],
        )
        if first.then(rest) != self:
            raise ValueError("The first plan removes what this one keeps, so it is no part of it.")
        return rest

    def validate(self, model: Any) -> None:
        """Check that the plan fits a model, before anything is done to it.

        Args:
            model: a model, its `Anatomy`, or its config.

        Raises:
            ValueError: if the plan is for another architecture, an index is out of range, a sub-layer is already
                gone, or no attention would stay; the message names the value.
        """
        self.shapes(model)

    def shapes(self, model: Any) -> list[LayerShape]:
        """Return the shape of every layer the plan leaves; checks it as `validate` does.

        Args:
            model: a model, its `Anatomy`, or its config.
        """
        from hf_cka.modeling.structure import LayerShape, check_renumbering, layer_shapes

        family, config = family_and_config(model)
        if self.model_type != family.name or self.num_layers != config.num_hidden_layers:
            raise ValueError(
                f"The plan is for a {self.model_type!r} with {self.num_layers} layers, but the model is a "
                f"{family.name!r} with {config.num_hidden_layers}."
            )
        now = layer_shapes(family, config)
        for which, name in (("attention", "removed_attention"), ("mlp", "removed_mlp")):
            gone = [i for i in getattr(self, name) if which in now[i].skip]
            gone += [i for i in (self.kept_groups if which == "attention" else self.kept_units) if which in now[i].skip]
            if gone:
                raise ValueError(f"Layers {sorted(gone)} have no {which} to prune; it was removed before.")
        for name, size, what in (
            ("kept_groups", "num_kv_heads", "KV groups"),
            ("kept_units", "intermediate_size", "MLP units"),
        ):
            for index, kept in getattr(self, name).items():
                have = getattr(now[index], size)
                if kept[0] < 0 or kept[-1] >= have:
                    wrong = [k for k in kept if not 0 <= k < have]
                    raise ValueError(f"{name}[{index}] names {wrong[:5]}, but layer {index} has {have} {what}.")
        check_renumbering(family, config, self.kept_layers)
        result = []
        for index in self.kept_layers:
            shape = now[index]
            skip = set(shape.skip)
            skip |= {"attention"} if index in self.removed_attention else set()
            skip |= {"mlp"} if index in self.removed_mlp else set()
            if len(skip) == 2 and not family.stream_norms:
                continue  # nothing is left of this layer
            per_group = shape.num_heads // shape.num_kv_heads if shape.num_kv_heads else 0
            groups = len(self.kept_groups[index]) if index in self.kept_groups else shape.num_kv_heads
            units = len(self.kept_units[index]) if index in self.kept_units else shape.intermediate_size
            result.append(
                LayerShape(
                    source=index,
                    num_heads=0 if "attention" in skip else groups * per_group,
                    num_kv_heads=0 if "attention" in skip else groups,
                    intermediate_size=0 if "mlp" in skip else units,
                    skip=tuple(sorted(skip)),
                )
            )
        if all("attention" in shape.skip for shape in result):
            raise ValueError("The plan leaves no attention in any layer, so tokens could not see each other. Keep one.")
        return result

    def price(self, model: Any, length: int = 1024) -> Any:
        """Return what the model costs before and after the plan; see `hf_cka.pruning.price.Price`.

        Args:
            model: a model, its `Anatomy`, or its config.
            length: tokens of context for the FLOPs and the KV cache.
        """
        from hf_cka.pruning.price import price

        return price(self, model, length)

    def explain(self, model: Any) -> Any:
        """Return which rung the pruned checkpoint needs and who can load it; see `hf_cka.pruning.price.Explanation`.

        Args:
            model: a model, its `Anatomy`, or its config.
        """
        from hf_cka.pruning.price import explain

        return explain(self, model)


def family_and_config(model: Any) -> tuple[Family, Any]:
    """Return the family and the layers' config of a model, an `Anatomy` or a config.

    Args:
        model: any of the three.

    Raises:
        ValueError: for the config of a family that is not in the table; hand in the model there.
    """
    from hf_cka.anatomy.model import family_of_config

    if isinstance(model, Anatomy):
        return model.family, model.config
    if hasattr(model, "named_modules"):
        anatomy = find_anatomy(model)
        return anatomy.family, anatomy.config
    config = model.get_text_config()
    return family_of_config(config), config


def groups_of_heads(heads: Iterable[int], sizes: LayerSizes) -> tuple[int, ...]:
    """Return the KV groups that a set of query heads makes up.

    Args:
        heads: query heads to keep.
        sizes: sizes of the layer.

    Raises:
        ValueError: if the heads split a group, since its key/value head would have to stay for the rest.

    Example:
        >>> groups_of_heads([0, 1, 6, 7], LayerSizes(num_heads=8, num_kv_heads=4, head_dim=8, intermediate_size=1))
        (0, 3)
    """
    kept = _indices(heads, "heads")
    if any(not 0 <= h < sizes.num_heads for h in kept):
        raise ValueError(f"Heads {list(kept)} are out of range: the layer has {sizes.num_heads}.")
    per_group = sizes.num_heads // sizes.num_kv_heads
    groups = sorted({h // per_group for h in kept})
    split = [g for g in groups if sum(h // per_group == g for h in kept) < per_group]
    if split:
        raise ValueError(
            f"Heads {list(kept)} split the KV groups {split}: {per_group} query heads read one key/value head, and go "
            "together. Keep or remove them together."
        )
    return tuple(groups)
