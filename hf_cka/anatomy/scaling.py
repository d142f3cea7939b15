"""From the twin's sizes to the model's: the same members and order, each as many times larger as the model is."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

from torch import nn

from hf_cka.anatomy.experts import tensors_of_layer
from hf_cka.anatomy.parts import Findings, Layer, Segment, Slice, Width
from hf_cka.anatomy.twin import Twin
from hf_cka.modeling import modeling_hf_cka as code


def scaled(findings: Findings, twin: Twin, model: Any) -> Findings:
    """Return the findings of a twin in the sizes of the model.

    Args:
        findings: of the twin.
        twin: the twin.
        model: the model; only shapes and sizes are read.
    """
    stacks = []
    for stack in findings.stacks:
        layers = tuple(_layer(layer, twin.model, model) for layer in stack.layers)
        count = sum(p.numel() for layer in layers for p in model.get_submodule(layer.path).parameters())
        stacks.append(replace(stack, layers=layers, parameters=count))
    return replace(findings, stacks=tuple(sorted(stacks, key=lambda s: s.rank)))


def _layer(layer: Layer, twin: nn.Module, model: nn.Module) -> Layer:
    small, large = twin.get_submodule(layer.path), model.get_submodule(layer.path)
    return replace(layer, widths=tuple(_width(w, small, large) for w in layer.widths))


def _width(width: Width, small: nn.Module, large: nn.Module) -> Width:
    sizes = {n: p.shape for n, p in tensors_of_layer(small).items()}
    real = {n.replace(".base_layer.", "."): p.shape for n, p in tensors_of_layer(large).items()}
    output = width.output
    if output.parameter not in real:
        return replace(width, reason="its parameters are stored in another way than the class declares")
    before, after = sizes[output.parameter][output.axis], real[output.parameter][output.axis]
    # of heads there are as many, each wider (and counted so, where the twin's are one wide); of units there are more
    counted = any(
        _value(small, path, name) == _value(large, path, name) == width.members
        for path, name, _, positions in width.attributes
        if positions is None
    )
    members = width.members if output.block > 1 or counted else after // output.block
    ratio = after // before
    slices = []
    for s in width.slices:
        if s.parameter not in real:
            return replace(width, reason=f"the model has no parameter {s.parameter!r}")
        at = _slice(s, width.members, members, sizes[s.parameter][s.axis], real[s.parameter][s.axis], ratio)
        if at is None:
            return replace(width, reason=f"where its members lie in {s.parameter!r} is not certain at this size")
        slices.append(at)
    now = dict(zip(width.slices, slices, strict=True))
    attributes = []
    for path, name, each, positions in width.attributes:
        own, others = _value(small, path, name), _value(large, path, name)
        for position in positions or (None,):
            a, b = (v if position is None else v[position] for v in (own, others))
            share = (
                b // members
                if a == width.members * each
                else next((n.block for o, n in now.items() if o.block == each), 0)
            )
            attributes.append((path, name, share, None if position is None else (position,)))
    return replace(
        width,
        members=members,
        slices=tuple(slices),
        output=now[output],
        outputs=tuple(now[s] for s in width.outputs),
        attributes=tuple(attributes),
    )


def _value(layer: nn.Module, path: str, name: str) -> Any:
    module = code.part(layer, path)
    return getattr(module.config, name.partition(".")[2]) if name.startswith("config.") else getattr(module, name)


def _slice(s: Slice, before: int, members: int, size: int, real: int, ratio: int) -> Slice | None:
    """The same segments along a longer axis; None where several readings fit."""
    blocks = [b for _, b in s.segments]
    if members != before:  # units: as many indices each, more of them
        options = [[(b, members)] for b in blocks]
    else:
        options = [[(b * ratio, members)] + ([(b, members)] if ratio > 1 else []) for b in blocks]
    gaps = []  # what lies before, between and behind the segments
    end = 0
    for start, block in s.segments:
        gaps.append(start - end)
        end = start + block * before
    gaps.append(size - end)
    factors = sorted({1, ratio, members // before if members % before == 0 else 1})
    found: dict[tuple[Segment, ...], None] = {}
    for chosen in itertools.product(*options):
        for grown in itertools.product(*[[g * f for f in factors] if g else [0] for g in gaps]):
            if sum(b * m for b, m in chosen) + sum(grown) == real:
                at, segments = 0, []
                for gap, (block, count) in zip(grown, chosen, strict=False):
                    at += gap
                    segments.append((at, block))
                    at += block * count
                found[tuple(segments)] = None
    if len(found) != 1:
        # a rest that belongs to no member: it takes what the segments, grown as the width is, leave
        first = [o[0] if b > 1 or members != before else o[-1] for o, b in zip(options, blocks, strict=True)]
        rest = real - sum(b * m for b, m in first)
        open_gaps = [i for i, g in enumerate(gaps) if g]
        if rest < 0 or len(open_gaps) > 1 or (rest and not open_gaps):
            return None
        at, segments = 0, []
        for i, (block, count) in enumerate(first):
            at += rest if i in open_gaps else 0
            segments.append((at, block))
            at += block * count
        return replace(s, segments=tuple(segments))
    return replace(s, segments=next(iter(found)))
