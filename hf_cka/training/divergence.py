"""How far a student is from its teacher: losses of tensors. No model and no Trainer is known here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# Rows of logits that are turned into float32 probabilities at once.
_ROWS = 512


def teacher_divergence(
    student: torch.Tensor, teacher: torch.Tensor, keep: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Return the Kullback-Leibler divergence of a student from its teacher, summed over positions, in nats.

    Probabilities are made in float32 and few rows at a time, in the backward pass as well, so that memory stays at
    that of the logits.

    Args:
        student: logits, ``(..., classes)``.
        teacher: logits of the same shape.
        keep: ``(...)``, true where a position counts.
        temperature: of both.

    Source: logit distillation as in Minitron (arXiv 2407.14679).

    Example:
        >>> logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]])
        >>> float(teacher_divergence(logits, logits, torch.tensor([True, True])))
        0.0
    """

    def part(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        theirs = F.log_softmax(theirs.float() / temperature, dim=-1)
        return _divergence(F.log_softmax(mine.float() / temperature, dim=-1), theirs, temperature)

    return _in_parts(part, student[keep], teacher[keep])


def top_divergence(
    student: torch.Tensor, teacher: torch.Tensor, indices: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Return the divergence over a teacher's most likely classes, all others taken as one, summed, in nats.

    It is at most that over all classes, and equal where student and teacher share out the others alike.

    Args:
        student: logits, ``(positions, classes)``.
        teacher: log-probabilities from `most_likely`, ``(positions, k + 1)``, at the same temperature.
        indices: of the classes, ``(positions, k)``.
        temperature: of both.

    Example:
        >>> logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
        >>> float(top_divergence(logits, *most_likely(logits.log_softmax(-1), k=2)))
        0.0
    """

    def part(mine: torch.Tensor, theirs: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        mine = F.log_softmax(mine.float() / temperature, dim=-1)
        return _divergence(_with_rest(mine, chosen), theirs, temperature)

    return _in_parts(part, student, teacher, indices)


def most_likely(log_probabilities: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k largest log-probabilities with, in a last column, that of all others together; and their indices.

    Args:
        log_probabilities: ``(positions, classes)``.
        k: below the number of classes.

    Example:
        >>> values, indices = most_likely(torch.tensor([[0.5, 0.25, 0.25]]).log(), k=1)
        >>> values.exp(), indices
        (tensor([[0.5000, 0.5000]]), tensor([[0]]))
    """
    indices = log_probabilities.topk(k, dim=-1).indices
    return _with_rest(log_probabilities, indices), indices


def _with_rest(log_probabilities: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    rest = log_probabilities.scatter(1, indices, float("-inf")).logsumexp(dim=1, keepdim=True)
    return torch.cat([log_probabilities.gather(1, indices), rest], dim=1)


def _divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    return F.kl_div(student, teacher, log_target=True, reduction="sum") * temperature**2


def _in_parts(part: Callable[..., torch.Tensor], student: torch.Tensor, *teacher: torch.Tensor) -> torch.Tensor:
    """Sum over a few rows at a time, whose float32 copies are made again in the backward pass."""
    total = student.new_zeros((), dtype=torch.float32)
    for rows in zip(*(tensor.split(_ROWS) for tensor in (student, *teacher)), strict=True):
        total = total + checkpoint(part, *rows, use_reentrant=False)
    return total


def hidden_difference(
    student: tuple[torch.Tensor, ...], teacher: tuple[torch.Tensor, ...], layers: Mapping[int, int], mask: torch.Tensor
) -> torch.Tensor:
    """Return the mean squared difference of hidden states, relative to the teacher's mean square, over layers.

    Args:
        student: hidden states, the embedding's first.
        teacher: likewise.
        layers: student's layer -> teacher's.
        mask: ``(batch, tokens)``, true where there is a token.
    """
    # the last entry comes after the final norm, so the last layer is left out
    pairs = [(student[i + 1][mask], teacher[j + 1][mask]) for i, j in layers.items() if i + 2 < len(student)]
    parts = [(a.float() - b.float()).square().mean() / b.float().square().mean() for a, b in pairs]
    return torch.stack(parts).mean() if parts else student[0].new_zeros(())
