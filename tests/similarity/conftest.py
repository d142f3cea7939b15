"""An independent float64 oracle, and features with the defects of real models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch


def _gram(x: torch.Tensor, bandwidth: float | None) -> torch.Tensor:
    if bandwidth is None:
        return x @ x.T
    distance = torch.pdist(x)
    return torch.exp(-torch.cdist(x, x).square() / (2 * (bandwidth * distance.median()) ** 2))


def _oracle(x: torch.Tensor, y: torch.Tensor, estimator: str = "debiased", bandwidth: float | None = None) -> float:
    """Textbook CKA in float64: HKH for the biased value, the HSIC_1 formula of Song et al. for the debiased one."""
    x, y, n = x.double(), y.double(), len(x)
    # HSIC_1 does not see a shift; without it the oracle itself would lose digits on features with a large mean
    k, m = _gram(x - x.mean(0), bandwidth), _gram(y - y.mean(0), bandwidth)
    if estimator == "biased":

        def hsic(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            centred = a - a.mean(0, keepdim=True) - a.mean(1, keepdim=True) + a.mean()
            return (centred * b).sum()  # tr(HKHL)
    else:
        ones = torch.ones(n, dtype=torch.float64)

        def hsic(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            a, b = a - a.diag().diag(), b - b.diag().diag()
            corner = (ones @ a @ ones) * (ones @ b @ ones) / ((n - 1) * (n - 2))
            return (a * b).sum() + corner - 2 / (n - 2) * ((ones @ a) @ (b @ ones))

    return float(hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt())


@pytest.fixture(scope="session")
def oracle() -> Callable[..., float]:
    return _oracle


@pytest.fixture
def stream() -> Callable[..., list[torch.Tensor]]:
    """Layers of a residual stream: each is the one before plus a low-rank update, all ``(n, width)`` float32."""

    def make(n: int, width: int, layers: int, seed: int = 0) -> list[torch.Tensor]:
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(n, width, generator=g)
        out = [x]
        for _ in range(layers - 1):
            rank = max(2, width // 8)
            update = torch.randn(width, rank, generator=g) @ torch.randn(rank, width, generator=g) / width
            x = x + 0.8 * torch.tanh(x @ update + 0.3 * torch.randn(n, width, generator=g))
            out.append(x)
        return out

    return make
