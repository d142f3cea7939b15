"""What a pruned model is saved as: which config says it, with which data beside it, and who can load that."""

from __future__ import annotations

import contextlib
import copy
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from hf_cka.anatomy import Anatomy, Stack
from hf_cka.anatomy.model import dense_config, findings_of, twin_of
from hf_cka.anatomy.stacks import removed, tried
from hf_cka.anatomy.twin import distance, one_thread, outputs, quiet
from hf_cka.modeling import modeling_hf_cka as code

if TYPE_CHECKING:
    from hf_cka.modeling.plan import PruningPlan

# Config fields that count leading layers to which something applies; they shrink with those layers.
_LEADING = ("max_window_layers", "first_k_dense_replace")
_DEPTH = re.compile(r"layer|depth|block")
_HEADS = re.compile(r"head|num_kv|kv_n")
_UNITS = re.compile(r"intermediate|ffn|inner|d_ff|dff|hidden_dim|mlp|feed|ff_dim")
# Fields that name experts, or groups, and do not count them.
_NO_EXPERTS = re.compile(r"per_tok|top_?k|shared|zero|capacity|size|dim|(^|_)k$|attention")
# (config class, stack, kept layers) -> the config of the shorter model, or why there is none
_SHORTER: dict[Any, Any] = {}


@dataclass(frozen=True)
class Rung:
    """Who can load a checkpoint, and why it needs no more and no less.

    Attributes:
        name: "stock" (unchanged class), "relabel" (a stock class of another family that computes the same) or
            "hf_cka" (the classes of this package, or the file that travels with the checkpoint).
        model_type: what `config.json` will say.
        reason: why the rung before this one cannot express the structure; empty for "stock".
    """

    name: Literal["stock", "relabel", "hf_cka"]
    model_type: str
    reason: str = ""


@dataclass(frozen=True)
class Target:
    """What a plan makes of a model.

    Attributes:
        config: of the new model, of the stock class or of the pruned one.
        structure: what `config.hf_cka` says of it; empty where the stock class says all.
        shortened: stack -> positions of the modules of its container that stay and are renumbered.
        rung: who will be able to load it.
    """

    config: Any
    structure: Mapping[str, Any] = field(default_factory=dict)
    shortened: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    rung: Rung = Rung("stock", "")


@torch.random.fork_rng(devices=[])  # models are built on the way; whoever trains draws on as if nothing had been
def target_of(anatomy: Anatomy, plan: PruningPlan) -> Target:
    """Return what a plan makes of a model; nothing is changed.

    Args:
        anatomy: of the model.
        plan: that fits it.

    Raises:
        ImportError: if a decoder loses attention and transformers is older than 5.23.
    """
    plan, model = plan.folded(anatomy), anatomy.model
    stock = getattr(type(model), "stock_class", type(model))
    dense = copy.deepcopy(dense_config(model.config))
    base = {s.path: s for s in findings_of(stock, dense, model).stacks}
    old = model.config.__dict__.get("hf_cka") or {}
    gone = {e["module"]: e for e in old.get("removed") or ()}
    kept = _kept_of(old)
    shortened: dict[str, tuple[int, ...]] = {}
    why = ""
    for part in plan.by_stack:
        now = part.seen_in(anatomy)
        stack = base[now.stack.path]
        _merge(now, stack, part, gone, kept)
        if part.removed_layers:
            names = {now.layer_name(i) for i in part.removed_layers}
            stay = tuple(i for i, path in enumerate(_children(model, stack.path)) if path not in names)
            shorter = _shorter(stock, dense, stack, stay, sorted(names), model)
            if isinstance(shorter, str):
                why = why or shorter
                gone |= {
                    n: _entry(n, "layer", layer.returns) for layer in stack.layers for n in [layer.path] if n in names
                }
            else:
                dense, shortened[stack.path] = shorter, stay
    structure = _structure(base, gone, kept, shortened, model)
    code.require_caches(structure.get("uncached") or ())
    return _placed(stock, dense, structure, shortened, why, model)


def rung_for(model: Any, plan: PruningPlan) -> Rung:
    """Say which rung of the ladder a plan will need, before anything is done.

    Args:
        model: a model or its `Anatomy`.
        plan: that fits it.
    """
    from hf_cka.anatomy import find_anatomy

    return target_of(model if isinstance(model, Anatomy) else find_anatomy(model), plan).rung


