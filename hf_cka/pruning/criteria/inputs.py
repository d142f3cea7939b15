"""What flows into the output projections: the heads' outputs into `o`, the units' activations into `down`.

Every width criterion and every closed-form repair looks at a model through these two points, because removing a head
or a unit is the same as leaving out columns of the projection behind it. No scores are made here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from tqdm.auto import tqdm

from hf_cka.anatomy import OUTPUTS, Anatomy, Slice, Width
from hf_cka.data import Batch, batch_rows
from hf_cka.pruning.criteria.experts import watched
from hf_cka.pruning.criteria.replay import unreached
from hf_cka.pruning.criteria.weights import holder_of, member_order, stored
from hf_cka.representations import check_runnable, evaluating, forward, rows_of, token_mask

#: The two projections whose inputs are heads and units.
OUTPUT_ROLES = tuple(OUTPUTS)

# gets (layer, role, values) with the features last and in the order of the members; may return other values
Tap = Callable[[int, str, torch.Tensor], Any]
# gets (layer, role, rows of an expert, which row of the experts' input each is, the experts' input)
RoutedTap = Callable[[int, str, torch.Tensor, "torch.Tensor | None", torch.Tensor], Any]


@dataclass(frozen=True)
class Tokens:
    """The tokens of one batch, padding left out, as one projection sees them; patches and frames count as tokens.

    Args:
        values: ``(n_tokens, in_features)``, float32 at least.
        weight: ``(n_tokens,)`` float64: one over the length of the token's prompt, so that prompts weigh equally.
        prompt: ``(n_tokens,)``: the row of the batch a token belongs to.
        num_prompts: rows of the batch.
    """

    values: torch.Tensor
    weight: torch.Tensor
    prompt: torch.Tensor
    num_prompts: int

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over prompts of each prompt's mean of ``values`` ``(n_tokens, ...)``, in float64."""
        return torch.einsum("n,n...->...", self.weight.to(values.device), values.double())

    def prompt_means(self, values: torch.Tensor) -> torch.Tensor:
        """Return each prompt's mean of ``values`` ``(n_tokens, features)``: ``(num_prompts, features)``, float64."""
        weighted = values.double() * self.weight.to(values.device).unsqueeze(1)
        means = weighted.new_zeros(self.num_prompts, values.shape[1])
        return means.index_add_(0, self.prompt.to(values.device), weighted)


def select_tokens(hidden: torch.Tensor, mask: torch.Tensor) -> Tokens:
    """Leave out the padding of one batch.

    Args:
        hidden: ``(batch, tokens, features)``, or ``(batch * tokens, features)`` as in OPT's MLP.
        mask: ``(batch, tokens)``, true where there is a token; padding may be on either side.

    Example:
        >>> tokens = select_tokens(torch.arange(6.0).reshape(1, 3, 2), torch.tensor([[True, True, False]]))
        >>> tokens.values.tolist(), tokens.weight.tolist()
        ([[0.0, 1.0], [2.0, 3.0]], [0.5, 0.5])
    """
    prompt, _ = mask.nonzero(as_tuple=True)
    weight = (1 / mask.sum(dim=1).double())[prompt]
    values = hidden.reshape(*mask.shape, -1)[mask.to(hidden.device)]
    return Tokens(values.to(torch.promote_types(values.dtype, torch.float32)), weight, prompt, len(mask))


def tokens_of(values: torch.Tensor, batch: Batch, anatomy: Anatomy) -> Tokens:
    """Return what of a projection's input counts, whatever its shape.

    Where rows cannot be told apart by sample (all samples packed into one row), they weigh equally, and count as the
    prompts in order.

    Args:
        values: features last.
        batch: that the model was run on.
        anatomy: of the model.
    """
    hidden, mask = by_sample(values, batch, anatomy)
    if mask is not None:
        return select_tokens(hidden, mask)
    return _loose(hidden.reshape(-1, hidden.shape[-1]), batch_rows(batch))


def by_sample(values: torch.Tensor, batch: Batch, anatomy: Anatomy) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return values as ``(samples, positions, features)`` with their mask, or as they are and None.

    Args:
        values: features last.
        batch: that the model was run on.
        anatomy: of the model.
    """
    rows = batch_rows(batch)
    if values.ndim > 3:  # maps and windows, sample by sample: the features are last already
        values = values.flatten(1, -2)
    elif values.ndim < 3 and len(values) % rows:
        return values, None
    hidden, mask = rows_of(values, batch, anatomy)
    return (hidden, mask) if len(hidden) == rows else (values, None)


def _loose(values: torch.Tensor, prompts: int) -> Tokens:
    count = len(values)
    weight = torch.full((count,), prompts / max(count, 1), dtype=torch.float64)
    prompt = torch.arange(count) * prompts // max(count, 1)
    return Tokens(values.to(torch.promote_types(values.dtype, torch.float32)), weight, prompt, prompts)


def routed_rows(
    count: int, selected: torch.Tensor | None, hidden: torch.Tensor, batch: Batch, anatomy: Anatomy
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the prompt of each row that a router sent to experts, and which rows are no padding.

    Where it was not seen which tokens the router sent, the rows count as the prompts in order.

    Args:
        count: of rows.
        selected: which row of the experts' input each is, or None.
        hidden: the experts' input.
        batch: that the model was run on.
        anatomy: of the model.
    """
    _, mask = by_sample(hidden, batch, anatomy)
    if selected is None or mask is None:
        return torch.arange(count) * batch_rows(batch) // max(count, 1), torch.ones(count, dtype=torch.bool)
    selected = selected.cpu()
    return selected // mask.shape[1], mask.flatten()[selected]


