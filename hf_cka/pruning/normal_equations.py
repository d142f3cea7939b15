"""Damped, weighted least squares from statistics that are streamed over batches. No model is known here."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# From strong to weak.
DAMPINGS = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
# Where nothing is held out: what real text chose most often (SmolLM2, 14,000 tokens of WikiText-2).
_BLIND = 0.3


@dataclass(frozen=True)
class Fit:
    """A solution of normal equations.

    Args:
        correction: ``(k, d)``.
        shift: ``(d,)``, or None without an intercept.
        damping: that was used.
        before: mean squared error without the correction.
        after: the same with it, on the data that were fitted.
    """

    correction: torch.Tensor
    shift: torch.Tensor | None
    damping: float
    before: float
    after: float


class NormalEquations:
    """Weighted least squares from streamed statistics, in float64: memory does not grow with the data.

    Args:
        intercept: fit a constant as well.

    Example:
        >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        >>> equations = NormalEquations(intercept=False)
        >>> for part in x.split(20):
        ...     held_out = torch.arange(len(part)) % 4 == 3
        ...     y = part @ torch.tensor([[1.0], [2.0], [3.0]])
        ...     equations.add(part, y, torch.ones(len(part)).double(), held_out)
        >>> equations.solve(damping=1e-9).correction.round(decimals=3).flatten().tolist()
        [1.0, 2.0, 3.0]
        >>> equations.solve().damping  # no noise, so the weakest of all
        0.001
    """

    def __init__(self, intercept: bool) -> None:
        self.fitted, self.held_out = _Moments(intercept), _Moments(intercept)

    def add(
        self, inputs: torch.Tensor, missing: torch.Tensor, weight: torch.Tensor, held_out: torch.Tensor | None = None
    ) -> None:
        """Add one batch: ``(n, k)``, ``(n, d)``, ``(n,)`` and ``(n,)``: true for rows that choose the damping."""
        if held_out is None or not held_out.any():
            self.fitted.add(inputs, missing, weight)
            return
        held_out = held_out.to(inputs.device)
        for moments, rows in ((self.fitted, ~held_out), (self.held_out, held_out)):
            moments.add(inputs[rows], missing[rows], weight[rows])

    def solve(self, damping: float | None = None) -> Fit:
        """Solve for the correction.

        Args:
            damping: of the correction's size, relative to the mean squared input. None takes the one of ``DAMPINGS``
                with which a fit to the other rows explains the held-out ones best, going from strong to weak until it
                explains them less well again; 0.3 where no row was held out.
        """
        if damping is None:
            damping = self._best_damping()
        whole = self.fitted.joined(self.held_out)
        correction, shift = whole.fit(damping)
        return Fit(correction, shift, damping, whole.energy / whole.weight, whole.error(correction, shift))

    def _best_damping(self) -> float:
        if not (self.held_out.weight and self.fitted.weight):
            return _BLIND
        best, least = DAMPINGS[0], math.inf
        for damping in DAMPINGS:
            error = self.held_out.error(*self.fitted.fit(damping))
            if error >= least:
                break
            best, least = damping, error
        return best


class _Moments:
    """Sums over rows, from which a fit and the error of any fit follow."""

    def __init__(self, intercept: bool) -> None:
        self.intercept = intercept
        self.gram: torch.Tensor | float = 0.0
        self.cross: torch.Tensor | float = 0.0
        self.sums: torch.Tensor | float = 0.0
        self.energy = self.weight = 0.0

    def add(self, inputs: torch.Tensor, missing: torch.Tensor, weight: torch.Tensor) -> None:
        root = weight.sqrt().unsqueeze(1)
        # products of one batch in the precision of the activations, sums over batches in float64
        x, y = inputs * root.to(inputs.dtype), missing * root.to(missing.dtype)
        self.gram = self.gram + (x.T @ x).double()
        self.cross = self.cross + (x.T @ y).double()
        self.energy += float(y.double().square().sum())
        self.weight += float(weight.sum())
        if self.intercept:
            together = torch.cat([inputs, missing], dim=1).double()
            self.sums = self.sums + (together * weight.unsqueeze(1)).sum(dim=0)

    def joined(self, other: _Moments) -> _Moments:
        both = _Moments(self.intercept)
        for name in ("gram", "cross", "sums", "energy", "weight"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        return both

    def fit(self, damping: float) -> tuple[torch.Tensor, torch.Tensor | None]:
        gram, cross = torch.as_tensor(self.gram), torch.as_tensor(self.cross)
        k = len(gram)
        if self.intercept:
            mean = torch.as_tensor(self.sums) / self.weight
            gram = gram - self.weight * torch.outer(mean[:k], mean[:k])
            cross = cross - self.weight * torch.outer(mean[:k], mean[k:])
        scale = gram.diagonal().mean()
        if not scale > 0:  # the inputs never move, so there is nothing to fit
            correction = torch.zeros_like(cross)
        else:
            damped = gram + damping * scale * torch.eye(k, dtype=gram.dtype, device=gram.device)
            correction = torch.cholesky_solve(cross, torch.linalg.cholesky(damped))
        return correction, mean[k:] - mean[:k] @ correction if self.intercept else None

    def error(self, correction: torch.Tensor, shift: torch.Tensor | None) -> float:
        """The mean squared error that is left with a correction."""
        gram, cross = torch.as_tensor(self.gram), torch.as_tensor(self.cross)
        left = self.energy + float((correction * (gram @ correction - 2 * cross)).sum())
        if shift is not None:
            sums, k = torch.as_tensor(self.sums), len(gram)
            left += float(shift @ (self.weight * shift + 2 * (sums[:k] @ correction - sums[k:])))
        return left / self.weight
