"""Run parts of a model again: one layer on other inputs, the model without a structure, the head on other states.

The model's own modules do all the work, called with the arguments the model itself gave them: no attention, mask or
position code is repeated here. Everything is put back, whatever happens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_cka.anatomy import Anatomy, Branch
from hf_cka.anatomy.parts import Returns
from hf_cka.anatomy.twin import tensors_of
from hf_cka.data import Batch, batch_rows
from hf_cka.modeling.modeling_hf_cka import arguments_of, main_input
from hf_cka.pruning.criteria.base import Structure
from hf_cka.representations import forward


def hidden_of(output: Any) -> torch.Tensor:
    """Return the hidden states of what a layer or a backbone returned.

    Example:
        >>> hidden_of((torch.ones(1), None)).item()
        1.0
    """
    if isinstance(output, torch.Tensor):
        return output
    last = getattr(output, "last_hidden_state", None)
    return last if isinstance(last, torch.Tensor) else tensors_of(output)[0]


def rewrap(output: Any, hidden: torch.Tensor) -> Any:
    """Return ``hidden`` in the form in which a layer returned ``output``: bare, or in the place of the first tensor.

    Example:
        >>> rewrap((torch.ones(1), None), torch.zeros(1))
        (tensor([0.]), None)
    """
    if isinstance(output, torch.Tensor):
        return hidden
    main = hidden_of(output)
    if isinstance(output, Mapping):
        changed = copy.copy(output)
        for key, value in output.items():
            if value is main:
                changed[key] = hidden  # type: ignore[index]
        return changed
    values = [hidden if value is main else value for value in output]
    return values if isinstance(output, list) else tuple(values)


def entering(args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor:
    """Return the hidden states among the arguments of a layer.

    Example:
        >>> entering((torch.zeros(1),), {"attention_mask": None})
        tensor([0.])
    """
    return main_input(args, kwargs)


def with_input(args: Sequence[Any], kwargs: dict[str, Any], hidden: torch.Tensor) -> tuple[Any, dict[str, Any]]:
    """Return the arguments of a layer with other hidden states.

    Args:
        args: as the model gave them.
        kwargs: likewise.
        hidden: takes the place of what :func:`entering` finds there.

    Example:
        >>> with_input((torch.zeros(1), None), {}, torch.ones(1))
        ((tensor([1.]), None), {})
    """
    old = entering(args, kwargs)
    return (
        tuple(hidden if value is old else value for value in args),
        {key: hidden if value is old else value for key, value in kwargs.items()},
    )


def call_with(module: nn.Module, hidden: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor:
    """Call a layer as it was called before, on other hidden states, and return what leaves it.

    A cache that the model made although it was asked for none is left out: it holds the tokens of the first call.
    """
    args, kwargs = with_input(args, kwargs, hidden)
    args = [None if hasattr(value, "get_seq_length") else value for value in args]
    kwargs = {key: None if hasattr(value, "get_seq_length") else value for key, value in kwargs.items()}
    return hidden_of(module(*args, **kwargs))


def run_model(anatomy: Anatomy, batch: Batch, head: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run one batch without cache and labels.

    Args:
        anatomy: of the model.
        batch: a model-ready dict.
        head: run the head as well.

    Returns:
        What leaves the backbone of the stack (after its final norm), ``(batch, tokens, hidden_size)`` for text, and
        the logits.

    Raises:
        ValueError: if the model does not run the backbone on this batch.
    """
    # a head may call a part of the backbone instead of the backbone itself: the outermost that ran counts
    holder = anatomy.model.get_submodule(anatomy.layers_path.rpartition(".")[0])
    left: dict[nn.Module, torch.Tensor] = {}
    with ExitStack() as handles:
        for part in (holder, anatomy.backbone):
            handles.callback(part.register_forward_hook(partial(_remember, left)).remove)
        output = forward(anatomy, batch, head=head)
    hidden = left.get(anatomy.backbone, left.get(holder))
    if hidden is None:
        raise unreached(anatomy, batch)
    return hidden, getattr(output, "logits", None)


