"""Walk through the layers with calibration data, as the dense model sees it and as the pruned one will.

Each layer is run alone, with the arguments the model itself gives it, on hidden states that were kept from the layer
before. So a repair of layer l can look at what the layers before it, pruned and repaired already, hand over; each
layer costs a few calls, and only one layer's statistics are in memory, beside two hidden states per token. The model
is dense all the way: what a plan removes is silenced, which is what surgery makes of it. Only projections that are one
matrix are looked at: experts and convolutions follow the plan, but are not repaired.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_cka.anatomy import OUTPUTS, Anatomy
from hf_cka.data import Batch, batch_rows
from hf_cka.modeling.modeling_hf_cka import arguments_of
from hf_cka.modeling.plan import PruningPlan
from hf_cka.pruning.criteria.base import Structure
from hf_cka.pruning.criteria.inputs import (
    OUTPUT_ROLES,
    Tokens,
    linear_outputs,
    select_tokens,
    tapped_slice,
    tokens_of,
)
from hf_cka.pruning.criteria.replay import (
    call_with,
    entering,
    forwards,
    hidden_of,
    passing,
    rewrap,
    silenced,
    unreached,
    with_input,
)
from hf_cka.pruning.criteria.weights import holder_of
from hf_cka.representations import check_runnable, forward, rows_of, token_mask

# A branch is added to the residual stream if doubling its output moves the stream by a multiple of that output, up to
# this part of it. Rounding stays below; a norm in between is far above.
_ADDITIVE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass
class Rows:
    """One calibration batch in front of a layer.

    Args:
        calls: per layer, the arguments the model gave it, with an empty tensor for the hidden states.
        batch: what the model read.
        dense: hidden states of the dense model, ``(batch, tokens, hidden_size)``.
        pruned: those of the pruned one.
        outputs: role -> output of that projection in the dense model, in the layer that was entered last.
        after: hidden states of the dense model behind that layer, and behind the removed layers that follow it.
        first: how many rows came before this batch.
    """

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    batch: Batch
    dense: torch.Tensor
    pruned: torch.Tensor
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    after: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    first: int = 0


@dataclass(frozen=True)
class Seen:
    """What one projection of the pruned model sees, gives and lacks, padding left out.

    Args:
        inputs: ``(n_tokens, kept features)``.
        output: ``(n_tokens, hidden_size)``.
        missing: ``(n_tokens, hidden_size)``: what the output lacks.
        weight: ``(n_tokens,)`` float64.
        held_out: ``(n_tokens,)``, true in every fourth calibration row: not for fitting, but for judging a fit.
    """

    inputs: torch.Tensor
    output: torch.Tensor
    missing: torch.Tensor
    weight: torch.Tensor
    held_out: torch.Tensor


def kept_features(anatomy: Anatomy, plan: PruningPlan, layer: int, role: str) -> torch.Tensor | None:
    """Return the input features of an output projection that a plan keeps, or None if it keeps all.

    Args:
        anatomy: of the dense model.
        plan: what will be removed.
        layer: which layer.
        role: ``"o"`` or ``"down"``.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hf_cka.anatomy import find_anatomy
        >>> shape = dict(hidden_size=4, intermediate_size=8, num_attention_heads=2, vocab_size=16)
        >>> anatomy = find_anatomy(LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **shape)))
        >>> kept_features(anatomy, PruningPlan(1, "llama", kept_groups={0: [1]}), 0, "o").tolist()
        [2, 3]
    """
    table = plan.kept.get(OUTPUTS[role], {})
    width = anatomy.width(layer, OUTPUTS[role])
    if layer not in table or width is None:
        return None
    return torch.tensor(width.output.indices(table[layer]))


def is_held_out(row: torch.Tensor) -> torch.Tensor:
    """Return which calibration rows, by number, judge a fit instead of entering it: every fourth.

    Counted over all batches, so that the batch size does not matter.

    Example:
        >>> is_held_out(torch.arange(5)).tolist()
        [False, False, False, True, False]
    """
    return row % 4 == 3


class Walk:
    """Both hidden states of all calibration rows, moved on layer by layer.

    Args:
        anatomy: of the dense model, in eval mode.
        plan: what will be removed.
        batches: model-ready dicts, read once.

    Raises:
        ValueError: for no data, or a model that does something between its layers.

    Example:
        >>> walk = Walk(anatomy, plan, batches)  # doctest: +SKIP
        >>> for layer in plan.kept_layers:  # doctest: +SKIP
        ...     walk.enter(layer)
        ...     walk.leave(layer)
    """

    def __init__(self, anatomy: Anatomy, plan: PruningPlan, batches: Iterable[Batch]) -> None:
        check_runnable(anatomy.model)
        self.anatomy, self.plan = anatomy, plan
        self.rows: list[Rows] = []
        chain = anatomy.stack.layers
        bent = [i for i, layer in enumerate(chain) if layer.visits > 1 or "shape of the stream" in layer.reason]
        if bent:
            raise ValueError(
                f"Layers {bent[:8]} of {anatomy.layers_path!r} run several times or change the shape of the stream, so "
                "its layers cannot be repaired one by one."
            )
        self.linear = [linear_outputs(anatomy, layer) for layer in range(anatomy.num_layers)]
        for index, batch in enumerate(batches):
            token_mask(batch, index)  # refuses what is no batch
            rows = self._start(batch)
            rows.first = sum(batch_rows(earlier.batch) for earlier in self.rows)
            self.rows.append(rows)
        if not self.rows:
            raise ValueError("Calibration is empty: no batch came out of it. An iterator can be read only once.")
        self.gain = {role: self._gain(role) for role in OUTPUT_ROLES}
        for layer in range(plan.kept_layers[0]):  # removed from the start: only the dense model has them
            self._advance(layer)

    # ---- what the plan leaves of a layer ----

    def present(self, layer: int) -> list[str]:
        """Return the output projections of a layer that stay and are one matrix, in the order they run."""
        return [role for role, width in self.linear[layer].items() if not self._goes(layer, width.branch)]

    def _goes(self, layer: int, branch: str) -> bool:
        return layer in self.plan.removed_branches.get(branch, ())

    def kept(self, layer: int, role: str) -> torch.Tensor | None:
        """Return the input features of an output projection that stay, or None if all do."""
        return kept_features(self.anatomy, self.plan, layer, role)

    def projection(self, layer: int, role: str) -> nn.Module:
        """Return an output projection."""
        return holder_of(self.anatomy.layer(layer), self.linear[layer][role].output.parameter)

    def runs_ahead(self, layer: int) -> int:
        """Return how many removed layers follow a layer."""
        gone, count = set(self.plan.removed_layers), 0
        while layer + count + 1 in gone:
            count += 1
        return count

    # ---- moving on ----

    def enter(self, layer: int) -> None:
        """Run a kept layer, and the removed ones behind it, on the dense states; remember what it gives."""
        for rows in self.rows:
            with torch.no_grad(), self._watched(layer) as seen:
                rows.after = self._call(layer, rows, rows.dense)
            rows.outputs = {role: output for role, (_, output) in seen.items()}
            with torch.no_grad():
                for ahead in range(layer + 1, layer + 1 + self.runs_ahead(layer)):
                    rows.after = self._call(ahead, rows, rows.after)

    def visit(self, layer: int) -> Iterator[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
        """Run a layer on the dense states, hand over (inputs, weight) of its output projections, and move on.

        For whoever only looks at the dense model: one call a layer and batch, and the weights that :meth:`see` gives.

        Args:
            layer: the next one, from layer 0 on.
        """
        for rows in self.rows:
            with torch.no_grad(), self._watched(layer) as seen:
                after = self._call(layer, rows, rows.dense)
            stream, gain = {"down": after}, self.gain["o"]
            if "o" in seen and gain is not None:
                stream["o"] = rows.dense + gain * _like(seen["o"][1], rows.dense)
            found = {}
            for role, (inputs, _) in seen.items():
                tokens = self._tokens(inputs, rows)
                found[role] = tokens.values, self._weight(tokens, stream[role] if self._adds(role) else None, rows)
            rows.dense = after
            yield found

    def see(self, layer: int, role: str) -> Iterator[Seen]:
        """Run a layer, as it is now, on the pruned states, and yield what one projection lacks.

        Where both branches are added to the residual stream, a projection lacks all that the stream lacks behind it,
        what the layers before and the removed layers ahead left undone included, and a token weighs one over the mean
        square of the stream there: the next norm divides by just that, and without it a few tokens whose stream is
        huge (attention sinks) would be all that counts. Elsewhere, with norms between the projection and the stream,
        it lacks the difference to the dense projection's output.

        Args:
            layer: entered before.
            role: ``"o"`` or ``"down"``.
        """
        kept = self.kept(layer, role)
        for rows in self.rows:
            with torch.no_grad(), self._watched(layer, pruned=True) as seen:
                behind = self._call(layer, rows, rows.pruned)
                inputs, output = seen[role]
                target = rows.dense
                gain = self.gain[role] if self._adds(role) else None
                if gain is None:
                    missing = self._tokens(_wide(rows.outputs[role]) - _wide(output), rows)
                elif role == "down":
                    missing, target = self._stream((_wide(rows.after) - _wide(behind)) / gain, rows), rows.after
                else:
                    own = _like(_wide(rows.outputs["o"]) - _wide(output), rows.dense)
                    target = rows.dense + gain * _like(rows.outputs["o"], rows.dense)
                    missing = self._stream(own + (_wide(rows.dense) - _wide(rows.pruned)) / gain, rows)
                tokens = self._tokens(inputs, rows)
                weight = self._weight(tokens, None if gain is None else target, rows)
                yield Seen(
                    tokens.values if kept is None else tokens.values[:, kept.to(tokens.values.device)],
                    self._tokens(output, rows).values,
                    missing.values,
                    weight,
                    is_held_out(rows.first + tokens.prompt),
                )

    def leave(self, layer: int) -> None:
        """Move on: run the layer, repaired by now, on the pruned states."""
        for rows in self.rows:
            with torch.no_grad(), self._watched(layer, pruned=True):
                rows.pruned = self._call(layer, rows, rows.pruned)
            rows.dense, rows.outputs = rows.after, {}

    def _adds(self, role: str) -> bool:
        """Whether a branch's output is added to the residual stream (and so is the other's)."""
        return self.gain[role] is not None and all(self.gain.values())

    def _tokens(self, values: torch.Tensor, rows: Rows) -> Tokens:
        """Of what enters or leaves a projection."""
        return tokens_of(values, rows.batch, self.anatomy)

    def _stream(self, hidden: torch.Tensor, rows: Rows) -> Tokens:
        """Of what flows between layers."""
        return select_tokens(*rows_of(hidden, rows.batch, self.anatomy))

    def _weight(self, tokens: Tokens, stream: torch.Tensor | None, rows: Rows) -> torch.Tensor:
        """Prompts weigh equally; a token weighs one over the mean square of the stream, where there is one."""
        weight = tokens.weight.to(tokens.values.device)
        return weight if stream is None else weight / self._stream(stream, rows).values.double().square().mean(1)

    # ---- how a layer is run ----

    def _start(self, batch: Batch) -> Rows:
        """Run the model with layers that hand their input on, and note how it calls each of them."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        handed: list[torch.Tensor] = []
        name = type(self.anatomy.model).__name__

        def noting(index: int, original: Any) -> Any:
            given_on = self._handing(index, original)

            def note(*args: Any, **kwargs: Any) -> Any:
                hidden = entering(args, kwargs)
                if handed and hidden is not handed[-1]:
                    raise ValueError(
                        f"{name} changes the hidden states between layers {len(calls) - 1} and {len(calls)}, so its "
                        "layers cannot be repaired one by one."
                    )
                if len(calls) != index:
                    raise ValueError(f"{name} runs layer {index} out of turn or again, so a repair cannot walk along.")
                handed.append(hidden)
                calls.append(with_input(args, kwargs, hidden.new_empty(0)))
                return given_on(*args, **kwargs)

            return note

        layers = list(self.anatomy.layers)
        with torch.no_grad(), forwards(layers, [noting(i, layer.forward) for i, layer in enumerate(layers)]):
            forward(self.anatomy, batch)
        if not calls:
            raise unreached(self.anatomy, batch)
        if len(calls) != len(layers):
            raise ValueError(f"{len(calls)} of {len(layers)} layers ran in the forward pass; a repair needs all.")
        return Rows(calls, batch, handed[0], handed[0])

    def _handing(self, index: int, original: Any) -> Any:
        """A ``forward`` that hands the input of a layer on, in the form in which the layer returns."""
        layer = self.anatomy.stack.layers[index]
        arguments = arguments_of(self.anatomy.layer(index))

        def hand(*args: Any, **kwargs: Any) -> Any:
            # what others use, beside the stream, has to be computed
            output = original(*args, **kwargs) if layer.reason else None
            if output is not None:
                return passing(rewrap(output, hidden_of(output).new_empty(0)), layer.returns, arguments)(
                    *args, **kwargs
                )
            empty = entering(args, kwargs).new_empty(0)
            template = (
                empty if layer.returns is None else tuple(empty if n == "stream" else None for n in layer.returns)
            )
            return passing(template, layer.returns, arguments)(*args, **kwargs)

        return hand

    def _call(self, layer: int, rows: Rows, hidden: torch.Tensor) -> torch.Tensor:
        args, kwargs = rows.calls[layer]
        return call_with(self.anatomy.layer(layer), hidden, args, kwargs)

    def _advance(self, layer: int) -> None:
        for rows in self.rows:
            with torch.no_grad():
                rows.dense = self._call(layer, rows, rows.dense)

    @contextmanager
    def _watched(self, layer: int, pruned: bool = False) -> Iterator[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
        """Note (input, output) of the output projections, of the dense layer or of what the plan leaves of it."""
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def after(role: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
                seen[role] = (args[0], output)

            return hook

        with ExitStack() as stack:
            if pruned:
                stack.enter_context(self._cut(layer))
            for role in self.linear[layer]:
                stack.callback(self.projection(layer, role).register_forward_hook(after(role)).remove)
            yield seen

    @contextmanager
    def _cut(self, layer: int) -> Iterator[None]:
        """Let a layer compute as if the plan had been applied to it."""
        with ExitStack() as stack:
            for name in self.plan.removed_branches:
                if self._goes(layer, name):
                    stack.enter_context(silenced(self.anatomy, Structure(name, layer)))
            for name, table in self.plan.kept.items():
                width = self.anatomy.width(layer, name)
                if layer not in table or width is None:
                    continue
                stays = torch.zeros(width.members).index_fill_(0, torch.tensor(table[layer]), 1)
                for part in dict.fromkeys((width.output, *width.outputs)):
                    mask = stays.repeat_interleave(part.block)
                    tap = partial(_masked, mask)
                    stack.enter_context(tapped_slice(self.anatomy, layer, name, width, part, tap))
            yield

    def _gain(self, role: str) -> float | None:
        """The factor with which a branch is added to the residual stream; None if it is not simply added.

        Read from what the model does: with the other branch silenced, the projection's output is doubled.
        """
        having = [i for i, own in enumerate(self.linear) if role in own]
        if not having:
            return 1.0
        layer, rows = having[0], self.rows[0]
        own = self.linear[layer][role].branch
        others = [b.name for b in self.anatomy.stack.layers[layer].branches if b.name != own]
        with torch.no_grad(), ExitStack() as stack:
            for other in others:
                stack.enter_context(silenced(self.anatomy, Structure(other, layer)))
            with self._watched(layer) as seen:
                once = self._call(layer, rows, rows.dense)
            double = self.projection(layer, role).register_forward_hook(lambda _m, _a, output: 2 * output)
            stack.callback(double.remove)
            moved = self._stream(self._call(layer, rows, rows.dense) - once, rows).values
            output = self._tokens(seen[role][1], rows).values
        if moved.shape != output.shape:  # windows with a border of their own
            return None
        gain = float((moved * output).sum() / output.square().sum())
        off = float((moved - gain * output).norm())
        return gain if off <= _ADDITIVE[once.dtype] * float(moved.norm()) and gain > 0 else None


def _masked(mask: torch.Tensor, _layer: int, _role: str, values: torch.Tensor) -> torch.Tensor:
    return values * mask.to(values)


def _like(output: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
    """What a projection gives, in the layout of the stream: channels may come first there, or rows lie in one."""
    if stream.ndim == 4 and output.shape != stream.shape and output.shape == stream.movedim(1, -1).shape:
        return output.movedim(-1, 1)
    return output.reshape(stream.shape)


def _wide(hidden: torch.Tensor) -> torch.Tensor:
    """In float32 at least: what is lacking is a small difference."""
    return hidden.to(torch.promote_types(hidden.dtype, torch.float32))
