"""Find the stacks of a model by running it: children of a container whose output has the shape of their input and
feeds the next. A layer may go where handing its input on is all that is left to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from hf_cka.anatomy.parts import Returns
from hf_cka.anatomy.twin import Twin, distance, outputs, tensors_of
from hf_cka.modeling import modeling_hf_cka as code

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


@dataclass
class Call:
    """One call of a module.

    Attributes:
        path: its dotted name.
        args, kwargs: what it was given.
        output: what it returned.
        stream: the tensor among the arguments that the output continues, or None.
        hidden: the main tensor of the output, or None.
    """

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    stream: torch.Tensor | None = None
    hidden: torch.Tensor | None = None

    def __post_init__(self) -> None:
        found = tensors_of(self.output)
        self.hidden = found[0] if found else None
        try:
            self.stream = code.main_input(self.args, self.kwargs)
        except TypeError:
            self.stream = None

    @property
    def same_shape(self) -> bool:
        """Whether what leaves has the shape of what enters."""
        return self.stream is not None and self.hidden is not None and self.stream.shape == self.hidden.shape


@dataclass
class Found:
    """A container of layers.

    Attributes:
        path: of the container.
        layers: paths of the layers that are of one shape and in the chain, in the order they run.
        others: reasons, by path, of children that are not removable because of their shape.
        calls: of each layer, the first one.
        visits: how often each runs.
    """

    path: str
    layers: list[str]
    others: dict[str, str]
    calls: dict[str, Call] = field(default_factory=dict)
    visits: dict[str, int] = field(default_factory=dict)


def find_stacks(twin: Twin, residual: Callable[[Call], bool]) -> list[Found]:
    """Return the stacks of a model, the one with most parameters first.

    Args:
        twin: of the model.
        residual: says whether a layer adds to a stream; chains of others are no stacks, if there are any that do.
    """
    model = twin.model
    found: dict[str, Found] = {}
    with watching(model, dict(_children(model))) as calls:
        outputs(model, twin.batch)
    groups: dict[str, list[Call]] = {}
    for call in calls:
        groups.setdefault(call.path.rpartition(".")[0], []).append(call)
    for path, group in groups.items():
        stack = _chain(model, path, group)
        if stack is not None:
            found[path] = stack
    some = {p: s for p, s in found.items() if any(residual(s.calls[layer]) for layer in s.layers[:2])}
    found = some or {p: s for p, s in found.items() if len(s.layers) > 1}
    stages = {p for p, s in found.items() if s.others and any(_within(q, p, s) for q in found.values())}
    kept = [s for p, s in found.items() if p not in stages]
    kept = [s for s in kept if not any(_within(s, p, other) for p, other in found.items() if p not in stages)]
    return sorted(kept, key=lambda s: -sum(_size(model, layer) for layer in [*s.layers, *s.others]))


def _children(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, _CONTAINERS):
            for child_name, child in module.named_children():
                yield (f"{name}.{child_name}" if name else child_name), child


def _chain(model: nn.Module, path: str, group: Sequence[Call]) -> Found | None:
    """A container whose children hand a stream from one to the next, or None."""
    composite = [c for c in group if next(model.get_submodule(c.path).children(), None) is not None]
    with_weights = [c for c in composite if any(p.ndim >= 2 for p in model.get_submodule(c.path).parameters())]
    chained = [c for c in with_weights if c.same_shape and c.hidden is not None and c.hidden.ndim >= 2]
    if not chained:
        return None
    visits: dict[str, int] = {}
    calls: dict[str, Call] = {}
    for call in chained:
        visits[call.path] = visits.get(call.path, 0) + 1
        calls.setdefault(call.path, call)
    linked = sum(_feeds(a, b) for a, b in pairwise(with_weights))
    kinds = {type(model.get_submodule(p)) for p in calls}
    if not linked and (len(calls) > 1 or max(visits.values()) == 1) and not (len(calls) == 1 and _deep(model, path)):
        return None
    if len(kinds) > 2 and len(kinds) == len(calls):
        return None  # a chain of unlike modules is a head, no stack
    others = {c.path: "it changes the shape of the stream" for c in with_weights if c.path not in calls}
    return Found(path, list(calls), others, calls, visits)


def _feeds(one: Call, two: Call) -> bool:
    a, b = one.hidden, two.stream
    return a is not None and b is not None and a.shape == b.shape and (a is b or torch.equal(a, b))


def _deep(model: nn.Module, path: str) -> bool:
    """A container with a single layer is a stack if the layer is a block and not a mere projection."""
    return sum(1 for m in model.get_submodule(path).modules() if isinstance(m, nn.Linear)) >= 4


def _within(stack: Found, path: str, other: Found) -> bool:
    """Whether a stack lies within one layer of another."""
    return stack.path != path and any(f"{stack.path}.".startswith(f"{p}.") for p in (*other.layers, *other.others))


def _size(model: nn.Module, path: str) -> int:
    return sum(p.numel() for p in model.get_submodule(path).parameters())


@contextmanager
def watching(model: nn.Module, modules: dict[str, nn.Module]) -> Iterator[list[Call]]:
    """Note every call of the given modules, in the order they end."""
    calls: list[Call] = []
    handles = []

    def note(path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls.append(Call(path, args, kwargs, output))

        return hook

    try:
        for path, module in modules.items():
            handles.append(module.register_forward_hook(note(path), with_kwargs=True))
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def form_of(module: nn.Module, call: Call) -> Returns:
    """How a module returns: a bare tensor, or the elements of a tuple that are its own or handed through."""
    if isinstance(call.output, torch.Tensor):
        return None
    names = code.arguments_of(module)
    arguments = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
    form: list[str | None] = []
    for value in call.output.values() if hasattr(call.output, "values") else call.output:
        if value is call.hidden:
            form.append("stream")
        elif isinstance(value, torch.Tensor):
            form.append(next((n for n, a in arguments.items() if a is value and n != "hidden_states"), None))
        else:
            form.append(None)
    return tuple(form)


def why_not_removable(twin: Twin, path: str, call: Call, returns: Returns, visits: int) -> str:
    """Take a layer out and compare with the model in which it hands its input on; "" where they are equal."""
    model = twin.model
    if visits > 1:
        return f"it runs {visits} times: the model shares it between depths"
    with bypassed(model, [path]):
        expected = tried(twin)
    if expected is None:
        return "the model does not run without it"
    if twin.far(expected) == 0:
        return "it does not matter to the output of the experiment"
    with removed(model, [(path, "layer", returns)]):
        far = distance(expected, tried(twin))
    return "" if far <= twin.tolerance else _shares(far)


def _shares(far: float) -> str:
    return "others use what it computes" + (f" (without it the output is {far:.1g} off)" if far < 1e9 else "")


def tried(twin: Twin) -> list[torch.Tensor] | None:
    """The twin's outputs, or None where it fails."""
    try:
        return outputs(twin.model, twin.batch)
    except Exception:
        return None


