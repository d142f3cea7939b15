"""Find whole experts: parameters of one module that lie one behind the other, and the router with a row for each.

What belongs to the experts is found by permuting them: where all that has a slice per expert is permuted alike, nothing
changes. An expert that is gone is one that the router never picks, so the proof compares with the dense layer in which
its logits are minus infinity, and not with zeros: a router shares its weights out among those that are left.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from hf_cka.anatomy.branches import Bench
from hf_cka.anatomy.parts import Branch, Slice, Width
from hf_cka.anatomy.stacks import running_as
from hf_cka.anatomy.twin import distance
from hf_cka.modeling import modeling_hf_cka as code

_ROUTER = re.compile(r"gate$|router|classifier|gating")
# Names of numbers that count experts, and of those that count how many of them a token goes through.
_COUNT = re.compile(r"expert|^n$|^e$")
_CHOSEN = re.compile(r"per_tok|top_?k|(^|_)k$|shared|group|zero|capacity|size|dim")
_GROUPS = re.compile(r"group")
_PRODUCTS = frozenset({"linear", "matmul", "__matmul__", "mm", "addmm", "bmm", "einsum", "__rmatmul__"})
_UNROUTED = "no router was found that has one row for each of them"
_UNREACHED = "no input of the experiment reached them"
_APART = "each is a module of its own, and no part of one parameter"
# Numbers of modules that may follow besides those whose names say so.
_LOOKED_AT = 6


@dataclass(frozen=True)
class _Experts:
    """What has a slice per expert.

    Args:
        router: the matrix whose products are the logits, and the axis along which the experts lie there.
        beside: vectors beside it: biases, corrections, scales.
        stacked: the experts' own parameters; they lie along the first axis.
        members: how many experts.
    """

    router: tuple[str, int]
    beside: tuple[tuple[str, int], ...]
    stacked: tuple[str, ...]
    members: int

    @property
    def places(self) -> tuple[tuple[str, int], ...]:
        """All of it: (parameter, axis), the router first."""
        return (self.router, *self.beside, *((name, 0) for name in self.stacked))


def find_experts(bench: Bench, branches: Sequence[Branch], tolerance: float) -> list[Width]:
    """Return the experts of a layer as widths; with the reason where they are there but cannot go.

    Args:
        bench: the layer.
        branches: of it.
        tolerance: how far equal outputs may differ.
    """
    found = []
    for block, stacked, members in _stacks(bench.layer):
        branch = next((b.name for b in branches if set(stacked) & set(b.parameters)), "")
        with in_double():
            experts = _routed(bench, block, stacked, members, tolerance)
            if experts is None:
                if "expert" in " ".join(stacked).lower():
                    reached = any(bool((bench.base[n] != 0).any()) for n in stacked)
                    found.append(_staying(stacked, members, branch, _UNROUTED if reached else _UNREACHED))
                continue
            found.append(replace(_completed(bench, experts, tolerance), branch=branch))
    for path, members in _modules(bench.layer):
        names = tuple(n for n in bench.parameters if n.startswith(f"{path}."))
        branch = next((b.name for b in branches if set(names) & set(b.parameters)), "")
        found.append(_staying(names[:1], members, branch, _APART))
    return found


def _modules(layer: nn.Module) -> Iterator[tuple[str, int]]:
    """Containers of experts that are modules of their own, and how many they hold."""
    for path, module in layer.named_modules():
        children = [c for c in module.children() if next(c.parameters(), None) is not None]
        named = path.rpartition(".")[2].endswith("experts") and isinstance(module, (nn.ModuleList, nn.ModuleDict))
        if named and len(children) > 1 and len({type(c) for c in children}) == 1:
            yield path, len(children)


def _stacks(layer: nn.Module) -> Iterator[tuple[str, tuple[str, ...], int]]:
    """(module around them, names of parameters that lie expert by expert, how many experts)."""
    groups: dict[str, list[str]] = {}
    for path, module in layer.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Embedding)) or not any(p.ndim == 3 for p in own.values()):
            continue
        if not path:
            continue
        members = min(p.shape[0] for p in own.values() if p.ndim == 3)
        names = [n for n, p in own.items() if p.ndim == 3 or (p.ndim == 2 and p.shape[0] == members)]
        groups.setdefault(path.rpartition(".")[0], []).extend(f"{path}.{n}" for n in names)
    for block, names in groups.items():
        sizes = {n: layer.get_parameter(n).shape[0] for n in names}
        members = min(sizes.values())
        if members > 1:
            yield block, tuple(names), members


def _staying(names: Sequence[str], members: int, branch: str, reason: str) -> Width:
    output = Slice(names[0], 0, ((0, 1),))
    return Width("experts", branch, members, tuple(Slice(n, 0, ((0, 1),)) for n in names), output, reason=reason)


# ---- what belongs to them ----


def tensors_of_layer(layer: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name: a router's correction may be either."""
    return {**dict(layer.named_buffers()), **dict(layer.named_parameters())}


