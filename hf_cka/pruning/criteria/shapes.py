"""Dissimilarities between two readouts of the same samples: the voices of the consensus criterion.

All take float64 ``(n_samples, hidden_size)``; all are distances: 0 where nothing changed. Angles and distances are
computed from differences of aligned readouts, never as the arc cosine of a number near 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment

from hf_cka.similarity import pairwise_similarity


def cka_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Return 1 - debiased CKA; NaN where it is undefined.

    Example:
        >>> x = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> abs(cka_distance(x, 3 * x + 1)) < 1e-12
        True
    """
    return 1 - float(pairwise_similarity([x, y], pairs=[(0, 1)], standard_error=False).values[0])


def procrustes_angle(x: torch.Tensor, y: torch.Tensor) -> float:
    """Return the angle between two centred readouts after the best rotation of one: linear shape distance, alpha 1.

    Source: Williams et al. 2021, "Generalized Shape Metrics on Neural Representations".

    Example:
        >>> x = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> procrustes_angle(x, x.flip(1)) < 1e-12
        True
    """
    return _angle_after_rotation(_unit(_centred(x)), _unit(_centred(y)))


def cca_angle(x: torch.Tensor, y: torch.Tensor) -> float:
    """Return the same angle after whitening both: linear shape distance, alpha 0, as in CCA.

    NaN where a readout fills the whole space of the samples, as it does for a width of n - 1 or more: every two
    such readouts are the same to CCA.

    Source: Williams et al. 2021.

    Example:
        >>> x = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> cca_angle(x, x * torch.tensor([1.0, 5.0, 0.1, 2.0])) < 1e-12, cca_angle(x[:4], x[:4])
        (True, nan)
    """
    white = []
    for values in (_centred(x), _centred(y)):
        left, singular, _ = torch.linalg.svd(values, full_matrices=False)
        # readouts come in float32 at most: what is smaller than its rounding is not a direction
        rank = int((singular > singular[0] * max(values.shape) * torch.finfo(torch.float32).eps).sum())
        if rank >= len(values) - 1 or rank == 0:
            return math.nan
        white.append(_unit(left[:, :rank]))
    return _angle_after_rotation(*white)


def permutation_angle(x: torch.Tensor, y: torch.Tensor) -> float:
    """Return the angle after the best permutation of one readout's features.

    Source: Williams et al. 2021.

    Example:
        >>> x = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> permutation_angle(x, x.flip(1)) < 1e-12
        True
    """
    a, b = _unit(_centred(x)), _unit(_centred(y))
    _, columns = linear_sum_assignment((a.T @ b).numpy(), maximize=True)
    return _angle(a - b[:, columns])


def gaussian_distance(x: torch.Tensor, y: torch.Tensor, alpha: float) -> float:
    """Return sqrt(alpha |difference of means|^2 + (2 - alpha) (Bures distance of covariances)^2).

    The Wasserstein distance between the Gaussians of two readouts for ``alpha=1``; only the covariances count for 0,
    only the means for 2. Both readouts live in the coordinates of the same head, so none is rotated.

    Source: Duong et al. 2023, "Representational Dissimilarity Metric Spaces for Stochastic Neural Networks".

    Example:
        >>> x = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> round(gaussian_distance(x, x + 1, alpha=1), 6), round(gaussian_distance(x, x + 1, alpha=0), 6)
        (2.0, 0.0)
    """
    means = float((x.mean(0) - y.mean(0)).square().sum())
    # with X = A R: the Bures distance is |X - O Y|^2 / n after the best rotation O of the samples
    a, b = _few_columns(_centred(x).T).T, _few_columns(_centred(y).T).T
    left, _, right = torch.linalg.svd(a @ b.T)
    covariances = float((left.T @ a - right @ b).square().sum()) / len(x)
    return math.sqrt(alpha * means + (2 - alpha) * covariances)


def wasserstein_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Return the 1-D Wasserstein distance between all values of two readouts.

    Example:
        >>> wasserstein_distance(torch.zeros(3, 2).double(), torch.ones(3, 2).double())
        1.0
    """
    return float((x.flatten().sort().values - y.flatten().sort().values).abs().mean())


@dataclass(frozen=True)
class Dissimilarity:
    """One voice: a name, a distance between readouts, its source."""

    name: str
    distance: Callable[[torch.Tensor, torch.Tensor], float]
    description: str
    source: str


_SHAPE = "Williams et al. 2021, arXiv 2110.14739"
_STOCHASTIC = "Duong et al. 2023, arXiv 2211.11665"


def _gaussian(alpha: float) -> Callable[[torch.Tensor, torch.Tensor], float]:
    return lambda x, y: gaussian_distance(x, y, alpha)


#: the eight voices of arXiv 2411.14345, by name
DISSIMILARITIES: dict[str, Dissimilarity] = {
    entry.name: entry
    for entry in (
        Dissimilarity("cka", cka_distance, "1 - debiased CKA", "Kornblith et al. 2019, arXiv 1905.00414"),
        Dissimilarity("gaussian_0", _gaussian(0), "distance of the covariances (Bures)", _STOCHASTIC),
        Dissimilarity("gaussian_1", _gaussian(1), "Wasserstein distance of the Gaussians", _STOCHASTIC),
        Dissimilarity("gaussian_2", _gaussian(2), "distance of the means", _STOCHASTIC),
        Dissimilarity("permutation", permutation_angle, "angle after the best permutation of features", _SHAPE),
        Dissimilarity("cca", cca_angle, "angle after whitening and the best rotation", _SHAPE),
        Dissimilarity("procrustes", procrustes_angle, "angle after the best rotation", _SHAPE),
        Dissimilarity(
            "wasserstein", wasserstein_distance, "1-D Wasserstein distance of all values", "arXiv 2411.14345"
        ),
    )
}


def by_class(
    distance: Callable[[torch.Tensor, torch.Tensor], float], x: torch.Tensor, y: torch.Tensor, labels: torch.Tensor
) -> float:
    """Return the root of the mean squared distance within each class.

    Args:
        distance: between two readouts.
        x: ``(n, d)``.
        y: ``(n, d)``.
        labels: the class of each sample, ``(n,)``.

    Example:
        >>> x, labels = torch.zeros(4, 1).double(), torch.tensor([0, 0, 1, 1])
        >>> by_class(wasserstein_distance, x, x + 2, labels)
        2.0
    """
    values = [distance(x[labels == label], y[labels == label]) ** 2 for label in labels.unique()]
    return math.sqrt(sum(values) / len(values))


def _centred(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean(0)


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm()


def _few_columns(x: torch.Tensor) -> torch.Tensor:
    """The same rows in fewer coordinates: an isometry of ``(n, d)`` to ``(n, min(n, d))``."""
    return torch.linalg.qr(x.T).R.T if x.shape[0] < x.shape[1] else x


def _angle_after_rotation(a: torch.Tensor, b: torch.Tensor) -> float:
    """The angle between unit matrices after the best rotation of the features of one."""
    a, b = _few_columns(a), _few_columns(b)
    left, _, right = torch.linalg.svd(a.T @ b)
    shared = min(a.shape[1], b.shape[1])
    a, b = a @ left, b @ right.T
    # directions that only one of them has are left over
    squares = [(a[:, :shared] - b[:, :shared]).square(), a[:, shared:].square(), b[:, shared:].square()]
    return 2 * math.asin(math.sqrt(sum(float(part.sum()) for part in squares)) / 2)


def _angle(difference: torch.Tensor) -> float:
    """The angle between two unit matrices from their difference."""
    return 2 * math.asin(float(difference.norm()) / 2)