@torch.random.fork_rng(devices=[])
def rung_of(model: Any) -> Rung:
    """Say which rung of the ladder a model needs as it is.

    Args:
        model: as `apply_plan` leaves it, or any other.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     num_hidden_layers=1, hidden_size=8, intermediate_size=16, num_attention_heads=2, vocab_size=16
        ... )
        >>> rung_of(LlamaForCausalLM(config)).name
        'stock'
    """
    structure = model.config.__dict__.get("hf_cka")
    if not structure:
        return Rung("stock", model.config.model_type)
    stock = getattr(type(model), "stock_class", type(model))
    return _placed(stock, dense_config(model.config), structure, {}, structure.get("why", ""), model).rung


def relabelled_config(model: Any) -> Any:
    """Return the Mistral config that computes the same as a bias-free Llama with any number of heads.

    Args:
        model: on the "relabel" rung.
    """
    from transformers import MistralConfig

    stock = type(model).stock_class
    uniform = _uniform(stock, dense_config(model.config), model.config.hf_cka, model)
    fields = uniform.to_dict()
    for name in (
        "architectures",
        "attention_bias",
        "layer_types",  # transformers reads a mistral config with layer_types as another family
        "mlp_bias",
        "model_type",
        "pretraining_tp",
        "transformers_version",
    ):
        fields.pop(name, None)
    return MistralConfig.from_dict({**fields, "sliding_window": None})


# ---- the structure as data ----


def structure_of(anatomy: Anatomy, plan: PruningPlan) -> dict[str, Any]:
    """What a plan takes out of a model as it is, as data.

    Args:
        anatomy: of the model.
        plan: that fits it.
    """
    removed_now: list[dict[str, Any]] = []
    narrowed: list[dict[str, Any]] = []
    for part in plan.by_stack:
        on = part.seen_in(anatomy)
        removed_now += [_entry(on.layer_name(i), "layer", on.stack.layers[i].returns) for i in part.removed_layers]
        for name, layers in part.removed_branches.items():
            for i in layers:
                branch = on.branch(i, name)
                for module, returns in branch.modules if branch else ():
                    removed_now.append(_entry(f"{on.layer_name(i)}.{module}", "branch", returns))
        for name, table in part.kept.items():
            for i, members in table.items():
                width = on.stack.layers[i].width(name)
                if width is not None:
                    narrowed.append({**width.data(), "kept": {on.layer_name(i): code.as_ranges(members)}})
    return {"version": code.VERSION, "removed": removed_now, "narrowed": narrowed}


def _kept_of(structure: Mapping[str, Any]) -> dict[tuple[str, str], list[int]]:
    """(layer, output parameter) -> members that an earlier plan kept."""
    return {
        (path, entry["slices"][0][0]): code.numbers(text, entry["members"])
        for entry in structure.get("narrowed") or ()
        for path, text in entry["kept"].items()
    }


def _merge(
    now: Anatomy,
    stack: Stack,
    plan: PruningPlan,
    gone: dict[str, dict[str, Any]],
    kept: dict[tuple[str, str], list[int]],
) -> None:
    """Enter what a plan says by current index into what is known by the names of the dense model."""
    dense = {layer.path: layer for layer in stack.layers}
    for name, layers in plan.removed_branches.items():
        for i in layers:
            path = now.layer_name(i)
            branch = dense[path].branch(name)
            assert branch is not None
            for module, returns in branch.modules:
                gone[f"{path}.{module}"] = _entry(f"{path}.{module}", "branch", returns)
            for width in dense[path].widths:  # what is gone has no width any more
                if width.branch == name:
                    kept.pop((path, width.output.parameter), None)
    for name, table in plan.kept.items():
        for i, members in table.items():
            path = now.layer_name(i)
            there = now.stack.layers[i].width(name)
            assert there is not None
            key = path, there.output.parameter
            before = kept.get(key)
            kept[key] = list(members) if before is None else [before[m] for m in members]


def _entry(path: str, kind: str, returns: Any) -> dict[str, Any]:
    return {"module": path, "kind": kind, "returns": None if returns is None else list(returns)}


