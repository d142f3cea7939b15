"""Models of which parts were removed: layers, branches of layers, heads, units, experts or channels.

This file needs torch and transformers only, so that it can travel with a checkpoint: transformers runs it with
`trust_remote_code=True` where the hf_cka package is not installed. It makes, for any stock class `XForCausalLM`, the
class `PrunedXForCausalLM`: the stock model is built from its own, untouched config (on the meta device while loading,
so that costs nothing), then the parts that `config.hf_cka` names are taken out. That entry is data and is checked
against the model before anything is done: it chooses among the model's own modules, parameters and sizes.

    {"version": 2,
     "removed": [{"module": "model.layers.3", "kind": "layer", "returns": ["stream", null]}, ...],  (perhaps "cache": 3)
     "narrowed": [{"members": 8, "slices": [["self_attn.q_proj.weight", 0, [[0, 16]]], ...],
                   "attributes": [["self_attn", "num_heads", 1], ...],
                   "inputs": [["self_attn", "position_bias", 1, 1], ...],
                   "kept": {"model.layers.0": "0-2,5", ...}}, ...],
     "uncached": [3]}

A slice is a parameter, an axis, and segments (start, block): member m owns `block` indices from `start + m * block`.
An attribute is a module, the name of a whole number that it has, what one member counts there, and positions where
it is a list. An input is a module, an argument, an axis of it, and how many indices of that axis one member owns.
"""

import contextlib
import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers
from huggingface_hub.dataclasses import strict
from packaging.version import parse
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.utils import output_capturing

MODEL_TYPE = "hf_cka"
PREFIX = "Pruned"
VERSION = 2
_MOST = 10_000_000  # members of one width: more is no width of a model, but would fill the memory


# ---- what stands where a part was removed (no class here may be named *Attention*: transformers reads this source
# to decide whether the attention implementation can be switched) ----