def _routed(bench: Bench, block: str, stacked: tuple[str, ...], members: int, tolerance: float) -> _Experts | None:
    """The router of some experts: permuted with them, it leaves the output as it is."""
    tensors = tensors_of_layer(bench.layer)
    inside = {n: t for n, t in tensors.items() if n.startswith(f"{block}." if block else "") and n not in stacked}
    around = bench.layer.get_submodule(block)
    groups = {g for module in around.modules() for _, g in _groups_in(module, members)}
    with torch.no_grad():
        want = bench.run()[:1]
        for step in (1, *sorted({members // g for g in groups})):  # whole groups, where the router chooses among them
            order = torch.arange(members).roll(step)
            with _permuted([(tensors[n], 0) for n in stacked], order):
                if distance(want, bench.run()[:1]) <= tolerance:
                    return None  # it does not matter which is which: these are no experts
            for exact in (True, False):
                for router, axis in _matrices(inside, members, exact):
                    vectors = _vectors(inside, router, block, inside[router].shape[axis])
                    for beside in _subsets(vectors):
                        experts = _Experts((router, axis), beside, stacked, members)
                        with _permuted([(tensors[n], a) for n, a in experts.places], order):
                            far = distance(want, bench.run()[:1])
                        if far <= tolerance:
                            return experts
    return None


def _matrices(tensors: Mapping[str, torch.Tensor], members: int, exact: bool) -> list[tuple[str, int]]:
    """Matrices that may be a router, the likeliest first; a router may know choices that are no experts of its own."""
    found = []
    for name, t in tensors.items():
        if t.ndim != 2 or not t.is_floating_point():
            continue
        for axis in (0, 1):
            size = t.shape[axis]
            if size == members if exact else members < size <= 2 * members:
                found.append((not any(_ROUTER.search(part) for part in name.split(".")), axis, name))
    return [(name, axis) for _, axis, name in sorted(found, key=lambda f: f[:2])]


def _vectors(tensors: Mapping[str, torch.Tensor], router: str, block: str, size: int) -> list[tuple[str, int]]:
    """Vectors with a number per expert: in the router's module, in one inside it or around it."""
    home = path = router.rpartition(".")[0]
    around = {home}
    while path != block and path:
        path = path.rpartition(".")[0]
        around.add(path)
    found = []
    for name, t in tensors.items():
        holder = name.rpartition(".")[0]
        near = holder in around or (bool(home) and home != block and holder.startswith(f"{home}."))
        if near and name != router and t.numel() == size and t.is_floating_point():
            found.append((name, list(t.shape).index(size)))
    return found


def _subsets(places: Sequence[tuple[str, int]]) -> Iterator[tuple[tuple[str, int], ...]]:
    """All of them first, and so on down to none."""
    for count in range(len(places), -1, -1):
        yield from itertools.islice(itertools.combinations(places, count), 8)


@contextmanager
def _permuted(places: Sequence[tuple[torch.Tensor, int]], order: torch.Tensor) -> Iterator[None]:
    """Permute the first indices of some axes for a while."""
    before = [t.data.clone() for t, _ in places]
    try:
        for tensor, axis in places:
            tensor.data.narrow(axis, 0, len(order)).copy_(tensor.data.index_select(axis, order))
        yield
    finally:
        for (tensor, _), old in zip(places, before, strict=True):
            tensor.data.copy_(old)


# ---- what must follow ----


def _completed(bench: Bench, experts: _Experts, tolerance: float) -> Width:
    """The width with the numbers that follow it and the fewest members that must stay; or why they cannot go."""
    width = _width(experts, 1)
    for attributes in _attempts(bench.layer, experts):
        attempt = replace(width, attributes=attributes)
        if _fits(bench, attempt, range(experts.members - 1), tolerance):
            return _with_least(bench, attempt, tolerance)
    groups = _groups(bench.layer, experts)
    for name, count in groups:
        size = experts.members // count
        width = _width(experts, size)
        for attributes in _attempts(bench.layer, experts):
            each = tuple((p, n, size * share, at) for p, n, share, at in attributes)
            attempt = replace(width, attributes=(*each, (*name, 1, None)))
            if _fits(bench, attempt, range(count - 1), tolerance):
                return _with_least(bench, attempt, tolerance)
    reason = "leaving out some of them does not equal that the router never picks them"
    if groups:
        reason = f"their router chooses among {groups[0][1]} groups first, and {reason}"
    return replace(_width(experts, 1), reason=reason)


def _width(experts: _Experts, size: int) -> Width:
    """With so many experts in one member."""
    slices = tuple(Slice(name, axis, ((0, size),)) for name, axis in experts.places)
    return Width("experts", "", experts.members // size, slices, slices[0])


def _attempts(layer: nn.Module, experts: _Experts) -> Iterator[tuple[tuple[str, str, int, None], ...]]:
    """Numbers that may follow: all whose names count experts, then fewer of them, and others beside them."""
    sure, others = [], []
    for path in _owners(experts):
        module = layer.get_submodule(path)
        for name, value in vars(module).items():
            if type(value) is not int or value < experts.members or isinstance(module, nn.Linear):
                continue
            named = bool(_COUNT.search(name)) and not _CHOSEN.search(name)
            if named and value in _sizes(layer, experts):
                sure.append((path, name, 1, None))
            elif value == experts.members:
                others.append((path, name, 1, None))
        config = getattr(module, "config", None)
        for name, value in sorted(getattr(config, "__dict__", {}).items()):
            if type(value) is int and value == experts.members and _COUNT.search(name) and not _CHOSEN.search(name):
                others.append((path, f"config.{name}", 1, None))
    yield tuple(sure)
    for count in range(1, 3):
        for more in itertools.combinations(others[:_LOOKED_AT], count):
            yield (*sure, *more)
    for count in range(len(sure) - 1, -1, -1):
        yield from itertools.islice(itertools.combinations(sure, count), 16)


def _sizes(layer: nn.Module, experts: _Experts) -> set[int]:
    tensors = tensors_of_layer(layer)
    return {experts.members} | {tensors[n].shape[a] for n, a in experts.places}


def _owners(experts: _Experts) -> list[str]:
    """The modules of the parameters, and those around them."""
    found: dict[str, None] = {}
    for name, _ in experts.places:
        path = name.rpartition(".")[0]
        while path:
            found[path] = None
            path = path.rpartition(".")[0]
    return list(found)


def _groups(layer: nn.Module, experts: _Experts) -> list[tuple[tuple[str, str], int]]:
    """((module, number), how many) of groups that a router chooses among first."""
    return [
        ((path, name), value)
        for path in _owners(experts)
        for name, value in _groups_in(layer.get_submodule(path), experts.members)
    ]


def _groups_in(module: nn.Module, members: int) -> Iterator[tuple[str, int]]:
    for name, value in vars(module).items():
        named = _GROUPS.search(name) and not name.startswith("topk")
        if named and type(value) is int and 1 < value < members and members % value == 0:
            yield name, value


def _with_least(bench: Bench, width: Width, tolerance: float) -> Width:
    """How few may stay: a router that picks two needs two."""
    low, high = 1, width.members - 1
    while low < high:
        middle = (low + high) // 2
        if _fits(bench, width, range(width.members - middle, width.members), tolerance):
            high = middle
        else:
            low = middle + 1
    return replace(width, least=low)


def _fits(bench: Bench, width: Width, kept: Sequence[int], tolerance: float) -> bool:
    layer = copy.deepcopy(bench.layer)
    twin = copy.copy(bench)
    twin.layer = layer
    try:
        code.narrow(layer, width.data(), list(kept))
        with torch.no_grad():
            made = twin.run()[:1]
            return any(distance(_unpicked(bench, width, kept, beside), made) <= tolerance for beside in (True, False))
    except Exception:
        return False


def _unpicked(bench: Bench, width: Width, kept: Sequence[int], beside: bool) -> list[torch.Tensor]:
    """The main output of the dense layer of which some experts are never picked."""
    gone = [m for m in range(width.members) if m not in set(kept)]
    with never_picked(bench.layer, width, gone, beside):
        return bench.run()[:1]


# ---- the reference ----


@contextmanager
def never_picked(layer: nn.Module, width: Width, gone: Sequence[int], beside: bool = True) -> Iterator[None]:
    """Keep the router of a dense layer from picking some experts, for a while.

    Args:
        layer: the layer.
        width: its experts.
        gone: which members are never picked.
        beside: let what is added to the router's scores say so too: sigmoid of minus infinity is a score like others.
    """
    tensors = tensors_of_layer(layer)
    router = width.slices[0]
    weight = tensors[router.parameter]
    with ExitStack() as stack:
        for s in width.slices[1:] if beside else ():
            if tensors[s.parameter].numel() == weight.shape[router.axis]:
                stack.enter_context(_filled(tensors[s.parameter].view(-1), s.indices(gone)))
        size, indices = weight.shape[router.axis], router.indices(gone)
        stack.enter_context(_running(layer, lambda: _Unpicked(weight, size, indices)))
        yield


def _running(layer: nn.Module, mode: Callable[[], TorchFunctionMode]) -> AbstractContextManager[None]:
    """Let a mode see what a layer computes, and nothing else: it takes time."""
    forward = layer.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        with mode():
            return forward(*args, **kwargs)

    return running_as(layer, run)


@contextmanager
def _filled(vector: torch.Tensor, indices: Sequence[int]) -> Iterator[None]:
    before = vector.data.clone()
    try:
        vector.data[list(indices)] = float("-inf")
        yield
    finally:
        vector.data.copy_(before)


class _Unpicked(TorchFunctionMode):
    """Sets logits to minus infinity where they come out of the router's matrix, recognised by its memory."""

    def __init__(self, weight: torch.Tensor, size: int, gone: Sequence[int]) -> None:
        super().__init__()
        self.size, self.gone = size, list(gone)
        # and what is made of it before it is multiplied; held, so that no other tensor takes its place in memory
        self.weights = [weight]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not isinstance(out, torch.Tensor) or not out.is_floating_point() or self._known(out):
            return out
        if not any(self._known(value) for value in (*args, *kwargs.values())):
            return out
        name = getattr(func, "__name__", "")
        if name in _PRODUCTS:
            axis = next((a for a in (out.ndim - 1, *range(out.ndim - 1)) if out.shape[a] == self.size), None)
            if axis is not None:
                index = torch.tensor(self.gone, device=out.device)
                return out.index_fill(axis, index, float("-inf"))
        elif out.numel() == self.weights[0].numel():
            self.weights.append(out)
        return out

    def _known(self, value: Any) -> bool:
        if not isinstance(value, torch.Tensor):
            return False
        place = value.untyped_storage().data_ptr()
        return any(place == own.untyped_storage().data_ptr() for own in self.weights)


@contextmanager
def in_double() -> Iterator[None]:
    """Let what routers compute in float32, as transformers has them do, stay in float64 where it comes in float64."""
    with _InDouble():
        yield


class _InDouble(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args else kwargs.get("input")
        if isinstance(first, torch.Tensor) and first.dtype == torch.float64:
            if getattr(func, "__name__", "") == "float":
                return first
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        return func(*args, **kwargs)


def why_not_proven(width: Width, layers: Sequence[tuple[nn.Module, str]], run: Any) -> str:
    """Why a whole model without some experts does not equal the one that never picks them, or "".

    Args:
        width: completed.
        layers: (container, name) of layers of this kind.
        run: gives the model's outputs, or None.
    """
    if width.reason:
        return width.reason
    for holder, name in layers:
        layer = holder._modules[name]
        assert layer is not None
        for kept in (range(1, width.members), range(width.least)):
            narrowed = copy.deepcopy(layer)
            code.narrow(narrowed, width.data(), list(kept))
            gone = [m for m in range(width.members) if m not in kept]
            try:
                holder._modules[name] = narrowed
                with _running(narrowed, _InDouble):
                    made = run()
            finally:
                holder._modules[name] = layer
            tolerance = 1e-9 if made and made[0].dtype == torch.float64 else 2e-5
            for beside in (True, False):
                with _running(layer, _InDouble), never_picked(layer, width, gone, beside):
                    want = run()
                far = distance(want, made) if want is not None else float("inf")
                if far <= tolerance:
                    break
            if far > tolerance:
                return "others use what its members compute" + (f" (the output is {far:.1g} off)" if far < 1e9 else "")
    return ""
