"""Find the branches of a layer: silence a module, run backward, and what has no gradient any more goes with it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_cka.anatomy.parts import Branch
from hf_cka.anatomy.stacks import Call, form_of, watching, with_main
from hf_cka.anatomy.twin import tensors_of
from hf_cka.modeling import modeling_hf_cka as code

Gradients = dict[str, torch.Tensor]
# Differences below this, relative to the largest, are rounding.
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4}


class Bench:
    """One layer on its own, called as the model called it.

    Args:
        layer: the module.
        call: how it was called.
    """

    def __init__(self, layer: nn.Module, call: Call) -> None:
        self.layer = layer
        self.args, self.kwargs = _detached(call.args), _detached(call.kwargs)
        self.parameters = dict(layer.named_parameters())
        with torch.no_grad():
            self.output = self.run()
        self.base = self.gradients()

    def run(self) -> list[torch.Tensor]:
        """All tensors that the layer returns, its main one first."""
        return tensors_of(self.layer(*self.args, **self.kwargs))

    def gradients(self) -> Gradients:
        """The gradient of a fixed mixture of the main output by every parameter."""
        before = {n: p.requires_grad for n, p in self.parameters.items()}
        for p in self.parameters.values():
            p.requires_grad_(p.is_floating_point())
        try:
            with torch.enable_grad():
                out = self.run()[0]
                if not out.requires_grad:
                    return {n: torch.zeros_like(p) for n, p in self.parameters.items()}
                draw = torch.Generator().manual_seed(3)
                loss = (out * torch.randn(out.shape, generator=draw, dtype=out.dtype)).sum()
                wanted = [p for p in self.parameters.values() if p.requires_grad]
                grads = torch.autograd.grad(loss, wanted, allow_unused=True)
        finally:
            for n, p in self.parameters.items():
                p.requires_grad_(before[n])
        by_id = {id(p): g for p, g in zip(wanted, grads, strict=True)}
        return {
            n: g if (g := by_id.get(id(p))) is not None else torch.zeros_like(p) for n, p in self.parameters.items()
        }

    def calls(self) -> list[Call]:
        """Every call of every module inside the layer."""
        modules = {n: m for n, m in self.layer.named_modules() if n}
        with watching(self.layer, modules) as calls, torch.no_grad():
            self.run()
        return calls


def _detached(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone() if value.is_floating_point() else value
    if hasattr(value, "get_seq_length"):
        return None  # a cache
    if isinstance(value, tuple):
        return tuple(_detached(v) for v in value)
    if isinstance(value, list):
        return [_detached(v) for v in value]
    return {k: _detached(v) for k, v in value.items()} if type(value) is dict else value


@contextmanager
def silenced(module: nn.Module, factor: float = 0.0) -> Iterator[None]:
    """Multiply the main output of a module."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        return with_main(output, tensors_of(output)[0] * factor)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def find_branches(bench: Bench) -> tuple[list[Branch], bool]:
    """Return the branches of a layer in the order they run, and whether there is one that is all of it."""
    layer = bench.layer
    stream = code.main_input(bench.args, bench.kwargs)
    calls = bench.calls()
    times = {call.path: sum(c.path == call.path for c in calls) for call in calls}
    order = {call.path: i for i, call in enumerate(calls)}
    alive = frozenset(n for n, g in bench.base.items() if bool((g != 0).any()))
    sets: dict[str, frozenset[str]] = {}
    whole = ""
    for call in calls:
        own = {n for n in alive if n.startswith(f"{call.path}.")}
        if not own or call.hidden is None or not _could_add(call.hidden, stream) or times[call.path] > 1:
            continue
        with silenced(layer.get_submodule(call.path)):
            now = bench.gradients()
            with torch.no_grad():
                left = bench.run()[0]
        dead = frozenset(n for n in alive if not bool((now[n] != 0).any()))
        if not own <= dead or not _ends(bench, order, call.path, dead):
            continue
        if dead == alive:
            if left.shape == stream.shape and _equal(left, stream):
                whole = call.path  # of several, the outermost, which ends last
        elif _additive(bench, call.path):
            sets[call.path] = dead
    if whole:
        return _named(bench, [_branch(bench, calls, whole, alive)]), True
    chosen: list[tuple[str, frozenset[str]]] = []
    # the largest first; among equals the one that runs last, which ends the branch
    for path, dead in sorted(sets.items(), key=lambda item: (-_heavy(bench, item[1]), -order[item[0]])):
        if not any(dead & other for _, other in chosen):
            chosen.append((path, dead))
    branches = [_branch(bench, calls, p, s) for p, s in sorted(chosen, key=lambda item: order[item[0]])]
    return _named(bench, branches), False


