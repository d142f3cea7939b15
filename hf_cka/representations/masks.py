"""Hidden states of any model as (samples, positions, features), and which positions hold something.

Text is (batch, tokens, features) already; pictures come as maps of channels, sound as frames, and some models put time
first or pack all samples of a batch into one row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hf_cka.data import Batch, batch_rows

if TYPE_CHECKING:
    from hf_cka.anatomy import Anatomy


def rows_of(hidden: torch.Tensor, batch: Batch, anatomy: Anatomy) -> tuple[torch.Tensor, torch.Tensor]:
    """Return hidden states by sample, and which of their positions count.

    Args:
        hidden: what flows through a layer: ``(batch, tokens, features)``, ``(batch, channels, height, width)``, time
            first, windows of pictures, or all samples in one row.
        batch: that the model was run on.
        anatomy: of the stack that the hidden states flow through.

    Returns:
        ``(samples, positions, features)``, and a mask ``(samples, positions)`` on the CPU.

    Example:
        >>> from types import SimpleNamespace
        >>> rows, mask = rows_of(torch.zeros(2, 8, 3, 3), {"pixel_values": torch.zeros(2, 3, 9, 9)},
        ...                      SimpleNamespace(layers_path="encoder.layers"))
        >>> rows.shape, mask.shape
        (torch.Size([2, 9, 8]), torch.Size([2, 9]))
    """
    hidden = _by_sample(hidden, batch_rows(batch))
    shape = hidden.shape[:2]
    names = ("decoder_attention_mask",) if _decodes(batch, anatomy) else ("attention_mask", "decoder_attention_mask")
    for name in names:
        mask = batch.get(name)
        if isinstance(mask, torch.Tensor) and mask.shape == shape:
            return hidden, mask.cpu() != 0
    return hidden, torch.ones(shape, dtype=torch.bool)


def _decodes(batch: Batch, anatomy: Anatomy) -> bool:
    return "decoder_input_ids" in batch and "decoder" in anatomy.layers_path


def _by_sample(hidden: torch.Tensor, rows: int) -> torch.Tensor:
    if hidden.ndim == 4:
        last = hidden.shape[1] == hidden.shape[2] != hidden.shape[3]
        hidden = hidden.flatten(1, 2) if last else hidden.flatten(2).transpose(1, 2)
    elif hidden.ndim > 4:
        hidden = hidden.flatten(1, -2)
    elif hidden.ndim == 2:
        return hidden.reshape(rows, -1, hidden.shape[-1]) if len(hidden) % rows == 0 else hidden.unsqueeze(0)
    if len(hidden) == rows or (rows % len(hidden) == 0 and len(hidden) > 1):
        return hidden
    if hidden.shape[1] == rows:
        return hidden.transpose(0, 1)
    if (hidden.shape[0] * hidden.shape[1]) % rows == 0:
        return hidden.reshape(rows, -1, hidden.shape[-1])
    return hidden
