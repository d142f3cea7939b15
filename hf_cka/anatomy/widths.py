"""Find the widths of a layer with dead gradients: set a slice of one parameter to zero, run backward, and what became
exactly zero elsewhere goes with it. Read from an output projection that gives units, heads, KV groups and channels."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from hf_cka.anatomy.branches import Bench, Gradients
from hf_cka.anatomy.parts import Branch, Segment, Slice, Width
from hf_cka.anatomy.stacks import running_as
from hf_cka.anatomy.twin import distance
from hf_cka.modeling import modeling_hf_cka as code

# (parameter, axis) -> indices
Indices = dict[tuple[str, int], list[int]]
_NORM = re.compile(r"norm|GRN", re.IGNORECASE)
# Names that a size which follows the members has in the configs and modules of transformers.
_SIZE = re.compile(r"head|kv|key_value|group|inner|inter|expert|channel|ffn|mlp|size|dim|split|nheads|width|features")
_NO_SIZE = re.compile(
    r"layer_id|idx|index|window|kernel|stride|padding|max_|vocab|position|token|top_k|dilation|chunk|state"
)
# Sizes that follow by their name alone, where this way of computing does not read them.
_COUNT = re.compile(
    r"(num_|n_)?(attention_|kv_|key_value_|query_)?(heads?|nheads)|all_head_size|inner_dim|intermediate_size|ffn_dim|split_size|lru_width"
)
# How many sizes a module may keep of one width, and how many are looked at.
_SIZES, _LOOKED_AT = 4, 14
# Combinations of them that are tried.
_ATTEMPTS = 900
# (module, attribute, what one member counts there, positions)
Size = tuple[str, str, int, tuple[int, ...] | None]


def find_widths(bench: Bench, branches: Sequence[Branch], single: bool, config: Any) -> list[Width]:
    """Return the widths of a layer, in the order of its branches.

    Args:
        bench: the layer.
        branches: of it.
        single: it has but one branch, which is all of it.
        config: of the layers, for the number of query heads.
    """
    with straight_through(bench.layer), _Leaky():
        base = _gradients(bench)
        found: list[Width] = []
        stream = code.main_input(bench.args, bench.kwargs)
        alone = stream.ndim == 3 and 1 in stream.shape[:2]  # of one position, attention shows nothing of its heads
        for branch in branches:
            if alone and not single and branch.name.startswith(("attention", "cross")):
                continue
            # only what is in the branch: elsewhere an activation may happen to die when its input changes
            inner = {n: base[n] for n in branch.parameters}
            own = [
                w for n in branch.parameters for axis in _axes(bench.layer, n) if (w := _width(bench, inner, n, axis))
            ]
            # the widest first: what lies inside another's heads (a low rank) is no width of its own
            order = {n: i for i, n in enumerate(bench.parameters)}
            own.sort(key=lambda w: (-_covers(bench, w), -order[w.output.parameter]))
            kept: list[Width] = []
            for width in own:
                inside = any(
                    width.output.parameter in {s.parameter for s in w.slices}
                    for w in kept
                    if w.output.block > 1 or w.outputs
                )
                twice = any(width.output.parameter == w.output.parameter for w in kept)
                if not inside and not twice:
                    width = _with_readers(bench, inner, width, branch.parameters)
                    kept.append(replace(width, branch=branch.name))
            found += kept
    return _with_kinds(bench, found, single, config)


def _gradients(bench: Bench) -> Gradients:
    """Gradients without what is rounding alone (of a key's bias, which softmax ignores)."""
    gradients = bench.gradients()
    largest = max((float(g.abs().max()) for g in gradients.values() if g.numel()), default=0.0)
    least = {torch.float64: 1e-12, torch.float32: 3e-7}
    return {n: g.masked_fill(g.abs() < least.get(g.dtype, 0.0) * largest, 0) for n, g in gradients.items()}


def _axes(layer: nn.Module, name: str) -> Iterator[int]:
    """Along which axes a parameter may take members in: the inputs of what it multiplies."""
    path, _, attribute = name.rpartition(".")
    module = layer.get_submodule(path)
    parameter = getattr(module, attribute)
    if parameter.ndim < 2 or isinstance(module, nn.Embedding):
        return
    if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        yield 1
    elif type(module).__name__ == "Conv1D":
        yield 0
    elif parameter.ndim == 3:  # experts, one behind the other
        yield from (1, 2)
    elif "Linear" in type(module).__name__:
        yield 1


def _width(bench: Bench, base: Gradients, name: str, axis: int) -> Width | None:
    """The members that a parameter takes in along an axis, and what each holds of the others."""
    size = bench.parameters[name].shape[axis]
    if size < 2:
        return None
    best, block, member, first = 0.0, 0, 0, Indices()
    for d in (d for d in range(1, size // 2 + 1) if size % d == 0):
        if d > 1 and not first and d * 64 < size:
            continue
        for m in (0, size // d - 1):  # one of them may happen to be silent from the start
            dead = _dead_without(bench, base, name, axis, range(m * d, (m + 1) * d))
            if not any(bench.parameters[n].ndim >= 2 for n, _ in dead):
                continue
            share = sum(map(len, dead.values())) / d
            if share > best * (1 + 1e-6):
                best, block, member, first = share, d, m, dead
    if not block:
        return None
    members = size // block
    slices = [Slice(name, axis, ((0, block),))]
    for (other, other_axis), indices in first.items():
        segments = tuple((start - member * length, length) for start, length in _runs(indices))
        high = max(start + members * length for start, length in segments)
        if min(segments)[0] < 0 or high > bench.parameters[other].shape[other_axis]:
            return None
        slices.append(Slice(other, other_axis, segments))
    slices = list(_with_biases(bench, slices))
    for member in {0, 1, members - 1}:
        dead = _dead_without(bench, base, name, axis, range(member * block, (member + 1) * block))
        for s in slices[1:]:
            expected, seen = set(s.indices([member])), set(dead.get((s.parameter, s.axis), ()))
            if not seen <= expected or not expected - seen <= _silent(base[s.parameter], s.axis):
                return None
    return Width("", "", members, tuple(slices), slices[0])


def _with_biases(bench: Bench, slices: Sequence[Slice]) -> tuple[Slice, ...]:
    """Give the bias of every row that goes the row's own place: its gradient may say nothing, or part of it."""
    found = {(s.parameter, s.axis): s for s in slices}
    for s in slices[1:]:
        path, _, attribute = s.parameter.rpartition(".")
        bias = f"{path}.bias" if path else "bias"
        module = bench.layer.get_submodule(path)
        rows = {True: 0}.get(
            isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)), 1 if type(module).__name__ == "Conv1D" else -1
        )
        if attribute == "weight" and s.axis == rows and bias in bench.parameters:
            found[bias, 0] = Slice(bias, 0, s.segments)
    return tuple(found.values())


def _with_readers(bench: Bench, base: Gradients, width: Width, names: Sequence[str]) -> Width:
    """Add what else reads the members inside the branch, where leaving that out as well frees more of it.

    A channel of a state-space mixer reaches the stream by the output projection, and its own time step by another.
    """
    gone = width.output.indices([0])
    alone = _dead_without(bench, base, width.output.parameter, width.output.axis, gone)
    for name in names:
        for axis in _axes(bench.layer, name):
            parameter = bench.parameters[name]
            each, rest = divmod(parameter.shape[axis], width.members)
            if name == width.output.parameter or rest or not each:
                continue
            with zeroed(parameter, axis, range(each)):
                dead = _dead_without(bench, base, width.output.parameter, width.output.axis, gone)
            dead.pop((name, axis), None)
            other = _dead_without(bench, base, name, axis, range(each))
            apart = {(*k, i) for some in (alone, other) for k, indices in some.items() for i in indices}
            if {(*k, i) for k, indices in dead.items() for i in indices} <= apart:
                continue
            both = Slice(name, axis, ((0, each),))
            others = [Slice(n, a, _runs(indices)) for (n, a), indices in dead.items() if (n, a) != (name, axis)]
            slices = (width.output, both, *others)
            return replace(width, slices=_with_biases(bench, slices), outputs=(both,))
    return width


def _runs(indices: Sequence[int]) -> tuple[Segment, ...]:
    runs: list[list[int]] = []
    for i in indices:
        if runs and i == runs[-1][0] + runs[-1][1]:
            runs[-1][1] += 1
        else:
            runs.append([i, 1])
    return tuple((start, length) for start, length in runs)


def _silent(gradient: torch.Tensor, axis: int) -> set[int]:
    other = [a for a in range(gradient.ndim) if a != axis]
    return set(((gradient.abs().amax(other) if other else gradient.abs()) == 0).nonzero().flatten().tolist())


def _dead_without(bench: Bench, base: Gradients, name: str, axis: int, indices: Sequence[int]) -> Indices:
    """Slices of other parameters whose gradient vanishes when part of one parameter is zero."""
    with zeroed(bench.parameters[name], axis, indices):
        now = _gradients(bench)
    dead: Indices = {}
    for other, gradient in now.items():
        if other == name or other not in base:
            continue
        for a in range(gradient.ndim):
            size = gradient.shape[a]
            silent = _silent(gradient, a) if size > 1 else set()
            new = sorted(silent - _silent(base[other], a)) if silent else []
            if new and len(silent) < size:
                dead[other, a] = new
    return dead


@contextmanager
def zeroed(parameter: torch.Tensor, axis: int, indices: Sequence[int]) -> Iterator[None]:
    """Set part of a parameter to zero for a while."""
    index = torch.tensor(list(indices))
    before = parameter.data.index_select(axis, index)
    try:
        parameter.data.index_fill_(axis, index, 0)
        yield
    finally:
        parameter.data.index_copy_(axis, index, before)


class _Leaky(TorchFunctionMode):
    """Lets a little through where ReLU lets nothing: what is silent for its input's sake is not what is looked for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("relu", "relu_", "relu6", "hardtanh", "hardtanh_"):
            return torch.nn.functional.leaky_relu(args[0], 0.1)
        return func(*args, **(kwargs or {}))


@contextmanager
def straight_through(layer: nn.Module, scale: bool = False) -> Iterator[None]:
    """Let gradients pass norms element by element: their statistics couple what can go one by one.

    Args:
        layer: whose norms.
        scale: leave the statistics out of the values as well, so that a norm only multiplies.
    """
    norms = [m for m in layer.modules() if _NORM.search(type(m).__name__) and next(m.children(), None) is None]
    with ExitStack() as stack:
        for norm in norms:
            stack.enter_context(_through(norm, scale))
        yield


def _through(norm: Any, scale: bool) -> AbstractContextManager[None]:
    forward = norm.forward

    def through(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        def let(value: Any) -> Any:
            return value.detach() if isinstance(value, torch.Tensor) else value

        out = forward(hidden.detach(), *map(let, args), **{k: let(v) for k, v in kwargs.items()})
        if not isinstance(out, torch.Tensor) or (not scale and out.shape != hidden.shape):
            return forward(hidden, *args, **kwargs)  # a norm of several tensors at once, or of another shape
        if scale:
            weight = getattr(norm, "weight", None)
            shape = [-1] + [1] * (hidden.ndim - 2) if isinstance(norm, nn.modules.batchnorm._NormBase) else [-1]
            value = hidden if weight is None else hidden * (weight.view(shape) if weight.ndim == 1 else weight)
            gate = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)), None)
            return value if gate is None or gate.shape != value.shape else value * torch.nn.functional.silu(gate)
        given = (v for v in (hidden, *args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.shape == out.shape)
        return out + sum(v - v.detach() for v in given)

    return running_as(norm, through)


def _covers(bench: Bench, width: Width) -> int:
    """Parameters that all members hold together."""
    total = 0
    for s in width.slices:
        parameter = bench.parameters[s.parameter]
        total += width.members * s.block * (parameter.numel() // parameter.shape[s.axis])
    return total


def _with_kinds(bench: Bench, widths: Sequence[Width], single: bool, config: Any) -> list[Width]:
    """Heads are what mixes tokens and what has several indices each; the rest are units. The widest first."""
    found = []
    for w in widths:
        mixes = w.branch.startswith(("attention", "cross_attention"))
        kind = "heads" if w.output.block > 1 or (mixes and not single) else "units"
        found.append(replace(w, name=kind, heads=_query_heads(w, config) if kind == "heads" else 1))
    return sorted(found, key=lambda w: (w.branch.startswith("cross"), -_covers(bench, w)))


def named(widths: Sequence[Width], branches: Sequence[Branch]) -> tuple[Width, ...]:
    """Give every width a name of its own: the first of a kind that can be narrowed has the plain one.

    Args:
        widths: of one layer, the widest first.
        branches: of that layer, for the order.
    """
    done: list[Width] = []
    for kind in ("heads", "units", "experts"):
        own = sorted((w for w in widths if w.kind == kind), key=lambda w: bool(w.reason))
        for i, w in enumerate(own):
            done.append(w if i == 0 else replace(w, name=f"{kind}:{w.output.module or w.output.parameter}"))
    order = {b.name: i for i, b in enumerate(branches)}
    return tuple(sorted(done, key=lambda w: order.get(w.branch, 0)))


def _query_heads(width: Width, config: Any) -> int:
    """Query heads that one member (a KV group) holds."""
    smallest = min((b for s in width.slices for _, b in s.segments if s.parameter.endswith("weight")), default=1)
    for name in ("num_attention_heads", "num_heads", "n_head", "n_heads"):
        heads = getattr(config, name, None)
        if type(heads) is int and heads > width.members and heads % width.members == 0:
            each = heads // width.members
            return each if width.output.block == each * smallest else 1
    return 1


# ---- what else must follow ----


def completed(bench: Bench, width: Width, tolerance: float) -> Width:
    """Find by trial which sizes of modules, and which tensors, follow a width; say why where nothing does.

    Args:
        bench: the layer.
        width: as found.
        tolerance: how far equal outputs may differ.
    """
    if width.members < 2:
        return replace(width, reason="it has one member, which must stay")
    kept = list(range(width.members - 1))
    sizes, likely = _sizes(bench, width)
    for scale in (False, True):
        with straight_through(bench.layer, scale) if scale else ExitStack():
            want = _without(bench, width, kept)
        for chosen, inputs in itertools.islice(_attempts(sizes, likely, _per_member(bench, width)), _ATTEMPTS):
            attempt = replace(width, attributes=chosen, inputs=inputs, exact=not scale)
            if _fits(bench, attempt, kept, want, tolerance, scale):
                return _extended(bench, attempt, sizes, kept, want, tolerance, scale)
    return replace(width, reason="narrowing its parameters does not equal leaving its members out")


def _attempts(
    sizes: Sequence[Size], likely: Sequence[Size], tensors: Sequence[tuple[str, str, int, int]]
) -> Iterator[Any]:
    """What may follow, the fewest first; before many are combined, all likely ones together with a few others."""
    for count in range(3):
        for inputs in [(), *((t,) for t in tensors)]:
            for chosen in _combinations(sizes if not inputs else sizes[:8], count):
                yield chosen, inputs
    others = [s for s in sizes if s not in likely]
    for count in range(3):
        for more in _combinations(others, count):
            yield (*likely, *more), ()
    for inputs in [(), *((t,) for t in tensors)]:
        for count in range(3, _SIZES + 1):
            for chosen in _combinations(sizes if not inputs else sizes[:8], count):
                yield chosen, inputs


def _combinations(sizes: Sequence[Size], count: int) -> Iterator[tuple[Size, ...]]:
    """So many of the sizes, each attribute once."""
    for chosen in itertools.combinations(sizes, count):
        if len({(path, name, at) for path, name, _, at in chosen}) == count:
            yield chosen


def _without(bench: Bench, width: Width, kept: Sequence[int]) -> list[torch.Tensor]:
    gone = [m for m in range(width.members) if m not in set(kept)]
    with left_out(bench.parameters, width, gone), torch.no_grad():
        return bench.run()


@contextmanager
def left_out(parameters: Mapping[str, torch.Tensor], width: Width, gone: Sequence[int]) -> Iterator[None]:
    """Set to zero, for a while, all through which some members reach anything."""
    with ExitStack() as stack:
        for s in (width.output, *width.outputs):
            stack.enter_context(zeroed(parameters[s.parameter], s.axis, s.indices(gone)))
        yield


def _fits(
    bench: Bench, width: Width, kept: Sequence[int], want: list[torch.Tensor], tolerance: float, scale: bool
) -> bool:
    layer = copy.deepcopy(bench.layer)
    try:
        code.narrow(layer, width.data(), kept)
        twin = copy.copy(bench)
        twin.layer = layer
        with torch.no_grad():
            if scale and not all(t.isfinite().all() for t in twin.run()):  # its own norms must be able to run as well
                return False
            with straight_through(layer, True) if scale else ExitStack():
                return distance(want[:1], twin.run()[:1]) <= tolerance
    except Exception:
        return False


def _extended(
    bench: Bench,
    width: Width,
    sizes: Sequence[Size],
    kept: Sequence[int],
    want: list[torch.Tensor],
    tolerance: float,
    scale: bool,
) -> Width:
    """Let further sizes follow that this way of computing does not read, and another one may."""
    plain = {width.members, width.members * width.heads, width.members * width.output.block}
    for entry in sizes:
        path, name, each, positions = entry
        if entry in width.attributes or positions is not None or not _COUNT.fullmatch(name):
            continue
        value = getattr(code.part(bench.layer, path), name)
        if value in plain and value == each * width.members:
            attempt = replace(width, attributes=(*width.attributes, entry))
            if _fits(bench, attempt, kept, want, tolerance, scale):
                width = attempt
    return width


def _sizes(bench: Bench, width: Width) -> tuple[list[Size], list[Size]]:
    """Whole numbers of the modules around a width's parameters that may follow it, the likeliest first; the likely."""
    members = width.members
    plain = (members, members * width.heads, members * width.output.block)
    blocks = sorted({s.block for s in width.slices} | {b for s in width.slices for _, b in s.segments})
    owners = {"": None}
    for s in width.slices:
        path = s.module
        while path:
            owners[path] = None
            path = path.rpartition(".")[0]
    found: list[tuple[int, Size]] = []

    def shares(value: Any) -> list[tuple[int, int]]:
        """(rank, what one member counts) in a number that may follow."""
        if type(value) is not int or value < 2:
            return []
        whole = [(plain.index(value) if value in plain else 3, value // members)] if value % members == 0 else []
        return whole + [(8, b) for b in blocks if value > members * b]

    for path in sorted(owners, key=lambda p: -p.count(".") - bool(p)):
        module = code.part(bench.layer, path)
        known = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.Embedding))
        if known or type(module).__name__ == "Conv1D":
            continue
        for name, value in vars(module).items():
            if name.startswith("_") or _NO_SIZE.search(name) or name in ("normalized_shape", "head_dim"):
                continue
            unlikely = 0 if _SIZE.search(name) and name not in ("hidden_size", "embed_dim", "d_model") else 4
            found += [(rank + unlikely, (path, name, each, None)) for rank, each in shares(value)]
            if isinstance(value, (list, tuple)) and value and all(type(v) is int for v in value):
                for each in {v // members for v in value if v % members == 0 and v}:
                    at = tuple(i for i, v in enumerate(value) if v == each * members)
                    found.append((2, (path, name, each, at)))
                    found += [(6, (path, name, each, (i,))) for i in at if len(at) > 1]
        config = getattr(module, "config", None)
        for name, value in sorted(getattr(config, "__dict__", {}).items()) if path else ():
            if type(value) is int and value in plain and _SIZE.search(name) and not _NO_SIZE.search(name) and value > 1:
                found.append((5 + plain.index(value), (path, f"config.{name}", value // members, None)))
    found.sort(key=lambda item: item[0])
    likely = {entry[:2]: entry for rank, entry in reversed(found) if rank < 3}
    return [entry for _, entry in found[:_LOOKED_AT]], list(likely.values())


def _per_member(bench: Bench, width: Width) -> list[tuple[str, str, int, int]]:
    """Tensors handed to the modules around a width that may hold a slice per member (a bias per head)."""
    stream = code.main_input(bench.args, bench.kwargs)
    found: list[tuple[str, str, int, int]] = []
    holders = {s.module.rpartition(".")[0] for s in width.slices} | {s.module for s in width.slices}
    for call in bench.calls():
        if call.path not in holders or not call.path:
            continue
        names = code.arguments_of(bench.layer.get_submodule(call.path))
        for name, value in {**dict(zip(names, call.args, strict=False)), **call.kwargs}.items():
            if not isinstance(value, torch.Tensor) or value.shape == stream.shape or not value.is_floating_point():
                continue
            for axis in range(value.ndim - 1):
                for each in {1, width.heads}:
                    if value.shape[axis] % (width.members * each) == 0 and value.shape[axis] > 1:
                        found.append((call.path, name, axis, each))
    return sorted(found, key=lambda f: (f[2] != 1, f))[:6]


def proven(width: Width, layers: Sequence[tuple[nn.Module, str]], run: Any) -> str:
    """Why narrowing does not equal zeroing in the whole model, or "".

    Args:
        width: completed.
        layers: (container, name) of layers of this kind.
        run: gives the model's outputs, or None.
    """
    if width.reason or not width.exact:
        return width.reason
    kept = list(range(1, width.members))
    for holder, name in layers:
        layer: Any = holder._modules[name]
        with left_out(dict(layer.named_parameters()), width, [0]):
            want = run()
        narrowed = copy.deepcopy(layer)
        code.narrow(narrowed, width.data(), kept)
        try:
            holder._modules[name] = narrowed
            far = distance(want, run()) if want is not None else float("inf")
        finally:
            holder._modules[name] = layer
        if far > (1e-9 if want and want[0].dtype == torch.float64 else 2e-5):
            return "others use what its members compute" + (f" (the output is {far:.1g} off)" if far < 1e9 else "")
    return ""