def _could_add(hidden: torch.Tensor, stream: torch.Tensor) -> bool:
    """Whether a tensor has the shape of the stream, flattened perhaps, or of one of several parallel streams."""
    same = hidden.shape[-1] == stream.shape[-1] and hidden.ndim >= 3 and stream.ndim > hidden.ndim
    return hidden.numel() == stream.numel() or (same and stream.numel() % hidden.numel() == 0)


def _equal(one: torch.Tensor, two: torch.Tensor) -> bool:
    return float((one - two).abs().max()) <= ROUNDING[one.dtype] * float(one.abs().max())


def _ends(bench: Bench, order: Mapping[str, int], path: str, dead: frozenset[str]) -> bool:
    """Whether a module runs last of all that is dead without it, so that it is the end of a branch and no entry."""
    matrices = [n for n in dead if bench.parameters[n].ndim >= 2]
    holders = {n.rpartition(".")[0] for n in matrices}
    return bool(matrices) and all(order.get(h, -1) <= order[path] for h in holders)


def _heavy(bench: Bench, names: frozenset[str]) -> int:
    return sum(bench.parameters[n].numel() for n in names)


def _additive(bench: Bench, path: str) -> bool:
    """Whether the rest of the layer still matters without it: something else carries the stream."""
    stream = code.main_input(bench.args, bench.kwargs)
    wide = stream.detach().clone().requires_grad_()
    args = tuple(wide if a is stream else a for a in bench.args)
    kwargs = {k: wide if v is stream else v for k, v in bench.kwargs.items()}
    with silenced(bench.layer.get_submodule(path)), torch.enable_grad():
        out = tensors_of(bench.layer(*args, **kwargs))[0]
        draw = torch.Generator().manual_seed(5)
        loss = (out * torch.randn(out.shape, generator=draw, dtype=out.dtype)).sum()
        if not loss.requires_grad:
            return False
        (grad,) = torch.autograd.grad(loss, [wide], allow_unused=True)
    return grad is not None and float((grad != 0).double().mean()) > 0.5


def _branch(bench: Bench, calls: Sequence[Call], path: str, dead: frozenset[str]) -> Branch:
    """What has to go with a branch: the largest modules of which every parameter is dead."""
    layer = bench.layer
    gone: list[str] = []
    for module_name, module in layer.named_modules():
        if (
            not module_name
            or path.startswith(f"{module_name}.")
            or any(module_name == g or module_name.startswith(f"{g}.") for g in gone)
        ):
            continue
        inside = [f"{module_name}.{n}" for n, _ in module.named_parameters()]
        # parameters that had no gradient from the start (an unused expert) go with the module that holds them
        silent = {n for n in inside if n in bench.base and not bool((bench.base[n] != 0).any())}
        if inside and set(inside) <= dead | silent and set(inside) & dead:
            gone.append(module_name)
    called = {call.path: call for call in calls}
    modules = tuple((g, form_of(layer.get_submodule(g), called[g])) for g in gone if g in called)
    parameters = tuple(n for n in bench.parameters if any(n.startswith(f"{g}.") for g in gone))
    largest = max(gone, key=lambda g: sum(p.numel() for p in layer.get_submodule(g).parameters()), default=path)
    return Branch("", path, modules, parameters, type(layer.get_submodule(largest)).__name__)