def _structure(
    base: Mapping[str, Stack],
    gone: Mapping[str, Mapping[str, Any]],
    kept: Mapping[tuple[str, str], Sequence[int]],
    shortened: Mapping[str, Sequence[int]],
    model: Any,
) -> dict[str, Any]:
    """What `config.hf_cka` says, by the names of the (perhaps shortened) stock model."""
    new = _renames(model, shortened)
    entries: dict[str, dict[str, Any]] = {}
    for stack in base.values():
        for layer in stack.layers:
            for width in layer.widths:
                members = kept.get((layer.path, width.output.parameter))
                if members is None or new(layer.path) is None or layer.path in gone or len(members) == width.members:
                    continue
                data = width.data()
                entry = entries.setdefault(repr(data), {**data, "kept": {}})
                entry["kept"][new(layer.path)] = code.as_ranges(members)
    removed_now = [{**e, "module": new(p)} for p, e in gone.items() if new(p) is not None]
    if not entries and not removed_now:
        return {}
    order = {layer.path: i for stack in base.values() for i, layer in enumerate(stack.layers)}
    removed_now.sort(key=lambda e: (order.get(e["module"], -1), e["module"]))
    decoders = [stack for stack in base.values() if stack.causal]
    if getattr(model.config, "is_encoder_decoder", False):  # their caches cannot leave a layer out
        counts = {path: i for stack in decoders for path, i in _counting(stack, gone, shortened, model)}
        removed_now = [e | ({"cache": counts[e["module"]]} if e["module"] in counts else {}) for e in removed_now]
        decoders = []
    uncached = [i for stack in decoders for i in _uncached(stack, gone, shortened, model)]
    found: dict[str, Any] = {"version": code.VERSION, "removed": removed_now, "narrowed": list(entries.values())}
    return found | ({"uncached": uncached} if uncached else {})


def _uncached(
    stack: Stack, gone: Mapping[str, Any], shortened: Mapping[str, Sequence[int]], model: Any
) -> Iterator[int]:
    """Layers of a decoder that store no keys and values any more."""
    new = _renames(model, shortened)
    for layer in stack.layers:
        path = new(layer.path)
        attention = [b for b in layer.branches if b.kind in ("attention", "cross_attention")]
        silent = [b for b in attention if any(f"{layer.path}.{m}" in gone for m, _ in b.modules)]
        if path is not None and (layer.path in gone or (attention and len(silent) == len(attention))):
            yield from _number(path)


def _counting(
    stack: Stack, gone: Mapping[str, Any], shortened: Mapping[str, Sequence[int]], model: Any
) -> Iterator[tuple[str, int]]:
    """Stand-ins in the decoder of an encoder-decoder that count positions where self-attention did, and their layer."""
    new = _renames(model, shortened)
    for layer in stack.layers:
        path = new(layer.path)
        if path is None:
            continue
        attention = [f"{layer.path}.{b.module}" for b in layer.branches if b.kind == "attention"]
        for there in (layer.path, *attention):
            if there in gone:
                yield from ((new(there), number) for number in _number(path))


def _number(path: str) -> Iterator[int]:
    number = path.rpartition(".")[2]
    if number.isdecimal():
        yield int(number)


def _renames(model: Any, shortened: Mapping[str, Sequence[int]]) -> Any:
    """Old dotted names -> new ones, where containers lost modules; None for what is gone."""
    tables = {}
    for container, stay in shortened.items():
        paths = _children(model, container)
        tables[container] = {
            paths[old]: f"{container}.{new}" if container else str(new) for new, old in enumerate(stay)
        }

    def new(path: str) -> str | None:
        for container, table in tables.items():
            if path.startswith(f"{container}."):
                name = path[len(container) + 1 :].partition(".")[0]
                old = f"{container}.{name}"
                return table[old] + path[len(old) :] if old in table else None
        return path

    return new


def _children(model: Any, path: str) -> list[str]:
    return [f"{path}.{n}" if path else n for n, _ in model.get_submodule(path).named_children()]


# ---- can the stock class say it? ----


