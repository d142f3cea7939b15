"""The whole experiment: build a twin, find its stacks, layers, branches and widths, and prove each of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_cka.anatomy.branches import Bench, find_branches, silenced
from hf_cka.anatomy.experts import find_experts, why_not_proven
from hf_cka.anatomy.overrides import overridden
from hf_cka.anatomy.parts import Branch, Findings, Layer, Stack, Width
from hf_cka.anatomy.scaling import scaled
from hf_cka.anatomy.stacks import (
    Found,
    find_stacks,
    form_of,
    removed,
    tried,
    watching,
    why_not_removable,
)
from hf_cka.anatomy.twin import Twin, distance, make_twin, one_thread, outputs, tensors_of, text_alone
from hf_cka.anatomy.widths import completed, find_widths, named, proven
from hf_cka.modeling import modeling_hf_cka as code

_ROUTER = re.compile(r"(gate|router|classifier)$")
# Layers of one kind that are taken out, one at a time, to see what happens; more are alike.
_TRIED = 12
# What one layer is like: its class, its parameters, and the numbers and words among its modules' attributes.
Signature = tuple[Any, ...]


@one_thread()
def discover(model: Any) -> tuple[Findings, Twin | None]:
    """Find out what a model is made of.

    Args:
        model: a `PreTrainedModel` of a stock class, untouched by surgery. Only its class, its config and the shapes of
            its parameters are read; they may be on the meta device.

    Returns:
        What was found, and the twin it was found on; None where no twin could be built or run.
    """
    try:
        twin = make_twin(model)
    except ValueError as error:
        return _by_shape(model, str(error)), None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = find_stacks(twin, lambda call: bool(find_branches(Bench(twin.model.get_submodule(call.path), call))[0]))
        stacks = [_stack(twin, f) for f in found]
    optional = _optional(twin, [s.layers[0].path for s in stacks])
    stacks = [replace(s, optional=s.layers[0].path in optional) for s in stacks]
    findings = Findings(tuple(sorted(stacks, key=lambda s: s.rank)), tuple(twin.batch), _unseen(twin))
    return (findings if twin.scale == 1 else scaled(findings, twin, model)), twin


def _stack(twin: Twin, found: Found) -> Stack:
    model = twin.model
    backbone = _backbone(model, found.path)
    config = getattr(model.get_submodule(backbone), "config", None)
    groups: dict[Signature, list[str]] = {}
    benches: dict[str, Bench] = {}
    layers: dict[str, Layer] = {}
    for path in found.layers:
        module, call = model.get_submodule(path), found.calls[path]
        layers[path] = Layer(path, form_of(module, call), visits=found.visits[path])
        groups.setdefault(_signature(module), []).append(path)
    for paths in groups.values():
        for path, told in _told(paths).items():
            if path == told:
                call, returns = found.calls[path], layers[path].returns
                reason = why_not_removable(twin, path, call, returns, found.visits[path])
            else:
                reason = layers[told].reason
            layers[path] = replace(layers[path], reason=reason)
    for paths in groups.values():
        some = list(dict.fromkeys((paths[0], paths[len(paths) // 2], paths[-1])))
        first = paths[len(paths) // 2]
        bench = benches[first] = Bench(model.get_submodule(first), found.calls[first])
        branches, single = find_branches(bench)
        branches = [_proven_branch(twin, b, some) for b in branches]
        widths = [completed(bench, w, twin.tolerance) for w in find_widths(bench, branches, single, config)]
        widths += find_experts(bench, branches, twin.tolerance)
        widths = [_proven_width(twin, w, some) for w in widths]
        for path in paths:
            layers[path] = replace(
                layers[path],
                branches=tuple(branches),
                widths=named(widths, branches),
                single=single,
                linears=_linears(model.get_submodule(path), widths),
            )
    for path, why in found.others.items():
        layers[path] = _unchained(twin, path, why)
    order = list(dict.fromkeys((*_named_children(model, found.path), *found.layers)))
    types = [str(getattr(c, "model_type", "")) for c in (model.config, config)]
    chain = tuple(overridden(layers[p], type(model.get_submodule(p)).__name__, types) for p in order if p in layers)
    count = sum(p.numel() for path in layers for p in model.get_submodule(path).parameters())
    return Stack(found.path, chain, backbone, _causal(twin, found), count)


def _told(paths: Sequence[str]) -> dict[str, str]:
    """Which layer of a kind speaks for each: of many, some that are spread over the depth; those come first."""
    if len(paths) <= _TRIED:
        return {p: p for p in paths}
    some = sorted({round(i * (len(paths) - 1) / (_TRIED - 1)) for i in range(_TRIED)})
    speaks = {i: min(some, key=lambda j: (abs(i - j), j)) for i in range(len(paths))}
    return {paths[i]: paths[speaks[i]] for i in (*some, *(i for i in speaks if i not in some))}


def _named_children(model: nn.Module, path: str) -> list[str]:
    return [f"{path}.{n}" if path else n for n, _ in model.get_submodule(path).named_children()]


def _unchained(twin: Twin, path: str, why: str) -> Layer:
    """A layer that changes the shape of the stream: it stays, but its widths may be narrowed."""
    module = twin.model.get_submodule(path)
    with watching(twin.model, {path: module}) as calls:
        outputs(twin.model, twin.batch)
    try:
        bench = Bench(module, calls[0])
        branches, _ = find_branches(bench)
        config = getattr(twin.model, "config", None)
        whole = [Branch("attention", "", (), tuple(bench.parameters), type(module).__name__, reason=why)]
        widths = [completed(bench, w, twin.tolerance) for w in find_widths(bench, branches or whole, True, config)]
        branches = [replace(b, reason=why) for b in branches]
        widths = [_proven_width(twin, w, [path]) for w in widths]
    except Exception:
        return Layer(path, reason=why, linears=_linears(module, ()))
    return Layer(path, None, tuple(branches), named(widths, branches), why, linears=_linears(module, widths))


def _linears(layer: nn.Module, widths: Sequence[Width]) -> tuple[str, ...]:
    """The projections that adapters go into: all but routers; of a layer without any, its convolutions."""
    found = [n for n, m in layer.named_modules() if n and _projects(m)]
    inside = {s.module for w in widths for s in w.slices if w.kind != "experts"}
    known = {w.output.module for w in widths if w.kind == "experts" and w.output.parameter.endswith(".weight")}
    experts = {
        n.rpartition(".")[0].rpartition(".")[0] for n, p in layer.named_parameters() if p.ndim == 3 and n.count(".")
    }
    routers = {n for n in found if n.rpartition(".")[0] in experts and n not in inside and _ROUTER.search(n)}
    if found:
        return tuple(n for n in found if n not in routers | known)
    return tuple(n for n, m in layer.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1)


def _projects(module: nn.Module) -> bool:
    """Whether a module is one matrix product: a subclass of `nn.Linear` may be another (one per group of its input)."""
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    if module.weight.is_meta:
        return True
    probe = torch.ones(2, 3, module.in_features, dtype=module.weight.dtype)
    try:
        with torch.no_grad():
            return torch.allclose(module(probe), nn.Linear.forward(module, probe))
    except Exception:
        return False


def _signature(module: nn.Module) -> Signature:
    shapes = tuple((n, tuple(p.shape)) for n, p in module.named_parameters())
    kinds = tuple(
        (
            n,
            type(m).__name__,
            tuple((k, v) for k, v in sorted(vars(m).items()) if isinstance(v, (str, bool)) and k[0] != "_"),
        )
        for n, m in module.named_modules()
    )
    return shapes, kinds


def _backbone(model: nn.Module, path: str) -> str:
    """The innermost model of its own around a container of layers."""
    parts = path.split(".")
    for end in range(len(parts), -1, -1):
        name = ".".join(parts[:end])
        if hasattr(model.get_submodule(name), "base_model_prefix"):
            return name
    return ""


def _causal(twin: Twin, found: Found) -> bool:
    """Whether a change of the last position leaves all before it alone."""
    first, last = found.layers[0], found.layers[-1]
    stream = found.calls[first].stream
    lengths = {v.shape[1] for k, v in twin.batch.items() if k.endswith("input_ids") and v.ndim == 2}
    if stream is None or stream.ndim < 3:
        return False
    axis = next((a for a in (stream.ndim - 2, *range(stream.ndim - 1)) if stream.shape[a] in lengths), None)
    if axis is None or stream.shape[axis] < 3:
        return False
    seen: list[torch.Tensor] = []
    noise = torch.randn(stream.select(axis, -1).shape, generator=torch.Generator().manual_seed(2)).to(stream)

    def change(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        old = code.main_input(args, kwargs)
        new = old.clone()
        new.select(axis, -1).add_(noise)
        swap = lambda v: new if v is old else v  # noqa: E731
        return tuple(map(swap, args)), {k: swap(v) for k, v in kwargs.items()}

    def note(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.append(tensors_of(output)[0])

    handle = twin.model.get_submodule(last).register_forward_hook(note)
    try:
        tried(twin)
        changer = twin.model.get_submodule(first).register_forward_pre_hook(change, with_kwargs=True)
        try:
            tried(twin)
        finally:
            changer.remove()
    finally:
        handle.remove()
    if len(seen) < 2 or seen[0].shape != seen[-1].shape or seen[0].shape != stream.shape:
        return False
    moved = (seen[0] - seen[-1]).abs().movedim(axis, 0).flatten(1).amax(1)
    return float(moved[:-1].max()) <= 1e-6 * float(moved[-1])


def _optional(twin: Twin, paths: Sequence[str]) -> set[str]:
    """Layers that text alone does not reach, of a model that takes text alone."""
    text = text_alone(twin.batch)
    if not text:
        return set()
    with watching(twin.model, {path: twin.model.get_submodule(path) for path in paths}) as calls:
        try:
            outputs(twin.model, text)
        except Exception:
            return set()
    return set(paths) - {call.path for call in calls}


def _unseen(twin: Twin) -> tuple[str, ...]:
    """Modules that no input reached: nothing about them is proven."""
    modules = {n: m for n, m in twin.model.named_modules() if n and next(m.parameters(recurse=False), None) is not None}
    with watching(twin.model, modules) as calls:
        tried(twin)
    silent = set(modules) - {call.path for call in calls}
    # a parent may read the parameters of a child that it never calls; whole towers are what matters
    towers = [
        n
        for n, m in twin.model.named_children()
        for inside in [[k for k in modules if k == n or k.startswith(f"{n}.")]]
        if len(inside) > 3 and all(k in silent for k in inside) and next(m.parameters(), None) is not None
    ]
    return tuple(towers)


def _proven_branch(twin: Twin, branch: Branch, paths: Sequence[str]) -> Branch:
    """Compare the model in which a branch is silent with the one from which it was taken, in some layers."""
    for path in paths:
        with silenced(twin.model.get_submodule(f"{path}.{branch.module}")):
            expected = tried(twin)
        if expected is None:
            return replace(branch, reason="the model does not run without it")
        with removed(twin.model, [(f"{path}.{m}", "branch", form) for m, form in branch.modules]):
            far = distance(expected, tried(twin))
        if far > twin.tolerance:
            off = f" (the output is {far:.1g} off)" if far < 1e9 else ""
            return replace(branch, reason=f"others use what it computes{off}")
    return branch


def _proven_width(twin: Twin, width: Width, paths: Sequence[str]) -> Width:
    places = []
    within = {f"{path}.{s.module}." for path in paths for s in width.slices}
    if any(name.startswith(f"{module}.") for module in twin.exchanged for name in within):
        return replace(width, reason="the model builds their module anew, from its config, as it runs")
    for path in paths:
        holder, _, name = path.rpartition(".")
        places.append((twin.model.get_submodule(holder), name))
    why = why_not_proven if width.kind == "experts" else proven
    return replace(width, reason=why(width, places, lambda: tried(twin)))


def _by_shape(model: Any, why: str) -> Findings:
    """The stacks that a model's modules suggest, where no twin could be run: for choosing layers, not for surgery."""
    stacks: list[Stack] = []
    for path, module in model.named_modules():
        children = list(module.named_children())
        kinds = {type(c) for _, c in children}
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or not children or len(kinds) > 2:
            continue
        if any(path.startswith(f"{s.path}.") for s in stacks):
            continue
        if not all(sum(isinstance(m, nn.Linear) for m in c.modules()) >= 3 for _, c in children):
            continue
        reason = f"it could not be tried: {why}"
        chain = tuple(Layer(f"{path}.{n}" if path else n, reason=reason, linears=_linears(c, ())) for n, c in children)
        count = sum(p.numel() for p in module.parameters())
        causal = bool(getattr(model, "can_generate", lambda: False)())
        stacks.append(Stack(path, chain, _backbone(model, path), causal, count))
    return Findings(tuple(sorted(stacks, key=lambda s: s.rank)), notes=(why,))
