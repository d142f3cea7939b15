"""What a model says: its logits by sample, what they predict, and its loss. Nothing is scored here."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from hf_cka.anatomy import Anatomy
from hf_cka.data import Batch
from hf_cka.representations import forward, rows_of


def logits_of(anatomy: Anatomy, batch: Batch) -> torch.Tensor:
    """Return the output of the head, without a loss and without a cache.

    Args:
        anatomy: of the model.
        batch: model-ready.

    Raises:
        ValueError: if the model gives no logits.
    """
    return given_logits(anatomy, getattr(forward(anatomy, batch, head=True), "logits", None))


def given_logits(anatomy: Anatomy, logits: Any) -> torch.Tensor:
    """Return logits if they are there.

    Args:
        anatomy: of the model.
        logits: of its output, or None.

    Raises:
        ValueError: if they are not.
    """
    if not isinstance(logits, torch.Tensor):
        raise ValueError(
            f"{type(anatomy.model).__name__} gives no logits. Load the model with a head that does "
            "(AutoModelForCausalLM, AutoModelForImageClassification), or use 'cka'."
        )
    return logits


def logit_rows(logits: torch.Tensor, batch: Batch, anatomy: Anatomy) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits with the classes last, and which of their positions count.

    Args:
        logits: ``(batch, classes)``, ``(batch, tokens, classes)`` or ``(batch, classes, height, width)``.
        batch: that the model was run on.
        anatomy: of the model.

    Returns:
        ``(batch, classes)`` with a mask ``(batch,)``, or ``(batch, positions, classes)`` with ``(batch, positions)``;
        masks are on the CPU.
    """
    if logits.ndim == 2:
        return logits, torch.ones(len(logits), dtype=torch.bool)
    if logits.ndim > 3:
        logits = logits.flatten(2).transpose(1, 2)
    if is_encoder_decoder(anatomy):  # whichever stack is looked at, the decoder speaks
        return logits, _decoder_mask(batch, logits.shape[:2])
    return rows_of(logits, batch, anatomy)


def probabilities(anatomy: Anatomy, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logarithms of the probabilities that a model gives, and the mask, as :func:`logit_rows`.

    Args:
        anatomy: of the model.
        batch: model-ready.
    """
    logits, mask = logit_rows(logits_of(anatomy, batch), batch, anatomy)
    return logits.float().log_softmax(dim=-1), mask


def is_encoder_decoder(anatomy: Anatomy) -> bool:
    """Return whether a model reads with one stack and writes with another."""
    return bool(getattr(anatomy.model.config, "is_encoder_decoder", False))


def next_tokens(
    anatomy: Anatomy, batch: Batch, logits: torch.Tensor, mask: torch.Tensor, with_labels: bool = False
) -> torch.Tensor | None:
    """Return the token that each position of the logits predicts, ``(batch, tokens)`` on the CPU; -100 where none.

    Args:
        anatomy: of the model.
        batch: that the model was run on.
        logits: of the model.
        mask: ``(batch, tokens)`` of what it read.
        with_labels: predict ``labels`` where there are some; what was read otherwise. An encoder-decoder that gets no
            ``decoder_input_ids`` always predicts them.

    Returns:
        None where the logits predict no next token.
    """
    if logits.ndim != 3 or not any(stack.causal for stack in anatomy.stacks):
        return None
    labels = batch.get("labels")
    ids = batch.get("input_ids")
    if is_encoder_decoder(anatomy):
        ids = batch.get("decoder_input_ids")
        if isinstance(labels, torch.Tensor) and (with_labels or ids is None) and labels.shape == logits.shape[:2]:
            return labels.cpu()  # not shifted: the decoder's input is
        mask = _decoder_mask(batch, logits.shape[:2])
    elif with_labels and labels is not None:
        ids = labels
    if not isinstance(ids, torch.Tensor) or ids.shape != logits.shape[:2] or mask.shape != ids.shape:
        return None
    targets = torch.full(ids.shape, -100)
    targets[:, :-1] = ids.cpu()[:, 1:].where(mask[:, :-1] & mask[:, 1:], -100)
    return targets


def predictions(
    anatomy: Anatomy, batch: Batch, mask: torch.Tensor, with_labels: bool
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Run a model, and return its logits in float32 with the class that each should have; -100 where none.

    Args:
        anatomy: of the model.
        batch: model-ready.
        mask: ``(batch, tokens)``.
        with_labels: read ``labels``: the text to predict, or the classes of an encoder.

    Returns:
        None where the logits predict no next token, and ``labels`` are no classes of theirs.
    """
    logits = logits_of(anatomy, batch).float()
    targets = next_tokens(anatomy, batch, logits, mask, with_labels)
    if targets is not None:
        # the last position has nothing to predict, unless labels say what
        return (logits[:, :-1], targets[:, :-1]) if bool((targets[:, -1] == -100).all()) else (logits, targets)
    labels = batch.get("labels") if with_labels else None
    if isinstance(labels, torch.Tensor) and not labels.is_floating_point() and labels.shape == logits.shape[:-1]:
        return logits, labels
    return None


def own_loss(anatomy: Anatomy, batch: Batch, index: int) -> torch.Tensor:
    """Return the loss that a model itself takes from a batch with ``labels``.

    Args:
        anatomy: of the model.
        batch: model-ready.
        index: of the batch, for the message.

    Raises:
        ValueError: for a batch without labels.
    """
    model: Any = anatomy.model
    if "labels" not in batch:
        raise ValueError(
            f"Batch {index} has no labels, and the loss of {type(model).__name__} needs them. Add a 'labels' "
            "tensor to every batch, or use 'cka' or 'kl'."
        )
    device = next(model.parameters()).device
    inputs = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    return model(**inputs).loss


def _decoder_mask(batch: Batch, shape: torch.Size) -> torch.Tensor:
    mask = batch.get("decoder_attention_mask")
    if isinstance(mask, torch.Tensor) and mask.shape == shape:
        return mask.cpu() != 0
    return torch.ones(shape, dtype=torch.bool)