def unreached(anatomy: Anatomy, batch: Batch) -> ValueError:
    """Return the error for a stack that the model does not run on a batch.

    Args:
        anatomy: of the stack.
        batch: that the model was run on.
    """
    return ValueError(
        f"{anatomy.layers_path!r} of {type(anatomy.model).__name__} does not run on a batch with {', '.join(batch)}: "
        "it needs its own input (pixel_values, input_features)."
    )


def _remember(left: dict[nn.Module, torch.Tensor], module: nn.Module, _args: Any, output: Any) -> None:
    left[module] = hidden_of(output)


def branch_of(anatomy: Anatomy, structure: Structure) -> Branch:
    """Return the branch that a structure is.

    Raises:
        ValueError: if the branch is not there any more.
    """
    branch = anatomy.branch(structure.layer, structure.kind)
    if branch is None:
        raise ValueError(f"Layer {structure.layer} has no {structure.kind}: it was removed already, or never there.")
    return branch


@contextmanager
def silenced(anatomy: Anatomy, structure: Structure) -> Iterator[None]:
    """Make a branch add nothing to the residual stream, which is what removing it does.

    The module through which it reaches the stream gives zeros. Norms on the stream itself (BERT's, after the residual
    sum) still run, as they do after surgery.
    """
    module = anatomy.layer(structure.layer).get_submodule(branch_of(anatomy, structure).module)

    def zeros(_module: nn.Module, _args: Any, output: Any) -> Any:
        return rewrap(output, torch.zeros_like(hidden_of(output)))

    handle = module.register_forward_hook(zeros)
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


def passing(template: Any, returns: Returns = None, arguments: Sequence[str] = ()) -> Callable[..., Any]:
    """Return a ``forward`` that hands its input on, in the form of what the layer returns.

    Args:
        template: what the layer returned once.
        returns: for each element of a tuple, the argument that the layer hands through there; see
            :class:`hf_cka.anatomy.Layer`. Others stay as they were returned.
        arguments: names of the arguments of the layer, in order.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = rewrap(template, entering(args, kwargs))
        if returns is None or not isinstance(output, tuple) or len(output) != len(returns):
            return output
        given = {**dict(zip(arguments, args, strict=False)), **kwargs}
        return tuple(given.get(name or "", value) for name, value in zip(returns, output, strict=True))

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
    returns = [anatomy.stack.layers[i].returns for i in structure.layers]
    replacements = [passing(templates[i], returns[k], arguments_of(layers[k])) for k, i in enumerate(structure.layers)]
    with forwards(layers, replacements):
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
    per_token = (states + 3) * _stream_width(config) * next(anatomy.model.parameters()).element_size()
    if logits:
        per_token += 4 * 4 * (getattr(config, "vocab_size", None) or 0)
    rows = max(1, memory // (per_token * _positions(batch, mask)))
    count = batch_rows(batch)
    # samples of which the parts are packed (patches of several pictures behind each other) stay together
    if any(isinstance(v, torch.Tensor) and v.ndim and len(v) not in (count, 1) for v in batch.values()):
        rows = count
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        cut = {
            key: value[part] if isinstance(value, torch.Tensor) and value.ndim and len(value) == count else value
            for key, value in batch.items()
        }
        yield cut, mask[part]


# What makes about one position of the stream: a patch of 16 x 16 pixels, 20 ms of sound, a frame of 80 bands.
_NUMBERS_A_POSITION = {"pixel_values": 3 * 16 * 16, "input_values": 320, "input_features": 80}


def _positions(batch: Batch, mask: torch.Tensor) -> int:
    """Roughly how many positions a sample has in the stream."""
    found = [mask.shape[1]]
    for name, each in _NUMBERS_A_POSITION.items():
        if isinstance(value := batch.get(name), torch.Tensor):
            found.append(value[0].numel() // each)
    return max(found)


def _stream_width(config: Any) -> int:
    """Roughly how wide the stream is."""
    for name in ("hidden_size", "d_model", "hidden_sizes", "embed_dim"):
        value = getattr(config, name, None)
        value = value[-1] if isinstance(value, (list, tuple)) and value else value
        if isinstance(value, int):
            return value
    return 1024
