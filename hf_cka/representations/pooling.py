"""How the tokens of one sequence become the readout of one sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hf_cka.lookup import lookup

# Attention sinks are the first tokens of a sequence. In SmolLM2 1 % of the tokens carry 99 % of the centred energy,
# so mean and token readouts of decoders leave out this many, unless asked otherwise.
SINK_TOKENS = 4


@dataclass(frozen=True)
class Pooling:
    """How a sequence of tokens becomes the readout of one sample.

    Args:
        kind: ``"last"`` (last non-pad token), ``"cls"`` (first non-pad token), ``"mean"`` (over non-pad tokens) or
            ``"tokens"`` (every non-pad token is a sample of its own; only for streamed statistics).
        skip_first: tokens to leave out at the start of every sequence in ``mean`` and ``tokens``; a sequence that
            is not longer keeps its last token.

    Example:
        >>> Pooling("mean", skip_first=4)
        Pooling(kind='mean', skip_first=4)
    """

    kind: str
    skip_first: int = 0

    def __post_init__(self) -> None:
        lookup(_POOLERS, self.kind, "pooling")
        if self.skip_first < 0:
            raise ValueError(f"skip_first must not be negative, got {self.skip_first}.")
        if self.skip_first and self.kind in ("last", "cls"):
            raise ValueError(f"skip_first={self.skip_first} has no meaning for pooling {self.kind!r}: leave it 0.")


def default_pooling(kind: str) -> Pooling:
    """Return the pooling for an anatomy kind: last token for a ``"decoder"``, masked mean for an ``"encoder"``.

    Example:
        >>> default_pooling("decoder")
        Pooling(kind='last', skip_first=0)
    """
    return Pooling("last") if kind == "decoder" else Pooling("mean")


def resolve_pooling(pooling: str | Pooling, kind: str) -> Pooling:
    """Turn ``"auto"`` or a name into a :class:`Pooling` for an anatomy kind.

    Example:
        >>> resolve_pooling("mean", "decoder")
        Pooling(kind='mean', skip_first=4)
    """
    if isinstance(pooling, Pooling):
        return pooling
    if pooling == "auto":
        return default_pooling(kind)
    skip = SINK_TOKENS if kind == "decoder" and pooling in ("mean", "tokens") else 0
    return Pooling(pooling, skip_first=skip)


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """Return the readouts of one batch.

    Args:
        hidden: ``(batch, tokens, hidden_size)``.
        mask: ``(batch, tokens)``, true where there is a token; padding may be on either side.
        pooling: the rule.

    Returns:
        ``(batch, hidden_size)``, or ``(kept tokens, hidden_size)`` for ``tokens``. Never a view of ``hidden``, which
        would keep all of it in memory.

    Example:
        >>> hidden = torch.arange(6.0).reshape(1, 3, 2)
        >>> pool(hidden, torch.tensor([[True, True, False]]), Pooling("last"))
        tensor([[2., 3.]])
    """
    return _POOLERS[pooling.kind](hidden, mask, pooling.skip_first)


def _kept(mask: torch.Tensor, skip_first: int) -> torch.Tensor:
    """Leave out the first ``skip_first`` tokens of each row; a row that has no more keeps its last token."""
    if not skip_first:
        return mask
    order = mask.long().cumsum(dim=1)
    count = order[:, -1:]
    return mask & ((order > skip_first) | ((count <= skip_first) & (order == count)))


def _last_index(mask: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(mask.shape[1], device=mask.device)
    return (mask.long() * positions).argmax(dim=1)


def _pool_last(hidden: torch.Tensor, mask: torch.Tensor, skip_first: int) -> torch.Tensor:
    return hidden[torch.arange(len(hidden), device=hidden.device), _last_index(mask)]


def _pool_cls(hidden: torch.Tensor, mask: torch.Tensor, skip_first: int) -> torch.Tensor:
    return hidden[torch.arange(len(hidden), device=hidden.device), mask.long().argmax(dim=1)]


def _pool_mean(hidden: torch.Tensor, mask: torch.Tensor, skip_first: int) -> torch.Tensor:
    kept = _kept(mask, skip_first)
    # float32 at least: half precision sums over a long sequence lose the small differences CKA looks at
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    return wide.masked_fill(~kept.unsqueeze(-1), 0).sum(dim=1) / kept.sum(dim=1, keepdim=True)


def _pool_tokens(hidden: torch.Tensor, mask: torch.Tensor, skip_first: int) -> torch.Tensor:
    return hidden[_kept(mask, skip_first)]


_POOLERS: dict[str, Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]] = {
    "last": _pool_last,
    "cls": _pool_cls,
    "mean": _pool_mean,
    "tokens": _pool_tokens,
}
