"""What every measurement of a model shares: evaluation mode put back afterwards, and the device."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hf_cka.representations import evaluating


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Run the block without gradients and with every module in eval mode; put each module's mode back afterwards.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> with measuring(model):
        ...     model.training
        False
        >>> model.training
        True
    """
    with evaluating(model), torch.no_grad():
        yield


def input_device(model: Any) -> torch.device:
    """Return the device that input ids must be on: the embedding's, which ``device_map`` may differ from others'.

    Raises:
        ValueError: if the weights are on the meta device, so that there is nothing to run.
    """
    try:
        embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    except NotImplementedError:  # a model of sound has none
        embedding = None
    parameter = next((embedding if embedding is not None else model).parameters())
    if parameter.device.type == "meta" and not hasattr(embedding, "_hf_hook"):  # a hook means offloaded, not missing
        raise ValueError(
            "The model's weights are on the meta device: there is nothing to measure. Load them first, for example "
            "with from_pretrained(..., device_map='auto')."
        )
    return torch.device("cpu") if parameter.device.type == "meta" else parameter.device


def to_model(model: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return inputs on the model's device; pictures and sound in its precision.

    Args:
        model: any model of transformers.
        inputs: tensors by name.

    Raises:
        ValueError: as :func:`input_device`.

    Example:
        >>> to_model(nn.Linear(2, 2).double(), {"pixel_values": torch.ones(1)})["pixel_values"].dtype
        torch.float64
    """
    device, dtype = input_device(model), next(model.parameters()).dtype
    return {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in inputs.items()}


def check_causal(model: Any, what: str) -> None:
    """Raise ValueError if the model cannot continue a text, naming its class and what needed it."""
    config = getattr(model, "config", None)
    can_generate = model.can_generate() if hasattr(model, "can_generate") else True
    if getattr(config, "is_encoder_decoder", False) or not can_generate:
        raise ValueError(
            f"{what} needs a causal language model (AutoModelForCausalLM), but {type(model).__name__} is none."
        )


def context_limit(model: Any) -> int | None:
    """Return how many positions the model knows, or None if its config does not say."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text, "max_position_embeddings", None)
    return int(limit) if limit else None


def filler_id(tokenizer: Any) -> int:
    """Return a token to pad with, where padding is masked or cut off: the pad token, the end token, or 0."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(token for token in candidates if token is not None))


def cache_reader(model: Any) -> Callable[[Any], dict[str, Any]]:
    """Return what turns the output of a forward pass into the arguments that go on from its key/value cache.

    transformers 5.24 renamed ``past_key_values`` to ``cache``, in outputs and in arguments; a model with code of its
    own may know the old argument only. Without a cache in the output there are no arguments.

    Args:
        model: any causal language model.

    Example:
        >>> cache_of = cache_reader(model)  # doctest: +SKIP
        >>> model(input_ids=token, use_cache=True, **cache_of(model(input_ids=ids, use_cache=True)))  # doctest: +SKIP
    """
    by_old_name = "past_key_values" in inspect.signature(model.forward).parameters

    def read(output: Any) -> dict[str, Any]:
        held = set(output.keys())  # asking the output itself for the old name warns
        field = next((name for name in ("cache", "past_key_values") if name in held), None)
        if field is None:
            return {}
        return {"past_key_values" if by_old_name else field: output[field]}

    return read
