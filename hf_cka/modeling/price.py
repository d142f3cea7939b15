"""What a model costs before and after a plan, and who can load the result: told before anything is done."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_cka.anatomy import Anatomy, Branch, find_anatomy
from hf_cka.modeling.counting import Weights, model_of, own_named, own_parameters
from hf_cka.modeling.plan import PruningPlan

if TYPE_CHECKING:
    from hf_cka.modeling.structure import Rung

# Modules that compare every token with every other, and store keys and values: by the name of their class, because
# their shapes look like those of mixers that keep a state instead.
_ATTENDS = re.compile(r"attention|attn", re.IGNORECASE)
_KEEPS_STATE = re.compile(r"linear_?att|lightning|delta|retention|rwkv|mamba|fourier", re.IGNORECASE)
_KEYS = re.compile(r"(^|\.)(k|key|keys)(_|$)")
# Weights that multiply positions, and not every token.
_POSITIONS = re.compile(r"(^|[._])(pos|position|rel|relative)(_|$)")
# Fields of configs of mixtures of experts: how many there are, and how many a token goes through.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")


@dataclass(frozen=True)
class Cost:
    """What one model costs.

    Attributes:
        parameters: all of them; tied ones count once.
        non_embedding_parameters: without embeddings and the output projection to the vocabulary.
        kv_cache_bytes_per_token: keys and values of one token, in the dtype of the model; 0 for encoders, and for
            mixers that keep a state instead.
        prefill_flops: to read `length` tokens (patches, frames: positions of each stack) and give the logits of the
            last one (of all, for encoders); one multiply-add is two. Of experts, those count that a token goes through.
        decode_flops: to generate one token after `length`; 0 for encoders.
    """

    parameters: int
    non_embedding_parameters: int
    kv_cache_bytes_per_token: int
    prefill_flops: int
    decode_flops: int


@dataclass(frozen=True)
class Price:
    """What a plan changes.

    Attributes:
        before: the model as it is.
        after: the model after the plan.
        length: tokens of context that the FLOPs are for.
    """

    before: Cost
    after: Cost
    length: int

    @property
    def ratio(self) -> float:
        """Removed parameters over all parameters, embeddings included."""
        return 1 - self.after.parameters / self.before.parameters

    @property
    def non_embedding_ratio(self) -> float:
        """The same without embeddings."""
        return 1 - self.after.non_embedding_parameters / self.before.non_embedding_parameters

    def __str__(self) -> str:
        rows = []
        for name in Cost.__dataclass_fields__:
            before, after = getattr(self.before, name), getattr(self.after, name)
            share = f"{after / before:7.1%}" if before else "      -"
            rows.append(f"{name.replace('_', ' '):28}{before:>18,}{after:>18,}{share}")
        return "\n".join([f"{f'at {self.length} tokens':28}{'before':>18}{'after':>18}  ratio", *rows])


@dataclass(frozen=True)
class _Attention:
    """What one attention of a layer computes for each of its members.

    Args:
        branch: which branch it is.
        width: name of the width that counts its members; "" where they cannot be told apart.
        members: how many.
        stored: numbers that a token stores for one of them.
        compared: numbers that one pair of tokens takes: heads times the sizes of a key and a value.
    """

    branch: str
    width: str
    members: int
    stored: int
    compared: int


@dataclass(frozen=True)
class _Layer:
    """What one layer holds, and what it does with it.

    Args:
        shapes: of its parameters, by name.
        factors: how often each multiplies a token; none where it does not.
        attention: what compares tokens.
        span: how many tokens one sees at most; None for all.
        visits: how often a pass runs it.
    """

    shapes: Mapping[str, tuple[int, ...]]
    factors: Mapping[str, float]
    attention: tuple[_Attention, ...]
    span: int | None
    visits: int


class CostTable:
    """The costs of one model, from which any number of plans is priced without building anything.

    Args:
        model: a model, its `Anatomy`, or its config (a model is then built on the meta device).

    Raises:
        ValueError: if no layers are recognised.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(num_hidden_layers=4, hidden_size=8, intermediate_size=16, num_attention_heads=2,
        ...                      vocab_size=16)
        >>> price = CostTable(config).price(PruningPlan(num_layers=4, model_type="llama", removed_layers=(1, 2)))
        >>> round(price.non_embedding_ratio, 2)
        0.5
    """

    def __init__(self, model: Any) -> None:
        anatomy = model if isinstance(model, Anatomy) else find_anatomy(model_of(model))
        if any(not p.is_floating_point() for p in anatomy.model.parameters()):  # packed: does not show its shape
            stack, inner = anatomy.stack.path, anatomy.model
            anatomy = find_anatomy(model_of(inner.config))
            anatomy = anatomy.on(stack) if stack in {s.path for s in anatomy.stacks} else anatomy
        self.anatomy = anatomy
        whole: Any = anatomy.model
        self.weights = Weights(whole)
        self.stacks = {
            stack.path: [_layer(on, i) for i in range(on.num_layers)]
            for stack in anatomy.stacks
            for on in [anatomy.on(stack.path)]
        }
        head = whole.get_output_embeddings() if hasattr(whole, "get_output_embeddings") else None
        self.head = 0 if head is None else head.weight.numel()
        layers = [m for stack in anatomy.stacks for layer in anatomy.on(stack.path).layers for m in layer.modules()]
        inside = {id(m) for m in layers}
        embeddings = {
            id(p): p.numel()
            for m in whole.modules()
            if isinstance(m, nn.Embedding) and id(m) not in inside
            for p in own_parameters(m)
        }
        if head is not None:
            embeddings |= {id(p): p.numel() for p in own_parameters(head)}
        self.embeddings = sum(embeddings.values())
        dtype = getattr(anatomy.config, "dtype", None) or next(whole.parameters()).dtype
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        self.bytes = torch.finfo(dtype).bits // 8

    def price(self, plan: PruningPlan, length: int = 1024) -> Price:
        """Return what a plan changes.

        Args:
            plan: for this model.
            length: tokens of context for the FLOPs.

        Raises:
            ValueError: if the plan does not fit the model.
        """
        plan.validate(self.anatomy)
        by_stack = {self._on(part).stack.path: part for part in plan.by_stack}
        return Price(self._cost({}, length), self._cost(by_stack, length), length)

    def _on(self, plan: PruningPlan) -> Anatomy:
        return plan.seen_in(self.anatomy)

    def _cost(self, plans: Mapping[str, PruningPlan], length: int) -> Cost:
        decoder = any(stack.causal for stack in self.anatomy.stacks)
        gone: list[str] = []
        narrowed: dict[str, int] = {}
        cache = prefill = decode = 0.0
        for stack in self.anatomy.stacks:
            on, plan = self.anatomy.on(stack.path), plans.get(stack.path)
            for index, layer in enumerate(self.stacks[stack.path]):
                left = _left(on, index, layer, plan)
                path = on.layer_name(index)
                for name, shape in layer.shapes.items():
                    if name not in left:
                        gone.append(f"{path}.{name}")
                    elif left[name] != math.prod(shape):
                        narrowed[f"{path}.{name}"] = left[name]
                if plan is not None and index in plan.removed_layers:
                    continue
                share = _share_of_experts(on, index, plan)
                matmul = layer.visits * sum(
                    left[name] * min(1.0, f * share.get(name, 1.0)) for name, f in layer.factors.items() if name in left
                )
                stored, compared = _attending(layer, index, plan)
                prefill += 2 * matmul * length + 2 * compared * _pairs(length, layer.span, stack.causal)
                if stack.causal:
                    cache += stored * self.bytes
                    decode += 2 * matmul + 2 * compared * min(length, layer.span or length)
        parameters = self._parameters(gone, narrowed)
        return Cost(
            parameters=parameters,
            non_embedding_parameters=parameters - self.embeddings,
            kv_cache_bytes_per_token=round(cache),
            prefill_flops=round(prefill) + 2 * self.head * (1 if decoder else length),
            decode_flops=round(decode) + 2 * self.head if decoder else 0,
        )

    def _parameters(self, gone: list[str], narrowed: Mapping[str, int]) -> int:
        """All that is left: what is shared goes with the last of its places, and where it is narrowed it is apart."""
        named = self.weights.named
        cut = Counter(id(named[name]) for name in narrowed)
        away = Counter(id(named[name]) for name in gone)
        whole = {id(named[name]): named[name].numel() for name in (*gone, *narrowed)}
        lost = sum(n for i, n in whole.items() if cut[i] + away[i] == self.weights.places[i])
        return self.weights.total - lost + sum(narrowed.values())


def _left(on: Anatomy, index: int, layer: _Layer, plan: PruningPlan | None) -> dict[str, int]:
    """What is left of each parameter of a layer; those that go are not named."""
    if plan is None:
        return {name: math.prod(shape) for name, shape in layer.shapes.items()}
    if index in plan.removed_layers:
        return {}
    gone = {
        name
        for branch, layers in plan.removed_branches.items()
        if index in layers and (there := on.branch(index, branch)) is not None
        for name in there.parameters
    }
    shapes = {name: list(shape) for name, shape in layer.shapes.items() if name not in gone}
    for name, table in plan.kept.items():
        width = on.stack.layers[index].width(name) if index in table else None
        if width is None:
            continue
        for part in width.slices:
            if part.parameter in shapes:
                shapes[part.parameter][part.axis] -= part.block * (width.members - len(table[index]))
    return {name: math.prod(shape) for name, shape in shapes.items()}


def _share_of_experts(on: Anatomy, index: int, plan: PruningPlan | None) -> dict[str, float]:
    """By how much more often each parameter of experts is used once there are fewer: a token goes through as many."""
    found: dict[str, float] = {}
    for name, table in plan.kept.items() if plan is not None else ():
        width = on.stack.layers[index].width(name) if index in table else None
        if width is not None and width.kind == "experts":
            found |= {part.parameter: width.members / len(table[index]) for part in width.slices[1:]}
    return found


def _attending(layer: _Layer, index: int, plan: PruningPlan | None) -> tuple[int, int]:
    """Numbers that a token stores, and that a pair of tokens takes, in a layer."""
    stored = compared = 0
    for one in layer.attention:
        members = one.members
        if plan is not None:
            if index in plan.removed_branches.get(one.branch, ()):
                continue
            members = len(plan.kept.get(one.width, {}).get(index, range(members)))
        stored += layer.visits * members * one.stored
        compared += layer.visits * members * one.compared
    return stored, compared


def _pairs(length: int, span: int | None, causal: bool) -> int:
    """Pairs of tokens that see each other."""
    reach = length if span is None else min(span, length)
    if not causal:
        return length * reach
    return reach * (reach + 1) // 2 + (length - reach) * reach


def _layer(on: Anatomy, index: int) -> _Layer:
    layer, found = on.layer(index), on.stack.layers[index]
    named = dict(own_named(layer))
    experts, chosen = _expert_counts(on.config)
    factors = {}
    for name, parameter in named.items():
        path = name.rpartition(".")[0]
        module: Any = layer.get_submodule(path) if _has(layer, path) else None
        if parameter.ndim < 2 or isinstance(module, nn.Embedding) or _POSITIONS.search(path.rpartition(".")[2]):
            continue
        expert = "experts" in path.split(".") or "Experts" in type(module).__name__
        count = parameter.shape[0] if parameter.ndim == 3 else experts
        factors[name] = min(1.0, chosen / count) if expert and chosen and count else 1.0
    attention = tuple(a for b in found.branches if (a := _attention(on, index, b)) is not None)
    shapes = {name: tuple(p.shape) for name, p in named.items()}
    return _Layer(shapes, factors, attention, _span(on, index), found.visits)


def _has(module: nn.Module, path: str) -> bool:
    for name in filter(None, path.split(".")):
        if name not in module._modules:
            return False
        module = module._modules[name]  # type: ignore[assignment]
    return True


def _expert_counts(config: Any) -> tuple[int, int]:
    """How many experts a layer has, and how many of them a token goes through; 0 where the config does not say."""
    count, chosen = (
        next((v for n in names if type(v := getattr(config, n, None)) is int and v > 0), 0)
        for names in (_EXPERTS, _CHOSEN)
    )
    return count, chosen


def _attention(on: Anatomy, index: int, branch: Branch) -> _Attention | None:
    """What a branch compares, if it is an attention of all tokens with each other."""
    if branch.kind != "attention" or not _attends(on.layer(index), branch):
        return None
    widths = on.stack.layers[index].widths
    width = next((w for w in widths if w.branch == branch.name and w.kind == "heads"), None)
    if width is None:
        heads, groups, size = _of_config(on.config)
        return _Attention(branch.name, "", groups, 2 * size, 2 * heads // groups * size) if groups else None
    value = width.output.block // width.heads
    keys = [s for s in width.slices if s.parameter.endswith("weight") and _KEYS.search(s.module.rpartition(".")[2])]
    key = keys[0].block if keys and len(keys[0].segments) == 1 else value
    return _Attention(branch.name, width.name, width.members, key + value, width.heads * (key + value))


def _attends(layer: nn.Module, branch: Branch) -> bool:
    parts = branch.module.split(".")  # an attention that adds to the stream itself ends in a projection
    paths = [".".join(parts[:n]) for n in range(1, len(parts))]
    modules = [layer.get_submodule(path) for path in paths if _has(layer, path)]
    for path in {branch.module, *(path for path, _ in branch.modules)}:
        modules += list(layer.get_submodule(path).modules()) if _has(layer, path) else []
    names = {type(module).__name__ for module in modules}
    return any(map(_ATTENDS.search, names)) and not any(map(_KEEPS_STATE.search, names))


def _of_config(config: Any) -> tuple[int, int, int]:
    """Query heads, KV groups and the size of a head, as a config says."""
    heads = getattr(config, "num_attention_heads", None) or 0
    groups = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or (getattr(config, "hidden_size", 0) or 0) // max(heads, 1)
    sizes = (heads, groups, size)
    return sizes if all(type(n) is int and n > 0 for n in sizes) and heads % groups == 0 else (0, 0, 0)


def _span(on: Anatomy, index: int) -> int | None:
    """How many tokens a token of this layer sees at most; None for all."""
    window = getattr(on.config, "sliding_window", None)
    types = getattr(on.config, "layer_types", None)
    number = on.layer_name(index).rpartition(".")[2]  # layers that keep their places count the removed ones too
    place = int(number) if number.isdecimal() else index
    if type(window) is not int:
        return None
    if types is not None and (place >= len(types) or types[place] != "sliding_attention"):
        return None
    return window if on.kind == "decoder" else 2 * window + 1


def price(plan: PruningPlan, model: Any, length: int = 1024) -> Price:
    """Return what a plan changes; for many plans of one model, keep a `CostTable`.

    Args:
        plan: the plan.
        model: a model, its `Anatomy`, or its config.
        length: tokens of context for the FLOPs.
    """
    return CostTable(model).price(plan, length)


@dataclass(frozen=True)
class Explanation:
    """Who can load a pruned checkpoint.

    Attributes:
        rung: of the ladder.
        loaders: program -> what it takes.
    """

    rung: Rung
    loaders: Mapping[str, str]

    def __str__(self) -> str:
        head = f"rung {self.rung.name!r}, model_type {self.rung.model_type!r}"
        head += f" ({self.rung.reason})" if self.rung.reason else ""
        return "\n".join([head, *(f"  {program}: {text}" for program, text in self.loaders.items())])


def explain(plan: PruningPlan, model: Any) -> Explanation:
    """Say which rung of the ladder a pruned checkpoint needs, and who can load it.

    Args:
        plan: the plan.
        model: a model, its `Anatomy`, or its config.

    Raises:
        ValueError: if the plan does not fit the model.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(num_hidden_layers=4, hidden_size=8, intermediate_size=16, num_attention_heads=2,
        ...                      vocab_size=16)
        >>> PruningPlan(num_layers=4, model_type="llama", removed_attention=(1,)).explain(config).rung.name
        'hf_cka'
    """
    from hf_cka.modeling.structure import target_of

    anatomy = model if isinstance(model, Anatomy) else find_anatomy(model_of(model))
    plan.validate(anatomy)
    target = target_of(anatomy, plan)
    if target.rung.name != "hf_cka":
        as_what = "as the dense model" if target.rung.name == "stock" else "as any Mistral"
        loaders = {"transformers": as_what, "vLLM": as_what, "llama.cpp": as_what}
    else:
        gone = [name for stack in anatomy.stacks for layer in stack.layers for name in layer.skipped]
        gone += [name for part in plan.by_stack for name in part.removed_branches]
        skips = "attention" in gone or bool(target.structure.get("uncached"))
        loaders = {
            "transformers": "after `import hf_cka`, or with trust_remote_code=True",
            "vLLM": "no: its transformers backend refuses layers without attention"
            if skips
            else "through its transformers backend, with trust_remote_code",
            "llama.cpp": "no",
        }
    return Explanation(target.rung, loaders)
