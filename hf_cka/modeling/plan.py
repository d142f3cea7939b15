"""What is removed from a model, as data: by stack and original index, never as shapes.

A plan holds decisions. Which criterion made them, and how a model is changed, never belong here.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from hf_cka.anatomy import Anatomy, Layer, LayerSizes, find_anatomy
from hf_cka.modeling.counting import own_named
from hf_cka.modeling.modeling_hf_cka import as_ranges, numbers

VERSION = 2
# More layers or members than this are no model's; a file that names them is no plan.
_MOST = 10_000_000
# the two branches and the two widths that version 1 knew, by the names of their fields there
_BRANCHES = {"removed_attention": "attention", "removed_mlp": "mlp"}
_WIDTHS = {"kept_groups": "heads", "kept_units": "units"}


def _indices(values: Iterable[int], what: str) -> tuple[int, ...]:
    found = [int(v) for v in values]
    if len(set(found)) != len(found):
        raise ValueError(f"{what} names an index twice: {sorted(v for v in set(found) if found.count(v) > 1)}.")
    return tuple(sorted(found))


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
    return numbers(text, _MOST)


def _kept(table: Mapping[int, Iterable[int]], what: str) -> Mapping[int, tuple[int, ...]]:
    return MappingProxyType(
        {int(k): _indices(v, f"{what}[{k}]") for k, v in sorted(table.items(), key=lambda item: int(item[0]))}
    )


@dataclass(frozen=True, init=False)
class PruningPlan:
    """What is removed from a model, by stack and original index.

    Args:
        num_layers: layers of the stack that the plan is for.
        model_type: of the config of its layers ("llama"); a plan never applies to another one.
        removed_layers: whole layers.
        removed_attention: layers that lose their attention (or whatever mixes tokens there).
        removed_mlp: layers that lose their MLP.
        kept_groups: layer -> heads it keeps, or KV groups (a key/value head with the query heads that read it), or
            channels of a mixer without heads. Layers that are not named keep all.
        kept_units: layer -> MLP units it keeps. Layers that are not named keep all.
        removed_branches: branch ("cross_attention", "mlp:ffn2") -> layers that lose it.
        kept: width ("experts", "heads:encoder_attn.out_proj") -> layer -> members it keeps.
        stack: path of the stack; "" for the only one, or the one with most parameters.
        others: plans for further stacks of the same model.

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
    removed_layers: tuple[int, ...]
    removed_branches: Mapping[str, tuple[int, ...]]
    kept: Mapping[str, Mapping[int, tuple[int, ...]]]
    stack: str
    others: tuple[PruningPlan, ...]

    def __init__(
        self,
        num_layers: int,
        model_type: str,
        removed_layers: Iterable[int] = (),
        removed_attention: Iterable[int] = (),
        removed_mlp: Iterable[int] = (),
        kept_groups: Mapping[int, Iterable[int]] | None = None,
        kept_units: Mapping[int, Iterable[int]] | None = None,
        *,
        removed_branches: Mapping[str, Iterable[int]] | None = None,
        kept: Mapping[str, Mapping[int, Iterable[int]]] | None = None,
        stack: str = "",
        others: Iterable[PruningPlan] = (),
    ) -> None:
        branches = {"attention": removed_attention, "mlp": removed_mlp} | dict(removed_branches or {})
        widths = {"heads": kept_groups or {}, "units": kept_units or {}} | dict(kept or {})
        names = {v: k for k, v in (_BRANCHES | _WIDTHS).items()}
        found: dict[str, tuple[int, ...]] = {}
        for name, layers in sorted(branches.items()):
            indices = _indices(layers, names.get(name, f"removed_branches[{name!r}]"))
            if indices:
                found[name] = indices
        tables = {name: _kept(table, names.get(name, f"kept[{name!r}]")) for name, table in sorted(widths.items())}
        for name, value in (
            ("num_layers", num_layers),
            ("model_type", model_type),
            ("removed_layers", _indices(removed_layers, "removed_layers")),
            ("removed_branches", MappingProxyType(found)),
            ("kept", MappingProxyType({name: table for name, table in tables.items() if table})),
            ("stack", stack),
            ("others", tuple(others)),
        ):
            object.__setattr__(self, name, value)
        self._check_layers()

    def _fields(self) -> list[tuple[str, Iterable[int]]]:
        """What is named, under the names that people know it by."""
        words = {v: k for k, v in (_BRANCHES | _WIDTHS).items()}
        found: list[tuple[str, Iterable[int]]] = [("removed_layers", self.removed_layers)]
        found += [(words.get(n, f"removed_branches[{n!r}]"), layers) for n, layers in self.removed_branches.items()]
        return found + [(words.get(n, f"kept[{n!r}]"), table) for n, table in self.kept.items()]

    def _check_layers(self) -> None:
        if not 0 < self.num_layers <= _MOST:
            raise ValueError(f"num_layers={self.num_layers} is no number of layers.")
        for name, layers in self._fields():
            wrong = [i for i in layers if not 0 <= i < self.num_layers]
            if wrong:
                raise ValueError(
                    f"{name} names layers {wrong}, but the model has {self.num_layers} (0 to {self.num_layers - 1})."
                )
            twice = sorted(set(self.removed_layers) & set(layers)) if name != "removed_layers" else []
            if twice:
                raise ValueError(f"Layers {twice} are in removed_layers and in {name}; name each in one of them.")
        for branch, width in (("attention", "heads"), ("mlp", "units"), ("mlp", "experts")):
            twice = sorted(set(self.removed_branches.get(branch, ())) & set(self.kept.get(width, {})))
            if twice:
                names = {v: k for k, v in (_BRANCHES | _WIDTHS).items()}
                other = names.get(width, f"kept[{width!r}]")
                raise ValueError(f"Layers {twice} are in {names[branch]} and in {other}; name each in one of them.")
        if len(self.removed_layers) == self.num_layers:
            raise ValueError(f"The plan removes all {self.num_layers} layers; at least one must stay.")
        for name, table in self.kept.items():
            empty = [i for i, kept in table.items() if not kept]
            if empty:
                words = {"heads": ("kept_groups", "removed_attention"), "units": ("kept_units", "removed_mlp")}
                what, other = words.get(name, (f"kept[{name!r}]", "removed_branches"))
                raise ValueError(f"{what} keeps nothing in layers {empty}; put those layers into {other} instead.")
        paths = [self.stack, *(other.stack for other in self.others)]
        if len(set(paths)) != len(paths) or any(other.others for other in self.others):
            raise ValueError(f"A plan names each stack once; this one names {paths}.")

    # ---- what it says ----

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """Original indices of the layers that stay, in order."""
        gone = set(self.removed_layers)
        return tuple(i for i in range(self.num_layers) if i not in gone)

    @property
    def removed_attention(self) -> tuple[int, ...]:
        """Layers that lose their attention."""
        return self.removed_branches.get("attention", ())

    @property
    def removed_mlp(self) -> tuple[int, ...]:
        """Layers that lose their MLP."""
        return self.removed_branches.get("mlp", ())

    @property
    def kept_groups(self) -> Mapping[int, tuple[int, ...]]:
        """Layer -> heads or KV groups it keeps."""
        return self.kept.get("heads", MappingProxyType({}))

    @property
    def kept_units(self) -> Mapping[int, tuple[int, ...]]:
        """Layer -> units it keeps."""
        return self.kept.get("units", MappingProxyType({}))

    def seen_in(self, anatomy: Anatomy) -> Anatomy:
        """The anatomy of the stack that this is for; the given one where the plan names none."""
        return anatomy.on(self.stack) if self.stack else anatomy

    @property
    def by_stack(self) -> tuple[PruningPlan, ...]:
        """One plan per stack."""
        return (replace_plan(self, others=()), *self.others)

    @property
    def removes_nothing(self) -> bool:
        """Whether it leaves this stack, and all others, as they are."""
        return not (self.removed_layers or self.removed_branches or self.kept) and all(
            other.removes_nothing for other in self.others
        )

    def removed_names(self, model: Any) -> tuple[str, ...]:
        """Return the dotted names of the layers that go as a whole.

        Args:
            model: the dense model.

        Example:
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> config = LlamaConfig(
            ...     num_hidden_layers=3, hidden_size=8, intermediate_size=16, num_attention_heads=2, vocab_size=16
            ... )
            >>> PruningPlan(3, "llama", removed_layers=(1,)).removed_names(LlamaForCausalLM(config))
            ('model.layers.1',)
        """
        anatomy = find_anatomy(model)
        return tuple(
            on.layer_name(i) for plan in self.by_stack for on in [plan.seen_in(anatomy)] for i in plan.removed_layers
        )

    def __str__(self) -> str:
        words = {
            "attention": "attention sub-layers",
            "mlp": "MLP sub-layers",
            "heads": "KV groups",
            "units": "MLP units",
        }
        parts = [f"{len(self.removed_layers)} layers"] if self.removed_layers else []
        parts += [f"{len(layers)} {words.get(name, name)}" for name, layers in self.removed_branches.items()]
        parts += [f"{words.get(name, name)} of {len(table)} layers" for name, table in self.kept.items()]
        text = f"{self.model_type}, {self.num_layers} layers"
        text += f" of {self.stack}" if self.stack else ""
        text += ": removes " + (", ".join(parts) or "nothing")
        return "; ".join([text, *map(str, self.others)])

    # ---- as text ----

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data, ready for JSON.

        Example:
            >>> plan = PruningPlan(num_layers=4, model_type="llama", removed_mlp=(1,))
            >>> plan.to_dict()["stacks"][""]["removed_branches"]
            {'mlp': [1]}
        """
        return {
            "version": VERSION,
            "model_type": self.model_type,
            "stacks": {
                plan.stack: {
                    "model_type": plan.model_type,
                    "num_layers": plan.num_layers,
                    "removed_layers": list(plan.removed_layers),
                    "removed_branches": {name: list(layers) for name, layers in plan.removed_branches.items()},
                    "kept": {
                        name: {str(layer): as_ranges(kept) for layer, kept in table.items()}
                        for name, table in plan.kept.items()
                    },
                }
                for plan in self.by_stack
            },
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PruningPlan:
        """Read what `to_dict` wrote, of this version or the first.

        Args:
            data: the fields of the plan.

        Raises:
            ValueError: for unknown or missing fields, another version, or values that no plan has.

        Example:
            >>> PruningPlan.from_dict({"model_type": "llama", "num_layers": 4, "removed_mlp": [1]}).removed_mlp
            (1,)
        """
        version = data.get("version", 1)
        if version not in (1, VERSION):
            raise ValueError(f"This plan has version {version}; this hf_cka reads versions 1 and {VERSION}. Update it.")
        try:
            if version == 1:
                return cls(**_version_1(data))
            unknown = sorted(set(data) - {"version", "model_type", "stacks"})
            if unknown or not data.get("stacks"):
                raise ValueError(f"Not a pruning plan: unknown fields {unknown}, stacks {data.get('stacks')!r}.")
            plans = [_of_stack(path, entry) for path, entry in data["stacks"].items()]
        except (TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"Not a pruning plan: {type(error).__name__} {error}.") from error
        return replace_plan(plans[0], others=plans[1:])

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
            second: a plan whose indices count the layers and members that this plan leaves.

        Raises:
            ValueError: if the second plan is not for the model that this one leaves.

        Example:
            >>> first = PruningPlan(num_layers=6, model_type="llama", removed_layers=(1,))
            >>> first.then(PruningPlan(num_layers=5, model_type="llama", removed_layers=(1,))).removed_layers
            (1, 2)
        """
        if self.others or second.others or (second.stack and second.stack != self.stack and not self.removes_nothing):
            return _then_by_stack(self, second)
        layers = self.kept_layers
        if second.model_type != self.model_type or second.num_layers != len(layers):
            raise ValueError(
                f"The second plan is for a {second.model_type!r} with {second.num_layers} layers, but this plan leaves "
                f"a {self.model_type!r} with {len(layers)}."
            )
        removed: dict[str, set[int]] = {name: set(old) for name, old in self.removed_branches.items()}
        for name, new in second.removed_branches.items():
            again = [i for i in new if layers[i] in removed.get(name, ())]
            if again:
                words = {v: k for k, v in _BRANCHES.items()}
                raise ValueError(
                    f"The second plan's {words.get(name, name)} names layers {again}, which have none left."
                )
            removed.setdefault(name, set()).update(layers[i] for i in new)
        gone = {layers[i] for i in second.removed_layers} | set(self.removed_layers)
        tables: dict[str, dict[int, tuple[int, ...]]] = {name: dict(table) for name, table in self.kept.items()}
        for name, new_table in second.kept.items():
            table = tables.setdefault(name, {})
            for index, kept in new_table.items():
                before = table.get(layers[index])
                if before is not None and kept[-1] >= len(before):
                    words = {v: k for k, v in _WIDTHS.items()}
                    raise ValueError(
                        f"The second plan's {words.get(name, name)}[{index}] names {kept[-1]}, but the layer has "
                        f"{len(before)} left."
                    )
                table[layers[index]] = kept if before is None else tuple(before[k] for k in kept)
        without = {"heads": removed.get("attention", set())}
        without |= dict.fromkeys(("units", "experts"), removed.get("mlp", set()))
        return PruningPlan(
            num_layers=self.num_layers,
            model_type=self.model_type,
            removed_layers=gone,
            removed_branches={name: branch - gone for name, branch in removed.items()},
            kept={
                name: {i: kept for i, kept in table.items() if i not in gone | without.get(name, set())}
                for name, table in tables.items()
            },
            stack=self.stack or second.stack,
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
        tables: dict[str, dict[int, tuple[int, ...]]] = {}
        for name, after in self.kept.items():
            before, table = first.kept.get(name, {}), tables.setdefault(name, {})
            for now, index in enumerate(layers):
                if index in after and after[index] != before.get(index):
                    have = before.get(index)
                    lost = () if have is None else set(after[index]) - set(have)
                    if lost:
                        words = {v: k for k, v in _WIDTHS.items()}
                        raise ValueError(
                            f"{words.get(name, name)}[{index}] keeps {sorted(lost)[:5]}, which the first plan removed."
                        )
                    table[now] = after[index] if have is None else tuple(map(have.index, after[index]))
        branches = {
            name: tuple(
                now for now, i in enumerate(layers) if i in after and i not in first.removed_branches.get(name, ())
            )
            for name, after in self.removed_branches.items()
        }
        rest = PruningPlan(
            num_layers=len(layers),
            model_type=self.model_type,
            removed_layers=tuple(now for now, index in enumerate(layers) if index in gone),
            removed_branches=branches,
            kept=tables,
            stack=self.stack,
        )
        if self.others:
            before_of = {plan.stack: plan for plan in first.by_stack}
            others = [
                other.since(before_of[other.stack]) if other.stack in before_of else other for other in self.others
            ]
            rest = replace_plan(rest, others=others)
        if first.then(rest) != self:
            raise ValueError("The first plan removes what this one keeps, so it is no part of it.")
        return rest

    def folded(self, anatomy: Anatomy) -> PruningPlan:
        """Return the same plan with the layers that lose all there is of them among the removed layers.

        Args:
            anatomy: of the model that the plan is for.

        Example:
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> config = LlamaConfig(
            ...     num_hidden_layers=3, hidden_size=8, intermediate_size=16, num_attention_heads=2, vocab_size=16
            ... )
            >>> both = PruningPlan(3, "llama", removed_attention=(1, 2), removed_mlp=(1,))
            >>> both = both.folded(find_anatomy(LlamaForCausalLM(config)))
            >>> both.removed_layers, both.removed_attention
            ((1,), (2,))
        """
        on = self.seen_in(anatomy)
        gone = set()
        for index in set().union(*self.removed_branches.values()):
            names = {name for name, layers in self.removed_branches.items() if index in layers}
            if is_all_of(on.stack.layers[index], names, (name for name, _ in own_named(on.layer(index)))):
                gone.add(index)
        if not gone and not self.others:
            return self
        return replace_plan(
            self,
            removed_layers={*self.removed_layers, *gone},
            removed_branches={name: set(layers) - gone for name, layers in self.removed_branches.items()},
            kept={name: {i: kept for i, kept in table.items() if i not in gone} for name, table in self.kept.items()},
            others=tuple(other.folded(anatomy) for other in self.others),
        )

    def validate(self, model: Any) -> None:
        """Check that the plan fits a model, before anything is done to it.

        Args:
            model: a model, or its `Anatomy`.

        Raises:
            ValueError: if the plan is for another architecture, an index is out of range, something is already gone
                or cannot go, or no attention would stay; the message names the value.
        """
        anatomy = model if isinstance(model, Anatomy) else find_anatomy(model)
        for plan in self.by_stack:
            plan.check(plan.seen_in(anatomy))

    def check(self, anatomy: Anatomy) -> None:
        """Check that the plan fits one stack of a model.

        Args:
            anatomy: of that stack.

        Raises:
            ValueError: as :meth:`validate`.
        """
        if self.model_type != anatomy.model_type or self.num_layers != anatomy.num_layers:
            raise ValueError(
                f"The plan is for a {self.model_type!r} with {self.num_layers} layers, but the model is a "
                f"{anatomy.model_type!r} with {anatomy.num_layers}."
            )
        for index in self.removed_layers:
            if anatomy.stack.layers[index].reason:
                raise ValueError(f"Layer {index} cannot be removed: {anatomy.stack.layers[index].reason}.")
        for name, layers in self.removed_branches.items():
            gone = [i for i in layers if anatomy.branch(i, name) is None]
            if gone:
                raise ValueError(f"Layers {gone} have no {name} to prune; it was removed before, or never there.")
            for index in layers:
                branch = anatomy.branch(index, name)
                if branch is not None and branch.reason:
                    raise ValueError(f"The {name} of layer {index} cannot be removed: {branch.reason}.")
        for name, table in self.kept.items():
            self._check_width(anatomy, name, table)
        self._check_mixing(anatomy)

    def _check_width(self, anatomy: Anatomy, name: str, table: Mapping[int, tuple[int, ...]]) -> None:
        words = {"heads": ("kept_groups", "attention", "KV groups"), "units": ("kept_units", "mlp", "MLP units")}
        members = "experts" if name.partition(":")[0] == "experts" else "members"
        field, branch, members = words.get(name, (f"kept[{name!r}]", name, members))
        for index, kept in table.items():
            width = anatomy.stack.layers[index].width(name)
            if width is None:
                raise ValueError(f"Layers {[index]} have no {branch} to prune; it was removed before, or never there.")
            if width.reason:
                raise ValueError(f"The {name} of layer {index} cannot be narrowed: {width.reason}.")
            if kept[0] < 0 or kept[-1] >= width.members:
                wrong = [k for k in kept if not 0 <= k < width.members]
                raise ValueError(
                    f"{field}[{index}] names {wrong[:5]}, but layer {index} has {width.members} {members}."
                )
            if len(kept) < width.least:
                what = members if width.output.block == 1 else f"groups of {width.output.block} {members}"
                raise ValueError(
                    f"{field}[{index}] keeps {len(kept)} of {width.members} {what}, but {width.least} must stay in "
                    f"layer {index}: its router sends every token to that many."
                )

    def _check_mixing(self, anatomy: Anatomy) -> None:
        layers = anatomy.stack.layers
        mixes = [[b.name for b in layer.branches if b.kind == "attention"] for layer in layers]
        left = any(
            # of a layer without known branches (it changes the shape of the stream) nothing but itself can go
            not (layer.branches or layer.skipped)
            or any(i not in self.removed_branches.get(name, ()) for name in mixes[i])
            for i, layer in enumerate(layers)
            if i not in self.removed_layers
        )
        if any(mixes) and not left:
            raise ValueError("The plan leaves no attention in any layer, so tokens could not see each other. Keep one.")

    def price(self, model: Any, length: int = 1024) -> Any:
        """Return what the model costs before and after the plan; see `hf_cka.modeling.price.Price`.

        Args:
            model: a model, its `Anatomy`, or its config.
            length: tokens of context for the FLOPs and the KV cache.
        """
        from hf_cka.modeling.price import price

        return price(self, model, length)

    def explain(self, model: Any) -> Any:
        """Return which rung the pruned checkpoint needs and who can load it; see `hf_cka.modeling.price.Explanation`.

        Args:
            model: a model, its `Anatomy`, or its config.
        """
        from hf_cka.modeling.price import explain

        return explain(self, model)


def is_all_of(layer: Layer, branches: Collection[str], parameters: Iterable[str]) -> bool:
    """Return whether a layer hands its input on without some branches, since nothing else of it is left.

    Args:
        layer: as it is now.
        branches: names of those that go.
        parameters: names of all that the layer has.
    """
    gone = {name for b in layer.branches if b.name in branches for name in b.parameters}
    if layer.reason or not {b.name for b in layer.branches} <= set(branches):
        return False
    return layer.single or set(parameters) <= gone


def replace_plan(plan: PruningPlan, **changes: Any) -> PruningPlan:
    """Return a plan with other fields.

    Example:
        >>> replace_plan(PruningPlan(4, "llama"), stack="model.layers").stack
        'model.layers'
    """
    fields = {name: getattr(plan, name) for name in PruningPlan.__dataclass_fields__}
    return PruningPlan(**{**fields, **changes})


def _then_by_stack(first: PruningPlan, second: PruningPlan) -> PruningPlan:
    plans = {plan.stack: plan for plan in first.by_stack}
    for plan in second.by_stack:
        plans[plan.stack] = plans[plan.stack].then(plan) if plan.stack in plans else plan
    some = [plan for plan in plans.values() if not plan.removes_nothing] or list(plans.values())[:1]
    return replace_plan(some[0], others=some[1:])


def _of_stack(path: str, entry: Mapping[str, Any]) -> PruningPlan:
    known = {"model_type", "num_layers", "removed_layers", "removed_branches", "kept"}
    unknown, missing = sorted(set(entry) - known), sorted({"num_layers", "model_type"} - set(entry))
    if unknown or missing:
        raise ValueError(f"Not a pruning plan: stack {path!r} has unknown fields {unknown}, missing fields {missing}.")
    return PruningPlan(
        num_layers=entry["num_layers"],
        model_type=entry["model_type"],
        removed_layers=entry.get("removed_layers", ()),
        removed_branches=entry.get("removed_branches", {}),
        kept={name: _read(table) for name, table in entry.get("kept", {}).items()},
        stack=path,
    )


def _version_1(data: Mapping[str, Any]) -> dict[str, Any]:
    known = {"version", "num_layers", "model_type", "removed_layers", *_BRANCHES, *_WIDTHS}
    unknown, missing = sorted(set(data) - known), sorted({"num_layers", "model_type"} - set(data))
    if unknown or missing:
        raise ValueError(f"Not a pruning plan: unknown fields {unknown}, missing fields {missing}.")
    fields = {k: v for k, v in data.items() if k != "version"}
    return fields | {name: _read(data.get(name, {})) for name in _WIDTHS}


def _read(table: Mapping[Any, Any]) -> dict[int, list[int]]:
    return {int(i): from_ranges(v) if isinstance(v, str) else list(v) for i, v in table.items()}


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