def output_projections(anatomy: Anatomy) -> Iterator[tuple[int, str, nn.Module]]:
    """Yield ``(layer, role, module)`` of every output projection the model still has, in the order they run.

    The matrices of experts are one parameter of one module: there it is that module.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hf_cka.anatomy import find_anatomy
        >>> sizes = dict(hidden_size=8, intermediate_size=16, num_attention_heads=2, vocab_size=16)
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes))
        >>> [(layer, role) for layer, role, _ in output_projections(find_anatomy(model))]
        [(0, 'o'), (0, 'down'), (1, 'o'), (1, 'down')]
    """
    for layer in range(anatomy.num_layers):
        for role, width in anatomy.outputs(layer).items():
            yield layer, role, holder_of(anatomy.layer(layer), width.output.parameter)


def linear_outputs(anatomy: Anatomy, layer: int) -> dict[str, Width]:
    """Return the widths of a layer that leave it through one plain matrix: no experts, no convolution.

    Args:
        anatomy: of the model.
        layer: which layer.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hf_cka.anatomy import find_anatomy
        >>> sizes = dict(hidden_size=8, intermediate_size=16, num_attention_heads=2, vocab_size=16)
        >>> list(linear_outputs(find_anatomy(LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))), 0))
        ['o', 'down']
    """
    found = {}
    for role, width in anatomy.outputs(layer).items():
        name = width.output.parameter
        module, value = holder_of(anatomy.layer(layer), name), stored(anatomy.layer(layer), name)
        size = width.members * width.output.block if value is None else value.shape[width.output.axis]
        matrix = name.endswith(".weight") and (value is None or value.ndim == 2)
        if matrix and not is_convolution(module) and member_order(width, width.output, size) is None:
            found[role] = width
    return found


def is_convolution(module: Any) -> bool:
    """Return whether a module, or what PEFT put adapters around, is a convolution.

    Example:
        >>> is_convolution(nn.Conv2d(1, 1, 1))
        True
    """
    return isinstance(getattr(module, "base_layer", module), _ConvNd)


@contextmanager
def tapped(anatomy: Anatomy, tap: Tap, routed: RoutedTap | None = None) -> Iterator[None]:
    """Call ``tap(layer, role, input)`` whenever an output projection runs; what it returns replaces the input.

    The features are last, and in the order of the members. What enters the matrices of experts comes as
    ``(rows, features)``, a call for every multiplication.

    Args:
        anatomy: of the model.
        tap: returns a tensor of the same shape, or None to leave the input alone.
        routed: called for experts instead, with which row of the experts' input each row is (None where that was
            not seen), and with that input.
    """
    with ExitStack() as stack:
        for layer in range(anatomy.num_layers):
            for role, width in anatomy.outputs(layer).items():
                stack.enter_context(tapped_slice(anatomy, layer, role, width, width.output, tap, routed))
        yield


