"""Run parts of a model again: one layer on other inputs, the model without a structure, the head on other states.

The model's own modules do all the work, called with the arguments the model itself gave them: no attention, mask or
position code is repeated here. Everything is put back, whatever happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_cka.anatomy import Anatomy
from hf_cka.data import Batch
from hf_cka.pruning.criteria.base import Structure
from hf_cka.representations import forward

# The projection through which a sub-layer reaches the residual stream, by role.
OUTPUT_ROLES = {"attention": "o", "mlp": "down"}


def hidden_of(output: Any) -> torch.Tensor:
    """Return the hidden states of what a layer or a backbone returned.

    Example:
        >>> hidden_of((torch.ones(1), None)).item()
        1.0
    """
    if hasattr(output, "last_hidden_state"):
        return output.last_hidden_state
    return output if isinstance(output, torch.Tensor) else output[0]


def rewrap(output: Any, hidden: torch.Tensor) -> Any:
    """Return ``hidden`` in the form in which a layer returned ``output``: bare, or first of a tuple.

    Example:
        >>> rewrap((torch.ones(1), None), torch.zeros(1))
        (tensor([0.]), None)
    """
    return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])


def entering(args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor:
    """Return the hidden states among the arguments of a layer."""
    return args[0] if args else kwargs["hidden_states"]


def call_with(module: nn.Module, hidden: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor:
    """Call a layer as it was called before, on other hidden states, and return what leaves it."""
    if args:
        return hidden_of(module(hidden, *args[1:], **kwargs))
    return hidden_of(module(**{**kwargs, "hidden_states": hidden}))


def run_model(anatomy: Anatomy, batch: Batch, head: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run one batch without cache and labels.

    Args:
        anatomy: of the model.
        batch: a model-ready dict.
        head: run the head as well.

    Returns:
        What leaves the backbone (after its final norm), ``(batch, tokens, hidden_size)``, and the logits.
    """
    # OPT's head calls the decoder inside the backbone and not the backbone itself: the outermost that ran counts.
    holder = anatomy.backbone.get_submodule(anatomy.family.layers.rpartition(".")[0])
    left: dict[nn.Module, torch.Tensor] = {}
    with ExitStack() as handles:
        for part in (holder, anatomy.backbone):
            handles.callback(part.register_forward_hook(partial(_remember, left)).remove)
        output = forward(anatomy, batch, head=head)
    return left.get(anatomy.backbone, left.get(holder)), getattr(output, "logits", None)  # type: ignore[return-value]


def _remember(left: dict[nn.Module, torch.Tensor], module: nn.Module, _args: Any, output: Any) -> None:
    left[module] = hidden_of(output)


def output_projection(anatomy: Anatomy, structure: Structure) -> nn.Module:
    """Return the projection through which a sub-layer reaches the residual stream.

    Raises:
        ValueError: if the sub-layer is not there any more.
    """
    role = OUTPUT_ROLES[structure.kind]
    path = anatomy.projections(structure.layer).get(role)
    if path is None:
        raise ValueError(f"Layer {structure.layer} has no {structure.kind}: it was removed already.")
    return anatomy.layer(structure.layer).get_submodule(path)


@contextmanager
def silenced(anatomy: Anatomy, structure: Structure) -> Iterator[None]:
    """Make a sub-layer add nothing to the residual stream, which is what removing it does.

    Its output projection gives zeros, bias included; norms inside the branch (Gemma 2, OLMo 2) have no bias and keep
    zero at zero. Norms on the stream itself (BERT's, after the residual sum) still run, as they do after surgery.
    """
    projection = output_projection(anatomy, structure)
    handle = projection.register_forward_hook(lambda _module, _args, output: torch.zeros_like(output))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def forwards(modules: Sequence[nn.Module], replacements: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Give modules another ``forward`` for a while."""
    before: list[Any] = [module.__dict__.get("forward") for module in modules]
    try:
        for module, forward in zip(modules, replacements, strict=True):
            module.forward = forward
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward  # accelerate's device hooks live in an instance attribute


def passing(template: Any) -> Callable[..., Any]:
    """Return a ``forward`` that hands its input on, in the form of what the layer returns."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return rewrap(template, entering(args, kwargs))

    return forward


def giving(template: Any, hidden: torch.Tensor) -> Callable[..., Any]:
    """Return a ``forward`` that gives fixed hidden states, in the form of what the layer returns."""
    return lambda *args, **kwargs: rewrap(template, hidden)


@contextmanager
def without(anatomy: Anatomy, structure: Structure, templates: Sequence[Any]) -> Iterator[None]:
    """Run the model as if a structure had been removed.

    Args:
        anatomy: of the model.
        structure: what to leave out.
        templates: what each layer returned once; only its form is used.
    """
    if structure.kind != "layer":
        with silenced(anatomy, structure):
            yield
        return
    layers = [anatomy.layer(i) for i in structure.layers]
    with forwards(layers, [passing(templates[i]) for i in structure.layers]):
        yield


@contextmanager
def resident(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Keep offloaded weights on their device for a while, instead of fetching them for every call.

    Offloading is accelerate's: a hook on each module brings its own weights before every call and drops them after
    it. Here the hook does so once. Without offloading this does nothing.

    Args:
        modules: each for itself, without its children.
    """
    with ExitStack() as stack:
        for module in modules:
            hook = getattr(module, "_hf_hook", None)
            for part in getattr(hook, "hooks", (hook,)):
                if getattr(part, "offload", False):
                    stack.enter_context(_fetched(module, part))
        yield


@contextmanager
def _fetched(module: nn.Module, hook: Any) -> Iterator[None]:
    hook.pre_forward(module)
    hook.offload = False
    try:
        yield
    finally:
        hook.offload = True
        hook.post_forward(module, None)


def chunks(
    anatomy: Anatomy, batch: Batch, mask: torch.Tensor, states: int, memory: int, logits: bool = False
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Cut a batch into parts of as many rows as fit into memory, one at least.

    Args:
        anatomy: of the model.
        batch: a model-ready dict.
        mask: which positions hold tokens, ``(batch, tokens)``.
        states: hidden states ``(rows, tokens, hidden_size)`` that are held at once.
        memory: bytes for them.
        logits: four float32 tensors ``(rows, tokens, vocabulary)`` are held as well.

    Returns:
        Parts of the batch, each with its mask.
    """
    config = anatomy.config
    per_token = (states + 3) * config.hidden_size * next(anatomy.model.parameters()).element_size()
    if logits:
        per_token += 4 * 4 * getattr(config, "vocab_size", 0)
    rows = max(1, memory // (per_token * mask.shape[1]))
    count = len(mask)
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        cut = {
            key: value[part] if isinstance(value, torch.Tensor) and value.ndim and len(value) == count else value
            for key, value in batch.items()
        }
        yield cut, mask[part]
