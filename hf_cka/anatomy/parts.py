"""What a model is made of, as data: stacks of layers, their branches, and the widths inside them.

Found by experiment (see `model.py`); nothing is found, cut or decided here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hf_cka.modeling import modeling_hf_cka as code

# (start, block): member m owns `block` indices from `start + m * block`
Segment = tuple[int, int]
Returns = tuple[str | None, ...] | None


@dataclass(frozen=True)
class Slice:
    """Indices of one parameter that belong to the members of a width.

    Attributes:
        parameter: its dotted name, relative to the layer ("self_attn.q_proj.weight").
        axis: along which.
        segments: (start, block): member m owns `block` indices from `start + m * block`, in each of them.
    """

    parameter: str
    axis: int
    segments: tuple[Segment, ...]

    @property
    def module(self) -> str:
        """The module that holds the parameter, relative to the layer."""
        return self.parameter.rpartition(".")[0]

    @property
    def block(self) -> int:
        """Indices of one member."""
        return sum(block for _, block in self.segments)

    def indices(self, members: Sequence[int]) -> list[int]:
        """Indices of the given members, member by member.

        Example:
            >>> Slice("qkv.weight", 0, ((0, 2), (8, 2))).indices([1])
            [2, 3, 10, 11]
        """
        return [start + m * block + i for m in members for start, block in self.segments for i in range(block)]

    def after(self, members: int, kept: int) -> Slice:
        """The same slice once fewer members are left.

        Example:
            >>> Slice("qkv.weight", 0, ((0, 2), (8, 2))).after(4, 3).segments
            ((0, 2), (6, 2))
        """
        lost = members - kept
        return replace(
            self,
            segments=tuple((s - sum(lost * b for t, b in self.segments if t < s), block) for s, block in self.segments),
        )


@dataclass(frozen=True)
class Width:
    """Something a layer has many of: heads (or KV groups, or channels of a mixer), units, experts.

    Attributes:
        name: "heads", "units" or "experts"; a second one of a layer is qualified ("heads:encoder_attn").
        branch: the name of the branch it is in.
        members: how many.
        slices: what each member holds of the layer's parameters, the output included.
        output: the slice through which members reach the residual stream.
        outputs: further slices through which they reach others (a state-space channel its time step).
        heads: query heads in one member.
        attributes: (module, attribute, what one member counts there, positions or None).
        inputs: (module, argument, axis, indices per member) of tensors that hold a slice per member.
        exact: whether removing members equals zeroing them; false where a norm's statistics span the width.
        least: how many must stay at least: as many experts as a router picks.
        reason: why members cannot be removed; empty where they can.
    """

    name: str
    branch: str
    members: int
    slices: tuple[Slice, ...]
    output: Slice
    outputs: tuple[Slice, ...] = ()
    heads: int = 1
    attributes: tuple[tuple[str, str, int, tuple[int, ...] | None], ...] = ()
    inputs: tuple[tuple[str, str, int, int], ...] = ()
    exact: bool = True
    least: int = 1
    reason: str = ""

    @property
    def kind(self) -> str:
        """ "heads", "units" or "experts"."""
        return self.name.partition(":")[0]

    def data(self) -> dict[str, Any]:
        """What surgery needs to know, as plain data."""
        return {
            "members": self.members,
            "slices": [[s.parameter, s.axis, [list(segment) for segment in s.segments]] for s in self.slices],
            "attributes": [
                [p, n, each] if at is None else [p, n, each, list(at)] for p, n, each, at in self.attributes
            ],
            "inputs": [list(entry) for entry in self.inputs],
        }

    def after(self, kept: int) -> Width:
        """The same width once fewer members are left."""
        slices = tuple(s.after(self.members, kept) for s in self.slices)
        now = dict(zip(self.slices, slices, strict=True))
        outputs = tuple(now[s] for s in self.outputs)
        return replace(self, members=kept, slices=slices, output=now[self.output], outputs=outputs)


@dataclass(frozen=True)
class Branch:
    """What adds to the residual stream inside a layer.

    Attributes:
        name: "attention" (any mixer of tokens), "cross_attention" or "mlp"; a further one is qualified ("mlp:ffn2").
        module: the module whose output is what the branch adds, relative to the layer.
        modules: (module, what it returns) of all that goes with the branch, relative to the layer.
        parameters: names of the parameters that go, relative to the layer.
        label: what kind of module it is, for people ("LlamaAttention").
        reason: why it cannot be removed; empty where it can.
    """

    name: str
    module: str
    modules: tuple[tuple[str, Returns], ...]
    parameters: tuple[str, ...]
    label: str = ""
    reason: str = ""

    @property
    def kind(self) -> str:
        """ "attention", "cross_attention" or "mlp"."""
        return self.name.partition(":")[0]


@dataclass(frozen=True)
class Layer:
    """One layer of a stack.

    Attributes:
        path: dotted name in the model.
        returns: None for a bare tensor, else one entry per element of the tuple that it returns.
        branches: in the order they run.
        widths: likewise.
        reason: why it cannot be removed; empty where it can.
        single: it has one branch, so that removing the branch removes the layer.
        visits: how often one forward pass runs it.
        skipped: branches that it had and that were removed.
        linears: names of the projections that adapters can go into, relative to the layer.
    """

    path: str
    returns: Returns = None
    branches: tuple[Branch, ...] = ()
    widths: tuple[Width, ...] = ()
    reason: str = ""
    single: bool = False
    visits: int = 1
    skipped: tuple[str, ...] = ()
    linears: tuple[str, ...] = ()

    def branch(self, name: str) -> Branch | None:
        """The branch of that name, or None."""
        return next((b for b in self.branches if b.name == name), None)

    def width(self, name: str) -> Width | None:
        """The width of that name, or None."""
        return next((w for w in self.widths if w.name == name), None)


@dataclass(frozen=True)
class Stack:
    """A chain of layers along one residual stream.

    Attributes:
        path: dotted name of the container of the layers ("model.layers").
        layers: in the order they run.
        backbone: dotted name of the module whose output is the stack's, after the final norm; "" is the model.
        causal: whether a token sees those before it alone.
        parameters: of all layers.
        optional: text alone does not reach it, though the model takes text alone (a vision tower).
    """

    path: str
    layers: tuple[Layer, ...]
    backbone: str
    causal: bool
    parameters: int
    optional: bool = False

    @property
    def kind(self) -> str:
        """ "decoder" or "encoder"."""
        return "decoder" if self.causal else "encoder"

    @property
    def rank(self) -> tuple[bool, bool, int]:
        """What puts a stack before another: that it can be taken apart, that any input reaches it, its size."""
        stays = len(self.layers) == 1 or all(layer.reason for layer in self.layers)
        return stays, self.optional, -self.parameters


@dataclass(frozen=True)
class Findings:
    """All stacks of a model, and how they were found.

    Attributes:
        stacks: by `Stack.rank`, the one that is meant by default first.
        inputs: what the model was run on ("input_ids", "pixel_values").
        unseen: modules with parameters that no input reached.
        notes: what could not be done, in words.
    """

    stacks: tuple[Stack, ...]
    inputs: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def without(self, structure: Mapping[str, Any]) -> Findings:
        """What is left once surgery took out what `config.hf_cka` names.

        Args:
            structure: that entry; see `modeling_hf_cka.py`.
        """
        gone = {entry["module"] for entry in structure.get("removed") or ()}
        kept: dict[str, dict[str, int]] = {}
        for entry in structure.get("narrowed") or ():
            for path, text in entry["kept"].items():
                output = entry["slices"][0][0]
                kept.setdefault(path, {})[output] = len(code.numbers(text, entry["members"]))
        return replace(self, stacks=tuple(_without(stack, gone, kept) for stack in self.stacks))


def _without(stack: Stack, gone: set[str], kept: Mapping[str, Mapping[str, int]]) -> Stack:
    layers = []
    for layer in stack.layers:
        if layer.path in gone:
            continue
        there = tuple(b for b in layer.branches if not any(f"{layer.path}.{m}" in gone for m, _ in b.modules))
        names = {b.name for b in there}
        own = kept.get(layer.path, {})
        widths = tuple(
            w.after(own[w.output.parameter]) if w.output.parameter in own else w
            for w in layer.widths
            if w.branch in names or not w.branch
        )
        skipped = (*layer.skipped, *(b.name for b in layer.branches if b.name not in names))
        stubs = [g[len(layer.path) + 1 :] for g in gone if g.startswith(f"{layer.path}.")]
        linears = tuple(n for n in layer.linears if not any(f"{n}.".startswith(f"{g}.") for g in stubs))
        layers.append(replace(layer, branches=there, widths=widths, skipped=skipped, linears=linears))
    return replace(stack, layers=tuple(layers))