@contextmanager
def tapped_slice(
    anatomy: Anatomy,
    layer: int,
    role: str,
    width: Width,
    part: Slice,
    tap: Tap,
    routed: RoutedTap | None = None,
) -> Iterator[None]:
    """As :func:`tapped`, for one slice of one width.

    Args:
        anatomy: of the model.
        layer: which layer.
        role: handed to the tap.
        width: whose members.
        part: through which they leave: a width's ``output``, or one of its further ``outputs``.
        tap: as there.
        routed: as there.
    """
    module, attribute = holder_of(anatomy.layer(layer), part.parameter), part.parameter.rpartition(".")[2]
    value = stored(anatomy.layer(layer), part.parameter)
    if value is not None and value.ndim == 3 and not is_convolution(module):
        while not isinstance(getattr(module, attribute, None), torch.Tensor):
            module = module.base_layer
        order = member_order(width, part, value.shape[part.axis])

        def rows(values: torch.Tensor, selected: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor | None:
            inner = values if order is None else values[:, order.to(values.device)]
            changed = tap(layer, role, inner) if routed is None else routed(layer, role, inner, selected, hidden)
            return None if changed is None else _put_back(values, changed, order)

        with watched(module, attribute, part.axis, rows):
            yield
        return

    def before(module: nn.Module, args: tuple[Any, ...]) -> Any:
        given = args[0]
        channels_first = is_convolution(module)
        values = given.movedim(1, -1) if channels_first else given
        order = member_order(width, part, values.shape[-1])
        changed = tap(layer, role, values if order is None else values[..., order.to(values.device)])
        if changed is None:
            return None
        changed = _put_back(values, changed, order)
        return (changed.movedim(-1, 1) if channels_first else changed, *args[1:])

    handle = module.register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()


def _put_back(values: torch.Tensor, changed: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    if order is None:
        return changed
    return values.index_copy(values.ndim - 1, order.to(values.device), changed)


def stream_inputs(
    anatomy: Anatomy,
    batches: Iterable[Batch],
    consume: Callable[[int, str, Tokens], None],
    *,
    progress: bool = False,
    description: str = "width",
) -> int:
    """Run the model over the batches and hand over what enters each output projection.

    Nothing is kept: memory does not grow with the data. Of experts, all rows of a batch come at once; each counts for
    the prompt of its token, and the rows of a prompt weigh equally. Where it was not seen which tokens a router sent,
    all rows of the batch weigh equally.

    Args:
        anatomy: of the model.
        batches: model-ready dicts.
        consume: called with (layer, role, tokens).
        progress: show a bar.
        description: its label.

    Returns:
        The number of prompts.

    Raises:
        ValueError: for no batches, an all-padding row, NaN or infinite activations, experts that run in a kernel, or
            meta weights.

    Example:
        >>> stream_inputs(anatomy, batches, lambda layer, role, tokens: None)  # doctest: +SKIP
        64
    """
    check_runnable(anatomy.model)
    reading = _Reading(anatomy, consume)
    prompts = 0
    with evaluating(anatomy.model), tapped(anatomy, reading.tap, reading.routed), torch.no_grad():
        for index, batch in enumerate(tqdm(batches, desc=description, unit="batch", disable=not progress, delay=2)):
            token_mask(batch, index)  # refuses what is no batch
            reading.batch = batch
            forward(anatomy, batch)
            reading.finish()
            prompts += batch_rows(batch)
    if not prompts:
        raise ValueError("Calibration is empty: no batch came out of it. An iterator can be read only once.")
    return prompts


class _Reading:
    """Makes tokens of what the taps see; the rows of one layer's experts are put together first."""

    def __init__(self, anatomy: Anatomy, consume: Callable[[int, str, Tokens], None]) -> None:
        self.anatomy, self.consume = anatomy, consume
        self.batch: Batch = {}
        self.held: tuple[int, str] | None = None
        self.parts: list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]] = []
        self.seen: set[tuple[int, str]] = set()

    def tap(self, layer: int, role: str, values: torch.Tensor) -> None:
        self.flush()
        self.hand_over(layer, role, tokens_of(values, self.batch, self.anatomy))

    def routed(
        self, layer: int, role: str, values: torch.Tensor, selected: torch.Tensor | None, hidden: torch.Tensor
    ) -> None:
        if self.held != (layer, role):
            self.flush()
        self.held = (layer, role)
        self.parts.append((values, selected, hidden))

    def flush(self) -> None:
        if self.held is None:
            return
        (layer, role), self.held = self.held, None
        parts, self.parts = self.parts, []
        values = torch.cat([v for v, _, _ in parts])
        known = [s for _, s, _ in parts if s is not None]
        selected = torch.cat(known) if len(known) == len(parts) else None
        prompt, keep = routed_rows(len(values), selected, parts[0][2], self.batch, self.anatomy)
        if selected is None:
            self.hand_over(layer, role, _loose(values, batch_rows(self.batch)))
            return
        values, prompt = values[keep.to(values.device)], prompt[keep]
        weight = (1 / torch.bincount(prompt, minlength=batch_rows(self.batch)).double())[prompt]
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        self.hand_over(layer, role, Tokens(values, weight, prompt, batch_rows(self.batch)))

    def hand_over(self, layer: int, role: str, tokens: Tokens) -> None:
        if not tokens.values.isfinite().all():
            raise ValueError(
                f"The input of {role!r} in layer {layer} holds NaN or infinite values. Load the model in bfloat16 or "
                "float32 instead of float16, or leave such samples out."
            )
        self.seen.add((layer, role))
        if len(tokens.values):
            self.consume(layer, role, tokens)

    def finish(self) -> None:
        self.flush()
        if not self.seen and any(self.anatomy.outputs(layer) for layer in range(self.anatomy.num_layers)):
            raise unreached(self.anatomy, self.batch)
        for layer in range(self.anatomy.num_layers):
            for role, width in self.anatomy.outputs(layer).items():
                unseen = (layer, role) not in self.seen
                if unseen and not width.output.parameter.endswith(".weight"):
                    raise ValueError(
                        f"What enters {width.output.parameter!r} of layer {layer} was not seen: its module "
                        "multiplies in a way of its own. Load the model with experts_implementation='eager', or use "
                        "'magnitude'."
                    )