class Removed(nn.Module):
    """Stands where a module was: a layer hands its input on, a branch adds nothing.

    Args:
        kind: "layer" (gives its input) or "branch" (gives zeros of that shape).
        returns: None for a bare tensor, else one entry per element of the tuple that the module returned: "stream"
            for its main output, the name of the argument that it handed through, or None.
        arguments: names of the arguments of the module that was here, in order.
        cache: the layer of a cache of keys and values whose positions it counts on, where the decoder reads their
            number there; the other way is to leave that layer out of the cache (`PrunedConfigMixin`).
    """

    def __init__(
        self, kind: str, returns: Sequence[str | None] | None, arguments: Sequence[str], cache: int | None = None
    ) -> None:
        super().__init__()
        self.kind, self.returns, self.arguments, self.cache = kind, returns, tuple(arguments), cache
        self.was: tuple[nn.Module, ...] = ()

    def __getattr__(self, name: str) -> Any:
        """Answer what the module that was here knew (a kind of mask), with tensors that hold nothing.

        Models read from their layers as they run, and set up buffers of all layers when they are loaded.
        """
        was = self.__dict__.get("was")
        if not was or name.startswith("__") or name in self._modules:
            return super().__getattr__(name)
        return getattr(was[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        stream = main_input(args, kwargs)
        if self.cache is not None:
            self._count(given.values(), stream)
        if self.kind != "layer":
            stream = torch.zeros_like(stream)
        if self.returns is None:
            return stream
        return tuple(stream if name == "stream" else given.get(str(name)) for name in self.returns)

    def _count(self, given: Iterable[Any], stream: torch.Tensor) -> None:
        for cache in given:
            if hasattr(cache, "self_attention_cache"):
                one = stream.new_zeros(stream.shape[0], 1, stream.shape[1], 1)
                cache.self_attention_cache.update(one, one, self.cache)
                return


def main_input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The hidden states among the arguments of a module: the named ones, or the first floating-point tensor."""
    if isinstance(kwargs.get("hidden_states"), torch.Tensor):
        return kwargs["hidden_states"]
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value
    raise TypeError("A removed part was called without hidden states.")


class LayerConfig:
    """The shared config as one module sees it: some values are its own, the rest follows the shared one."""

    def __init__(self, shared: Any, **own: Any) -> None:
        self.__dict__.update(own, _shared=shared)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_shared":
            raise AttributeError(name)
        return getattr(self._shared, name)


class _Selected:
    """Narrows an argument that holds a slice per member (a position bias per head) before a module gets it.

    Where the module hands that argument on, it hands on the whole.
    """

    def __init__(self, argument: str, position: int, axis: int, each: int, members: int, kept: Sequence[int]) -> None:
        self.argument, self.position, self.axis, self.each = argument, position, axis, each
        self.members, self.kept = members, list(kept)
        self.whole: torch.Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(kwargs.get(self.argument), torch.Tensor):
            return args, {**kwargs, self.argument: self._narrow(kwargs[self.argument])}
        if len(args) > self.position and isinstance(args[self.position], torch.Tensor):
            return (*args[: self.position], self._narrow(args[self.position]), *args[self.position + 1 :]), kwargs
        return None

    def restore(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        given = kwargs.get(self.argument, args[self.position] if len(args) > self.position else None)
        if not isinstance(output, tuple) or not isinstance(given, torch.Tensor) or self.whole is None:
            return None
        whole, self.whole = self.whole, None
        return tuple(whole if value is given else value for value in output)

    def _narrow(self, value: torch.Tensor) -> torch.Tensor:
        if value.ndim <= self.axis or value.shape[self.axis] % (self.members * self.each):
            return value
        self.whole = value
        # an axis may hold (batch, member): the members are its inner part
        apart = value.unflatten(self.axis, (-1, self.members, self.each))
        index = torch.tensor(self.kept, device=value.device)
        return apart.index_select(self.axis + 1, index).flatten(self.axis, self.axis + 2)


# ---- the primitives of surgery ----


def numbers(text: str, most: int) -> list[int]:
    """Read ascending numbers below `most` from text like "0-2,5"."""
    found: list[int] = []
    for run in filter(None, str(text).split(",")):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", run)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not (found[-1] if found else -1) < first <= last < most:
            raise ValueError(f"{run!r} in {str(text)[:60]!r} is no ascending range of numbers below {most}.")
        found += range(first, last + 1)
    return found


def as_ranges(indices: Sequence[int]) -> str:
    """Write ascending numbers as text that `numbers` reads: thousands of units would fill a config file otherwise."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def places(segments: Sequence[Sequence[int]], members: Sequence[int]) -> torch.Tensor:
    """Where the given members lie along an axis, ascending within each segment.

    Args:
        segments: (start, block) pairs.
        members: which.
    """
    which = torch.tensor(list(members), dtype=torch.long, device="cpu")
    parts = []
    for start, block in segments:
        parts.append((start + which[:, None] * block + torch.arange(block, device="cpu")[None, :]).reshape(-1))
    return torch.cat(parts)


def left_of(size: int, segments: Sequence[Sequence[int]], members: int, kept: Sequence[int]) -> torch.Tensor:
    """The indices of an axis that stay when only some members do; what belongs to no member stays too."""
    gone = torch.zeros(size, dtype=torch.bool, device="cpu")
    stay = set(kept)
    gone[places(segments, [m for m in range(members) if m not in stay])] = True
    return (~gone).nonzero().flatten()


def take(module: Any, name: str, axis: int, index: torch.Tensor) -> None:
    """Keep the given indices of one axis of a module's parameter or buffer, and say so in what the module knows.

    Args:
        module: changed in place.
        name: of the parameter.
        axis: along which.
        index: what stays, ascending.
    """
    old = getattr(module, name)
    kept = old.detach().index_select(axis, index.to(old.device)).contiguous()
    if isinstance(old, nn.Parameter):
        setattr(module, name, nn.Parameter(kept, requires_grad=old.requires_grad))
    else:
        setattr(module, name, kept)
    if name != "weight":
        return
    for buffer, value in list(module.named_buffers(recurse=False)):  # statistics, or scales of a quantized weight
        if value.shape == old.shape or (axis == 0 and value.shape == old.shape[:1]):
            take(module, buffer, axis, index)
    rows = tuple(kept.shape)
    kind = type(module).__name__
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = rows
    elif kind == "Conv1D":
        module.nx, module.nf = rows
    elif isinstance(module, nn.modules.conv._ConvNd) and not module.transposed:
        if axis == 0 and module.groups == module.out_channels == module.in_channels:  # one filter per channel
            module.groups = module.in_channels = rows[0]
        elif axis == 1:
            module.in_channels = rows[1] * module.groups
        module.out_channels = rows[0]
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = rows[0]
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = rows
    elif isinstance(getattr(module, "normalized_shape", None), tuple):
        module.normalized_shape = rows
    for size in ("out_features", "in_features"):  # a subclass of nn.Module that names its sizes as nn.Linear does
        if not isinstance(module, nn.Linear) and len(rows) == 2 and isinstance(getattr(module, size, None), int):
            setattr(module, size, rows[0 if size == "out_features" else 1])


def plain_experts(model: Any) -> bool:
    """Let experts of odd sizes be computed one by one: the grouped kernels take rows of whole 16 bytes alone.

    Args:
        model: changed in place where some of its experts need it.

    Returns:
        Whether some did.
    """
    # a whole need not know of the experts of its text model
    able = [m for m in model.modules() if getattr(m, "_can_set_experts_implementation", bool)()]
    odd = bool(able) and any(
        p.ndim == 3 and len(p) > 1 and p.is_floating_point() and any(n * p.element_size() % 16 for n in p.shape[1:])
        for m in model.modules()
        if not isinstance(m, nn.modules.conv._ConvNd)
        for p in m.parameters(recurse=False)
    )
    for part_of in able if odd else ():
        part_of.set_experts_implementation("eager")
    return odd


def count_experts(model: Any) -> None:
    """Let the number that the balancing loss of a whole model reads follow its experts, where all layers have as many.

    Args:
        model: changed in place where it has such a number.
    """
    counts = {
        m.num_experts
        for m in model.modules()
        if m is not model and type(getattr(m, "num_experts", None)) is int
        if any(p is not None and p.ndim == 3 for p in m._parameters.values())
    }
    if type(getattr(model, "num_experts", None)) is int and len(counts) == 1:
        (model.num_experts,) = counts


def part(module: Any, path: str) -> Any:
    """`module.a.b.0` by dotted path, or None; "" is the module itself."""
    for name in filter(None, path.split(".")):
        module = getattr(module, name, None)
        if not isinstance(module, nn.Module):
            return None
    return module


def narrow(layer: nn.Module, data: Mapping[str, Any], kept: Sequence[int], cut: Callable[..., None] = take) -> None:
    """Keep some members of one width of a layer.

    Args:
        layer: changed in place.
        data: "members", "slices", "attributes" and "inputs", as above.
        kept: which members stay, ascending.
        cut: narrows one parameter, with whatever is attached to it: `(module, name, axis, index)`.

    Raises:
        ValueError: where the data does not fit the layer; before anything is changed.
    """
    members = data["members"]
    todo: list[tuple[Any, str, int, torch.Tensor]] = []
    for path, axis, segments in data["slices"]:
        parent, _, name = path.rpartition(".")
        module = part(layer, parent)
        inner = getattr(module, "base_layer", module)  # what PEFT put around it
        old = getattr(inner, name, None)
        if not isinstance(old, torch.Tensor) or old.ndim <= axis:
            raise ValueError(f"{type(layer).__name__} has no parameter {path!r} with an axis {axis}.")
        size = old.shape[axis]
        if places(segments, [members - 1]).max() >= size:
            raise ValueError(f"{path!r} has {size} indices along axis {axis}, fewer than {members} members take.")
        # buffers first: those of its size go with a weight, unless they are shorter by then
        place = len(todo) if isinstance(old, nn.Parameter) else 0
        todo.insert(place, (module, name, axis, left_of(size, segments, members, kept)))
    sizes = [_new_size(layer, members, len(kept), *entry) for entry in data["attributes"]]
    # buffers that are named before the rows that buffers without a name follow
    for module, name, axis, index in sorted(todo, key=lambda t: isinstance(getattr(t[0], t[1], None), nn.Parameter)):
        cut(module, name, axis, index)
    for module, name, value in sizes:
        if name.startswith("config."):
            shared = getattr(module.config, "_shared", module.config)
            own = (
                {k: v for k, v in vars(module.config).items() if k != "_shared"} if shared is not module.config else {}
            )
            module.config = LayerConfig(shared, **{**own, name.partition(".")[2]: value})
        else:
            setattr(module, name, value)
    for path, argument, axis, each in data.get("inputs", ()):
        module = part(layer, path)
        names = list(arguments_of(module))
        position = names.index(argument) if argument in names else len(names)
        hook = _Selected(argument, position, axis, each, members, kept)
        module.register_forward_pre_hook(hook, with_kwargs=True)
        module.register_forward_hook(hook.restore, with_kwargs=True)


def _new_size(
    layer: nn.Module, members: int, kept: int, path: str, name: str, each: int, positions: Sequence[int] | None = None
) -> Any:
    """The module, the attribute and its new value, where it is a whole number that the members are part of."""
    module = part(layer, path)
    inside = name.startswith("config.")
    holder, plain = (getattr(module, "config", None), name.partition(".")[2]) if inside else (module, name)
    old = getattr(holder, plain, None) if re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", plain) else None
    values: list[Any] = list(old) if positions is not None and isinstance(old, (list, tuple)) else [old]
    for position in positions if positions is not None else (0,):
        value = values[position] if position < len(values) else None
        if type(value) is not int or type(each) is not int or not 0 < members * each <= value:
            raise ValueError(f"{path}.{name} = {old!r} is no size that counts {members} members.")
        values[position] = value - (members - kept) * each
    if positions is None:
        return module, name, values[0]
    return module, name, tuple(values) if isinstance(old, tuple) else values


def arguments_of(module: nn.Module) -> list[str]:
    """Names of the arguments of a module's forward, in order."""
    import inspect

    return [n for n, p in inspect.signature(type(module).forward).parameters.items() if p.kind < 3][1:]


def replace(
    model: nn.Module, path: str, kind: str, returns: Sequence[str | None] | None, cache: int | None = None
) -> None:
    """Put `Removed` in the place of a module.

    Args:
        model: changed in place.
        path: of the module.
        kind: "layer" or "branch".
        returns: as for `Removed`.
        cache: as for `Removed`.
    """
    old = part(model, path)
    parent, _, name = path.rpartition(".")
    if old is None or not path:
        raise ValueError(f"{type(model).__name__} has no module {path!r}.")
    stub = Removed(kind, returns, arguments_of(old), cache)
    stub.was = (_emptied(old),)
    holder = part(model, parent)
    if name in holder._modules:
        holder._modules[name] = stub
    else:
        setattr(holder, name, stub)


def _emptied(module: nn.Module) -> nn.Module:
    """A copy of a module whose tensors have no storage."""
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    for inside in module.modules():  # the config is shared by all
        if getattr(inside, "config", None) is not None:
            memo[id(inside.config)] = inside.config
    copied = copy.deepcopy(module, memo)
    for inside in list(copied.modules()):  # adapters around it are no part of what it was
        for name, child in list(inside.named_children()):
            if isinstance(getattr(child, "base_layer", None), nn.Module):
                setattr(inside, name, child.base_layer)
    return getattr(copied, "base_layer", copied)


# ---- the config ----


class PrunedConfigMixin:
    """What a stock config needs to describe a model of which parts were removed."""

    model_type = MODEL_TYPE

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self.base_model_type = type(self).stock_class.model_type  # type: ignore[attr-defined]

    @property
    def kv_sharing_modes(self) -> list[str | None]:
        """Tells the KV caches of transformers which layers store nothing ("reuse" makes a dummy cache layer)."""
        return _modes(super(), self)


def _modes(stock: Any, config: Any) -> Any:
    """Of the stock class, with "reuse" where a layer has no attention left."""
    modes = getattr(stock, "kv_sharing_modes", None)
    uncached = set((config.__dict__.get("hf_cka") or {}).get("uncached") or config.__dict__.get("_uncached") or ())
    if not uncached:
        return modes
    modes = modes or [None] * config.num_hidden_layers
    return ["reuse" if i in uncached else mode for i, mode in enumerate(modes)]


def require_caches(uncached: Sequence[int]) -> None:
    """Raise where this transformers would generate wrongly from a decoder whose layers have no attention.

    Its KV caches learned to leave layers out in 5.23; before, they took the length of the text from the first layer
    even where that layer stores nothing. Can go once 5.23 is the oldest version that is supported.

    Args:
        uncached: the layers that store nothing.

    Raises:
        ImportError: naming the installed version and the one that is needed.
    """
    if uncached and parse(transformers.__version__).release < (5, 23):
        raise ImportError(
            f"Decoders with layers without attention need transformers >= 5.23 (installed: {transformers.__version__})"
            ": older KV caches would generate other text, without an error. Run `pip install -U transformers`."
        )


def uncached_text(config: Any, uncached: Sequence[int]) -> None:
    """Tell the config of a text model inside a larger one which of its layers store no keys and values."""
    text = config.get_text_config(decoder=True)
    if text is config or not uncached:
        return
    stock = next(c for c in type(text).__mro__ if not c.__name__.startswith("Uncached"))

    def modes(self: Any) -> Any:
        return _modes(super(stock_or_self, self), self)

    stock_or_self = type("Uncached" + stock.__name__, (stock,), {"__module__": stock.__module__})
    stock_or_self.kv_sharing_modes = property(modes)  # type: ignore[attr-defined]
    text.__class__ = stock_or_self
    text.__dict__["_uncached"] = list(uncached)


def config_class(base_model_type: str) -> Any:
    """Return `PrunedXConfig` for the `model_type` of a stock config, and register its models."""
    stock = transformers.models.auto.configuration_auto.CONFIG_MAPPING[base_model_type]
    name = PREFIX + stock.__name__
    if name not in globals():
        body = {
            "__module__": __name__,
            "__doc__": f"A {stock.__name__} of a model of which parts were removed.",
            "stock_class": stock,
            "_auto_class": "AutoConfig",
        }
        # `strict` collects the validators of a class when it decorates it
        globals()[name] = strict(type(name, (PrunedConfigMixin, stock), body))
        for auto, model in autos_of(stock).items():
            getattr(transformers, auto).register(globals()[name], model_class(model, stock), exist_ok=True)
    return globals()[name]


def autos_of(stock_config: Any) -> dict[str, type]:
    """The auto classes that know a config class, and the stock model class that each makes of it."""
    # the config of a part of a larger model (emu3_text_model) is known by the name of its folder alone
    keys = (stock_config.model_type, stock_config.__module__.split(".")[-2])
    parts = set((getattr(stock_config, "sub_configs", None) or {}).values())
    found: dict[str, type] = {}
    for name, auto in vars(modeling_auto).items():
        if not name.startswith("AutoModel") or getattr(auto, "_model_mapping", None) is None:
            continue
        for key in keys:
            # by name: to ask the mapping for its classes would import every model there is
            named = auto._model_mapping._model_mapping.get(key)
            model = getattr(transformers, named if isinstance(named, str) else named[0], None) if named else None
            known = getattr(model, "config_class", None)
            # some families have a config of their own for the class of another (EXAONE's is Llama's)
            if known is stock_config or (known is not None and key == keys[0] and known not in parts):
                found.setdefault(name, model)  # type: ignore[arg-type]
    return found


def auto_map(base_model_type: str) -> dict[str, str]:
    """Return what `config.json` needs so that `trust_remote_code=True` finds the classes of this file."""
    stock = transformers.models.auto.configuration_auto.CONFIG_MAPPING[base_model_type]
    file = __name__.rpartition(".")[2]
    found = {"AutoConfig": f"{file}.{PREFIX}{stock.__name__}"}
    return found | {auto: f"{file}.{_pruned_name(model, stock)}" for auto, model in autos_of(stock).items()}


# ---- the models ----


@contextlib.contextmanager
def _as_dense(config: Any) -> Iterator[None]:
    """Hide what was removed while the stock code builds everything; parts built from the same config hide it too."""
    hidden = config.__dict__.pop("hf_cka", None)
    try:
        yield
    finally:
        if hidden is not None:
            config.hf_cka = hidden


class PrunedModelMixin:
    """Builds the stock model, then takes out what the config names."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        with _as_dense(config):
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        apply_structure(self, getattr(config, "hf_cka", None) or {})

    @classmethod
    def is_custom_code(cls) -> bool:
        """Stock code that needs its own initialization of buffers, which transformers skips for other code."""
        return False

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Which parameters are one: of those that are left, where layers that shared some were removed."""
        if (left := self.__dict__.get("_tied_left")) is not None:
            return dict(left)
        return super().get_expanded_tied_weights_keys(all_submodels)  # type: ignore[misc]


def apply_structure(model: Any, structure: Mapping[str, Any]) -> None:
    """Take out of a stock model what `config.hf_cka` names.

    Args:
        model: just built, changed in place.
        structure: the entry of the config.

    Raises:
        ValueError: where it does not fit the model, or is of a later version.
    """
    if not structure:
        return
    if structure.get("version") != VERSION:
        raise ValueError(f"hf_cka.version is {structure.get('version')!r}; this file reads version {VERSION}.")
    resolve = _resolver(model)
    require_caches(structure.get("uncached") or ())
    for entry in structure.get("narrowed") or ():
        members = entry["members"]
        if type(members) is not int or not 0 < members <= _MOST:
            raise ValueError(f"hf_cka.narrowed names {members!r} members.")
        for path, kept in entry["kept"].items():
            if (layer := part(model, resolve(path))) is None:
                raise ValueError(f"hf_cka.narrowed: {type(model).__name__} has no module {path!r}.")
            narrow(layer, entry, numbers(kept, members))
    for entry in structure.get("removed") or ():
        cache = entry.get("cache")
        if cache is not None and not (type(cache) is int and 0 <= cache < 10_000):
            raise ValueError(f"hf_cka.removed: cache is {cache!r}; a layer number is needed.")
        replace(model, resolve(entry["module"]), entry["kind"], entry["returns"], cache)
    settle(model, structure)


def settle(model: Any, structure: Mapping[str, Any]) -> None:
    """Let what a whole model knows of its parts follow, once they are gone: caches, experts, tied weights.

    Args:
        model: changed in place.
        structure: the entry of the config.
    """
    uncached_text(model.config, structure.get("uncached") or ())
    count_experts(model)
    plain_experts(model)
    retie(model)


def retie(model: Any) -> None:
    """Let parameters that were tied to one of a part that is gone be tied to the first that is left.

    Args:
        model: of which parts were removed; what its tied weights are called is changed in place.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if {*tied, *tied.values()} <= names:
        return
    groups: dict[str, list[str]] = {}
    for target, source in tied.items():
        groups.setdefault(source, [source]).append(target)
    left = [[name for name in group if name in names] for group in groups.values()]
    model._tied_left = {target: group[0] for group in left for target in group[1:]}
    model.all_tied_weights_keys = dict(model._tied_left)


def _resolver(model: Any) -> Callable[[str], str]:
    """Paths are those of the model that was saved: with its head, or without."""
    prefix = getattr(model, "base_model_prefix", "")

    def resolve(path: str) -> str:
        if part(model, path) is None:
            for other in (path.removeprefix(f"{prefix}."), f"{prefix}.{path}"):
                if part(model, other) is not None:
                    return other
        return path

    return resolve


def model_class(stock: Any, stock_config: Any = None) -> Any:
    """Return `PrunedX` for the stock model class `X`.

    Args:
        stock: the model class.
        stock_config: of its config, where it is another than the class names (`PrunedXOfYConfig`).
    """
    if issubclass(stock, PrunedModelMixin):
        return stock
    stock_config = stock_config or stock.config_class
    name = _pruned_name(stock, stock_config)
    config = config_class(stock_config.model_type)
    if name not in globals():
        known = autos_of(stock_config)
        auto = next((a for a, m in known.items() if m is stock and a != "AutoModel"), "AutoModel")
        body = {
            "__module__": __name__,
            "__doc__": f"A {stock.__name__} of which parts were removed.",
            "stock_class": stock,
            "config_class": config,
            "_auto_class": auto,
        }
        globals()[name] = type(name, (PrunedModelMixin, stock), body)
    return globals()[name]


def _pruned_name(stock: Any, stock_config: Any) -> str:
    own = stock.config_class is stock_config
    return PREFIX + stock.__name__ + ("" if own else f"Of{stock_config.__name__}")


def stock_name(architecture: str) -> str:
    """The stock class among the `architectures` of a config.

    Example:
        >>> stock_name("PrunedLlamaForCausalLMOfExaoneConfig")
        'LlamaForCausalLM'
    """
    return re.sub(rf"^{PREFIX}(.*?)(Of\w+Config)?$", r"\1", architecture)


def become(model: Any, cls: type) -> None:
    """Turn a model into another class of the same layout, as if it had been built as that class.

    transformers notes in `__init__`, by the name of the class, which outputs (`output_hidden_states`) it can record.

    Args:
        model: changed in place.
        cls: the stock class of the model, or the pruned one.
    """
    if type(model) is cls:
        return
    recordable = getattr(model, "_can_record_outputs", None)
    model.__class__ = cls
    dict.__setitem__(output_capturing._CAN_RECORD_REGISTRY, str(cls), recordable)


def __getattr__(name: str) -> Any:
    """Make a class the first time it is asked for by name, as `auto_map` and pickle do."""
    stock = getattr(transformers, stock_name(name), None) if name.startswith(PREFIX) else None
    if not isinstance(stock, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if issubclass(stock, PreTrainedConfig):
        return config_class(stock.model_type)
    other = name.removeprefix(PREFIX + stock.__name__)
    return model_class(stock, getattr(transformers, other.removeprefix("Of")) if other else None)
