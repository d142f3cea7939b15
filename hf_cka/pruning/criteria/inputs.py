"""What flows into the output projections: the heads' outputs into `o`, the units' activations into `down`.

Every width criterion and every closed-form repair looks at a model through these two points, because removing a head
or a unit is the same as leaving out columns of the projection behind it. No scores are made here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_cka.anatomy import Anatomy
from hf_cka.data import Batch
from hf_cka.pruning.adapters import added_weight
from hf_cka.representations import check_runnable, evaluating, forward, token_mask

#: The two projections whose inputs are heads and units.
OUTPUT_ROLES = ("o", "down")


@dataclass(frozen=True)
class Tokens:
    """The tokens of one batch, padding left out, as one projection sees them.

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


def output_projections(anatomy: Anatomy) -> Iterator[tuple[int, str, nn.Module]]:
    """Yield ``(layer, role, module)`` of every output projection the model still has, in the order they run.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hf_cka.anatomy import find_anatomy
        >>> sizes = dict(hidden_size=8, intermediate_size=16, num_attention_heads=2, vocab_size=16)
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes))
        >>> [(layer, role) for layer, role, _ in output_projections(find_anatomy(model))]
        [(0, 'o'), (0, 'down'), (1, 'o'), (1, 'down')]
    """
    for layer in range(anatomy.num_layers):
        paths = anatomy.projections(layer)
        for role in OUTPUT_ROLES:
            if role in paths:
                yield layer, role, anatomy.layer(layer).get_submodule(paths[role])


def weight_matrix(anatomy: Anatomy, layer: int, role: str, in_features: int | None = None) -> torch.Tensor:
    """Return a projection's weight as ``(out_features, in_features)``, float32 at least, however it is stored.

    With adapters it is the weight the model computes with: its own plus what the active adapters add.

    ``Conv1D`` stores the transpose. A quantized module does not show its weight at all: there the identity goes
    through the module, which gives the weight it really computes with.

    Args:
        anatomy: of the model.
        layer: which layer.
        role: which projection.
        in_features: width of its input, where it is not the model's hidden size.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from hf_cka.anatomy import find_anatomy
        >>> anatomy = find_anatomy(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16)))
        >>> weight_matrix(anatomy, 0, "up").shape
        torch.Size([32, 8])
    """
    module = anatomy.layer(layer).get_submodule(anatomy.projections(layer)[role])
    width = in_features if in_features is not None else anatomy.config.hidden_size
    weight, added = getattr(module, "weight", None), added_weight(module)
    if isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.ndim == 2:
        weight = weight.detach() if added is None else weight.detach() + added.to(weight)
        matrix = weight.T if anatomy.family.transposed else weight
        if matrix.shape[1] == width:
            return matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    reference = next(anatomy.embedding.parameters())
    with torch.no_grad():
        rows = torch.cat([torch.zeros(1, width), torch.eye(width)]).to(reference.device, reference.dtype)
        out = module(rows)
        return (out[1:] - out[:1]).T.to(torch.promote_types(out.dtype, torch.float32))


@contextmanager
def tapped(anatomy: Anatomy, tap: Callable[[int, str, torch.Tensor], Any]) -> Iterator[None]:
    """Call ``tap(layer, role, input)`` whenever an output projection runs; what it returns replaces the input.

    Args:
        anatomy: of the model.
        tap: returns a tensor of the same shape, or None to leave the input alone.
    """

    def hook(layer: int, role: str) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
        def before(module: nn.Module, args: tuple[Any, ...]) -> Any:
            changed = tap(layer, role, args[0])
            return None if changed is None else (changed, *args[1:])

        return before

    handles = []
    try:
        for layer, role, module in output_projections(anatomy):
            handles.append(module.register_forward_pre_hook(hook(layer, role)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def stream_inputs(
    anatomy: Anatomy,
    batches: Iterable[Batch],
    consume: Callable[[int, str, Tokens], None],
    *,
    progress: bool = False,
    description: str = "width",
) -> int:
    """Run the model over the batches and hand over what enters each output projection.

    Nothing is kept: memory does not grow with the data.

    Args:
        anatomy: of the model.
        batches: model-ready dicts.
        consume: called with (layer, role, tokens).
        progress: show a bar.
        description: its label.

    Returns:
        The number of prompts.

    Raises:
        ValueError: for no batches, an all-padding row, NaN or infinite activations, or meta weights.

    Example:
        >>> stream_inputs(anatomy, batches, lambda layer, role, tokens: None)  # doctest: +SKIP
        64
    """
    check_runnable(anatomy.model)
    mask = torch.empty(0)
    prompts = 0

    def tap(layer: int, role: str, hidden: torch.Tensor) -> None:
        tokens = select_tokens(hidden, mask)
        if not tokens.values.isfinite().all():
            raise ValueError(
                f"The input of {role!r} in layer {layer} holds NaN or infinite values. Load the model in bfloat16 or "
                "float32 instead of float16, or leave such samples out."
            )
        consume(layer, role, tokens)

    with evaluating(anatomy.model), tapped(anatomy, tap), torch.no_grad():
        for index, batch in enumerate(tqdm(batches, desc=description, unit="batch", disable=not progress, delay=2)):
            mask = token_mask(batch, index)
            forward(anatomy, batch)
            prompts += len(mask)
    if not prompts:
        raise ValueError("Calibration is empty: no batch came out of it. An iterator can be read only once.")
    return prompts