def _named(bench: Bench, branches: Sequence[Branch]) -> list[Branch]:
    """Name branches by what they do: mix tokens, read another sequence, or neither."""
    kinds = {b.module: _kind(bench, b, branches) for b in branches}
    names: dict[str, str] = {}
    for kind in ("attention", "cross_attention", "mlp"):
        own = [b for b in branches if kinds[b.module] == kind]
        own.sort(key=lambda b: -sum(bench.parameters[n].numel() for n in b.parameters))
        names |= {b.module: kind if i == 0 else f"{kind}:{b.module}" for i, b in enumerate(own)}
    return [replace(b, name=names[b.module]) for b in branches]


def _kind(bench: Bench, branch: Branch, branches: Sequence[Branch]) -> str:
    stream = code.main_input(bench.args, bench.kwargs)
    with ExitStack() as others:  # so that nothing else carries what one position knows to another
        for other in branches:
            if other is not branch:
                others.enter_context(silenced(bench.layer.get_submodule(other.module)))
        before = _added(bench, branch.module)
        for value in _second_sequences(bench, stream):
            if not _equal(before, _added(bench, branch.module, value, _noise(value))):
                return "cross_attention"
        return "attention" if _mixes(bench, branch.module, stream, before) else "mlp"


def _added(bench: Bench, path: str, old: Any = None, new: Any = None) -> torch.Tensor:
    """What a module gives when the layer is run, with one of the layer's inputs exchanged."""
    seen: list[torch.Tensor] = []
    handle = bench.layer.get_submodule(path).register_forward_hook(lambda _m, _a, out: seen.append(tensors_of(out)[0]))
    args = tuple(new if a is old and old is not None else a for a in bench.args)
    kwargs = {k: new if v is old and old is not None else v for k, v in bench.kwargs.items()}
    try:
        with torch.no_grad():
            bench.layer(*args, **kwargs)
    finally:
        handle.remove()
    return seen[0]


def _noise(value: torch.Tensor) -> torch.Tensor:
    return value + torch.randn(value.shape, generator=torch.Generator().manual_seed(7)).to(value)


def _mixes(bench: Bench, path: str, stream: torch.Tensor, before: torch.Tensor) -> bool:
    """Whether what one position gets depends on others: change one position, and count those that notice."""
    if stream.ndim == 3:  # batch and positions, in either order: samples do not notice each other
        return any(_spreads(bench, path, stream, before, axis) for axis in (0, 1))
    axis = max(0, stream.ndim - 2)  # rows or columns of a picture
    if before.ndim < stream.ndim and before.ndim >= 2 and before.shape[-2] in stream.shape:
        axis = stream.shape.index(before.shape[-2])  # one of several parallel streams
    return _spreads(bench, path, stream, before, axis)


def _spreads(bench: Bench, path: str, stream: torch.Tensor, before: torch.Tensor, axis: int) -> bool:
    middle = stream.shape[axis] // 2
    changed = stream.clone()
    changed.narrow(axis, middle, 1).copy_(_noise(changed.narrow(axis, middle, 1)))
    after = _added(bench, path, stream, changed)
    if before.shape != after.shape:
        return True
    if before.numel() == stream.numel():
        before, after = before.reshape(stream.shape), after.reshape(stream.shape)
    axis = axis if before.ndim == stream.ndim else max(0, before.ndim - 2)
    moved = (before - after).abs().movedim(axis, 0).flatten(1).amax(1)
    # experts compute the rows of all positions together, which rounds differently
    return int((moved > ROUNDING[stream.dtype] * moved.max()).sum()) > 1


def _second_sequences(bench: Bench, stream: torch.Tensor) -> list[torch.Tensor]:
    """Other sequences that the layer is given (an encoder's): named so, and no mask or bias."""
    names = code.arguments_of(bench.layer)
    given = {**dict(zip(names, bench.args, strict=False)), **bench.kwargs}
    return [
        v
        for n, v in given.items()
        if isinstance(v, torch.Tensor)
        and v is not stream
        and v.is_floating_point()
        and v.ndim == 3
        and re.search(r"encoder|cross|context|memory|image", n)
        and not re.search(r"mask|bias|position", n)
    ]