@contextmanager
def bypassed(model: nn.Module, paths: Sequence[str]) -> Iterator[None]:
    """Let layers run as always, and hand their input on instead of their output."""
    handles = []

    def skip(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return with_main(output, code.main_input(args, kwargs))

    try:
        for path in paths:
            handles.append(model.get_submodule(path).register_forward_hook(skip, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def running_as(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module run another forward for a while; one that it has of its own comes back.

    Args:
        module: whose; not changed for good.
        forward: what runs in the place of `module.forward`.
    """
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            module.__dict__.pop("forward", None)
        else:
            module.forward = before


def with_main(output: Any, value: torch.Tensor) -> Any:
    """The output of a module with another main tensor."""
    if isinstance(output, torch.Tensor):
        return value
    main = tensors_of(output)[0]
    if isinstance(output, (tuple, list)):
        return type(output)(value if v is main else v for v in output)
    for key, old in list(output.items()):
        if old is main:
            output[key] = value
    return output


@contextmanager
def removed(model: nn.Module, entries: Sequence[tuple[str, str, Returns]]) -> Iterator[None]:
    """Put stand-ins where modules are, and the modules back."""
    before = []
    for path, _, _ in entries:
        parent, _, name = path.rpartition(".")
        before.append((code.part(model, parent), name, code.part(model, path)))
    try:
        for path, kind, returns in entries:
            code.replace(model, path, kind, returns)
        yield
    finally:
        for holder, name, module in before:
            holder._modules[name] = module