def _placed(
    stock: Any, dense: Any, structure: Mapping[str, Any], shortened: Mapping[str, tuple[int, ...]], why: str, model: Any
) -> Target:
    """The first rung that can express a structure."""
    if not structure:
        return Target(dense, {}, shortened, Rung("stock", dense.model_type))
    base = dense.model_type
    uniform = None if structure.get("removed") else _uniform(stock, dense, structure, model, shortened)
    if uniform is not None and not (rejected := _rejection(uniform)):
        return Target(uniform, {}, shortened, Rung("stock", base))
    config = pruned_config(dense, structure)
    if uniform is not None:
        reason = f"{type(uniform).__name__} rejects these sizes: {rejected}"
        plain = base == "llama" and not (dense.attention_bias or dense.mlp_bias)
        rung = Rung("relabel", "mistral", reason) if plain else Rung("hf_cka", code.MODEL_TYPE, reason)
        return Target(config, structure, shortened, rung)
    return Target(config, structure, shortened, Rung("hf_cka", code.MODEL_TYPE, why or _reason(structure, dense)))


def pruned_config(dense: Any, structure: Mapping[str, Any]) -> Any:
    """Return the config of the pruned class: the stock one, and the structure as data.

    Args:
        dense: a stock config; not changed.
        structure: see `modeling_hf_cka.py`.
    """
    config = copy.deepcopy(dense)
    config.__class__ = code.config_class(dense.model_type)
    config.__dict__.pop("model_type", None)  # some configs hold a copy of what their class says
    config.base_model_type = dense.model_type
    config.auto_map = code.auto_map(dense.model_type)
    config.hf_cka = dict(structure)
    return config


def _reason(structure: Mapping[str, Any], dense: Any) -> str:
    branches = {e["module"] for e in structure.get("removed") or () if e["kind"] == "branch"}
    if branches:
        layers = {re.sub(r"(\.\d+\.).*", r"\1", m) for m in branches}
        return f"{len(layers)} layers have no attention or no MLP, and stock layers always have both"
    if structure.get("removed"):
        return "its layers compute with their own index, or others count them, so they keep their places"
    counts = {len(code.numbers(t, e["members"])) for e in structure["narrowed"] for t in e["kept"].values()}
    if len(structure["narrowed"]) > 0 and len(counts) > len(structure["narrowed"]):
        return "the layers have different widths, and a stock config knows one width for all layers"
    return f"{type(dense).__name__} has no fields that say these widths"


def _rejection(config: Any) -> str:
    """Why the config class does not accept its own values, or ""."""
    try:
        type(config).from_dict(config.to_dict()).validate()
    except Exception as error:  # strict validators raise their own types
        return str(error).strip().splitlines()[-1].strip()
    return ""


def _on_meta(stock: Any, config: Any) -> Any:
    with quiet(), torch.device("meta"):
        return stock._from_config(copy.deepcopy(config))


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {n: tuple(p.shape) for n, p in model.named_parameters()}


def _shorter(stock: Any, dense: Any, stack: Stack, stay: tuple[int, ...], names: Sequence[str], model: Any) -> Any:
    """The config of the stock class with fewer layers, where that computes the same; else why there is none."""
    key = (stock, repr(sorted(dense.to_dict().items(), key=lambda i: i[0])), stack.path, stay)
    if key not in _SHORTER:
        _SHORTER[key] = _find_shorter(stock, dense, stack, stay, names, model)
        while len(_SHORTER) > 512:
            _SHORTER.pop(next(iter(_SHORTER)))
    found = _SHORTER[key]
    return found if isinstance(found, str) else copy.deepcopy(found)


@one_thread()
def _find_shorter(stock: Any, dense: Any, stack: Stack, stay: tuple[int, ...], names: Sequence[str], model: Any) -> Any:
    general = "its layers compute with their own index, or others count them, so they keep their places"
    try:
        reference = _on_meta(stock, dense)
    except Exception as error:
        return f"{stock.__name__} cannot be built from its config alone ({type(error).__name__})"
    new = _renames(reference, {stack.path: stay})
    expected = {new(n): s for n, s in _shapes(reference).items() if new(n) is not None}
    count = len(_children(reference, stack.path))
    for edit in _depth_edits(dense, count, stay, stack.path):
        config = edit(copy.deepcopy(dense))
        with contextlib.suppress(Exception):
            if _shapes(_on_meta(stock, config)) == expected and not _rejection(config):
                return config if _same_on_twin(stock, dense, stack, stay, names, edit) else general
    return f"no field of {type(dense).__name__} builds {stock.__name__} with just these layers"


