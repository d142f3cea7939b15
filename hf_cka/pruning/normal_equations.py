"""Damped, weighted least squares from statistics that are streamed over batches. No model is known here."""

from __future__ import annotations

import torch


class NormalEquations:
    """Weighted least squares from streamed statistics, in float64: memory does not grow with the data.

    Args:
        intercept: fit a constant as well.

    Example:
        >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        >>> equations = NormalEquations(intercept=False)
        >>> for part in x.split(20):
        ...     equations.add(part, part @ torch.tensor([[1.0], [2.0], [3.0]]), torch.ones(len(part)).double())
        >>> equations.solve(damping=1e-9)[0].round(decimals=3).flatten().tolist()
        [1.0, 2.0, 3.0]
    """

    def __init__(self, intercept: bool) -> None:
        self.intercept = intercept
        self.gram: torch.Tensor | float = 0.0
        self.cross: torch.Tensor | float = 0.0
        self.energy = self.weight = 0.0
        self.sums: torch.Tensor | float = 0.0

    def add(self, inputs: torch.Tensor, missing: torch.Tensor, weight: torch.Tensor) -> None:
        """Add one batch: ``(n, k)``, ``(n, d)`` and ``(n,)``."""
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

    def solve(self, damping: float) -> tuple[torch.Tensor, torch.Tensor | None, float, float]:
        """Return the correction ``(k, d)``, the constant ``(d,)`` or None, and the error before and after.

        Args:
            damping: of the correction's size, relative to the mean squared input.
        """
        gram, cross, energy = torch.as_tensor(self.gram), torch.as_tensor(self.cross), self.energy
        k = len(gram)
        mean = torch.as_tensor(self.sums) / self.weight if self.intercept else torch.zeros(k + cross.shape[1])
        mean = mean.to(gram)
        if self.intercept:
            gram = gram - self.weight * torch.outer(mean[:k], mean[:k])
            cross = cross - self.weight * torch.outer(mean[:k], mean[k:])
            energy = energy - self.weight * float(mean[k:].square().sum())
        scale = gram.diagonal().mean()
        if not scale > 0:  # the inputs never move, so there is nothing to fit
            correction = torch.zeros_like(cross)
        else:
            damped = gram + damping * scale * torch.eye(k, dtype=gram.dtype, device=gram.device)
            correction = torch.cholesky_solve(cross, torch.linalg.cholesky(damped))
        shift = mean[k:] - mean[:k] @ correction if self.intercept else None
        after = energy + float((correction * (gram @ correction - 2 * cross)).sum())
        return correction, shift, self.energy / self.weight, after / self.weight