def configs_of(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, config) of a config and of all that it holds; the path of its own is "".

    Args:
        config: of a model.
        path: of the config itself.
    """
    yield path, config
    for key, value in vars(config).items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from configs_of(value, f"{path}.{key}" if path else key)


def _at(config: Any, path: str) -> Any:
    for name in filter(None, path.split(".")):
        config = getattr(config, name)
    return config


def _depth_edits(dense: Any, count: int, stay: tuple[int, ...], stack: str) -> Iterator[Any]:
    """Ways to say in a config that only some layers are left, the likeliest first."""
    fields = []
    for path, config in configs_of(dense):
        for name, value in vars(config).items():
            if type(value) is int and value == count and _DEPTH.search(name) and name not in _LEADING:
                near = sum(word in name or word in path for word in re.split(r"[._]", stack) if len(word) > 3)
                fields.append((-near, path, name))
    fields.sort(key=lambda f: f[0])
    for some in (*((f,) for f in fields), *itertools.combinations(fields, 2)):
        for lists in (True, False):
            yield _edit([(path, name) for _, path, name in some], count, stay, lists)


def _edit(fields: Sequence[tuple[str, str]], count: int, stay: tuple[int, ...], lists: bool) -> Any:
    def edit(config: Any) -> Any:
        for path in dict.fromkeys(path for path, _ in fields):
            own = _at(config, path)
            for name, value in list(vars(own).items()):
                if lists and isinstance(value, (list, tuple)) and len(value) == count and not name.startswith("_"):
                    setattr(own, name, type(value)(value[i] for i in stay))
                elif name in _LEADING and type(value) is int:
                    setattr(own, name, sum(i < value for i in stay))
                elif name == "_heterogeneity_spec" or name == "per_layer_config":
                    _cut_per_layer(own, stay)
        for path, name in fields:
            setattr(_at(config, path), name, len(stay))
        return config

    return edit


def _cut_per_layer(config: Any, stay: tuple[int, ...]) -> None:
    table = config.to_dict().get("per_layer_config") or {}
    by_index = {int(k): v for k, v in table.items() if str(k).isdecimal()}
    config.per_layer_config = {new: by_index[old] for new, old in enumerate(stay) if old in by_index} or None


def _same_on_twin(stock: Any, dense: Any, stack: Stack, stay: tuple[int, ...], names: Sequence[str], edit: Any) -> bool:
    """Whether the stock class, built with fewer layers, computes what the twin does without them."""
    twin = twin_of(stock, dense)
    if twin is None or _unseen_matters(stock, dense, stack):
        return False
    layers = {layer.path: layer for layer in stack.layers}
    with removed(twin.model, [(n, "layer", layers[n].returns) for n in names]):
        expected = tried(twin)
    try:
        config = edit(copy.deepcopy(twin.model.config))
        with quiet():
            shorter = stock._from_config(config, dtype=twin.dense[0].dtype)
        new = _renames(twin.model, {stack.path: stay})
        weights = {new(n): t for n, t in twin.model.state_dict().items() if new(n) is not None}
        shorter.load_state_dict(weights, strict=True)
        shorter = shorter.to(next(p.dtype for p in twin.model.parameters() if p.is_floating_point())).eval()
        made = outputs(shorter, twin.batch)
    except Exception:
        return False
    return expected is not None and distance(expected, made) <= 1e3 * twin.tolerance


def _unseen_matters(stock: Any, dense: Any, stack: Stack) -> bool:
    """Whether a part of the model that no input reached may count the layers of a stack."""
    unseen = findings_of(stock, dense).unseen
    return any(not stack.path.startswith(f"{name}.") for name in unseen)


def _uniform(
    stock: Any, dense: Any, structure: Mapping[str, Any], model: Any, shortened: Mapping[str, Sequence[int]] = {}
) -> Any:
    """The stock config whose fields say the widths, where all layers have the same; else None."""
    try:
        built = _on_meta(stock, dense)
        code.apply_structure(built, {**structure, "uncached": []})
        expected = _shapes(built)
    except Exception:
        return None
    found = []
    for entry in structure["narrowed"]:
        counts = {len(code.numbers(text, entry["members"])) for text in entry["kept"].values()}
        if len(counts) != 1:
            return None
        found.append((entry, counts.pop()))
    ways = [_ways(dense, entry, count) for entry, count in found]
    for chosen in itertools.product(*ways):
        config = copy.deepcopy(dense)
        for way, (entry, count) in zip(chosen, found, strict=True):
            way(config, entry, count)
        with contextlib.suppress(Exception):
            same = _on_meta(stock, config)
            if _shapes(same) != expected or code.plain_experts(same):
                continue
            experts = [(e, n) for way, (e, n) in zip(chosen, found, strict=True) if way is _with_experts]
            if not experts or _same_experts(stock, dense, experts):
                return config
    return None


def _ways(dense: Any, entry: Mapping[str, Any], count: int) -> list[Any]:
    """Ways to say a width in a config, the likeliest first."""
    plain = [_with_heads] if _block(entry) > 1 else [_with_units, _with_units_of_one_tower]
    before = copy.deepcopy(dense)
    _with_experts(before, entry, count)
    return plain if before.to_dict() == dense.to_dict() else [_with_experts, *plain]


def _block(entry: Mapping[str, Any]) -> int:
    return sum(b for _, b in entry["slices"][0][2])


def _with_experts(config: Any, entry: Mapping[str, Any], count: int) -> None:
    """Fields that count experts, and groups of them where whole groups go."""
    members, block = entry["members"], _block(entry)
    for _, own in configs_of(config):
        for name, value in list(vars(own).items()):
            if type(value) is not int or name.startswith("_") or _NO_EXPERTS.search(name):
                continue
            if "expert" in name and value == members * block:
                setattr(own, name, count * block)
            elif block > 1 and "group" in name and value == members:
                setattr(own, name, count)


def _same_experts(stock: Any, dense: Any, entries: Sequence[tuple[Mapping[str, Any], int]]) -> bool:
    """Whether the stock class, built with fewer experts, computes what the twin does once they are cut out."""
    key = (stock, repr(sorted(dense.to_dict().items(), key=lambda i: i[0])), repr(entries))
    if key not in _SHORTER:
        _SHORTER[key] = _try_experts(stock, dense, entries)
    return _SHORTER[key]


def _try_experts(stock: Any, dense: Any, entries: Sequence[tuple[Mapping[str, Any], int]]) -> bool:
    twin = twin_of(stock, dense)
    if twin is None:
        return False
    try:
        narrowed, config = copy.deepcopy(twin.model), copy.deepcopy(twin.model.config)
        for entry, count in entries:
            for path, text in entry["kept"].items():
                code.narrow(code.part(narrowed, path), entry, code.numbers(text, entry["members"]))
            _with_experts(config, entry, count)
        with quiet():
            fewer = stock._from_config(config, dtype=torch.float32)
        fewer.load_state_dict(narrowed.state_dict(), strict=True)
        fewer = fewer.to(next(p.dtype for p in twin.model.parameters() if p.is_floating_point())).eval()
        return distance(outputs(narrowed, twin.batch), outputs(fewer, twin.batch)) <= 1e3 * twin.tolerance
    except Exception:
        return False


def _with_heads(config: Any, entry: Mapping[str, Any], count: int) -> None:
    """Fields that count heads or groups of heads, and the width of a head, which would follow them."""
    members, block = entry["members"], _block(entry)
    for path, own in configs_of(config):
        heads = [n for n, v in vars(own).items() if type(v) is int and v and v % members == 0 and _HEADS.search(n)]
        counted = {n: getattr(own, n) for n in heads if "dim" not in n and "size" not in n}
        if not counted or (path and not any(v in (members,) for v in counted.values())):
            continue
        most = max(counted.values())
        with contextlib.suppress(AttributeError):  # also where the field is no part of the class: modules ask for it
            own.head_dim = block * members // most
        for name, value in counted.items():
            setattr(own, name, value // members * count)


def _with_units(config: Any, entry: Mapping[str, Any], count: int, prefix: str = "") -> None:
    members = entry["members"]
    for _, own in configs_of(config):
        for name, value in list(vars(own).items()):
            if not name.startswith(prefix or name) or name.startswith("_") or not _UNITS.search(name):
                continue
            if value == members or (value is None and name == "n_inner"):
                setattr(own, name, count)


def _with_units_of_one_tower(config: Any, entry: Mapping[str, Any], count: int) -> None:
    """Encoder-decoders have a field for each side (`decoder_ffn_dim`)."""
    for tower in ("encoder", "decoder"):
        if all(tower in path.split(".") for path in entry["kept"]):
            _with_units(config, entry, count, f"{tower}_")
