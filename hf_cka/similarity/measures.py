"""Similarity measures of one signature, ``(x, y) -> float``, behind one table.

All take ``x (n, p)`` and ``y (n, q)``, rows being the same samples, and compute in float64. Each entry says whether
higher means more similar, and what leaves it unchanged: never mix two without looking.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hf_cka.lookup import lookup
from hf_cka.similarity.features import check_features, column_mean, exact_math
from hf_cka.similarity.pairwise import cka

# Share of the variance that SVCCA keeps (Raghu et al. 2017).
_SVCCA_VARIANCE = 0.99


@dataclass(frozen=True)
class Measure:
    """A similarity or dissimilarity measure; call it as ``measure(x, y)``.

    Attributes:
        name: its name in `MEASURES`.
        function: ``(x, y) -> float``.
        higher_is_similar: True for similarities, False for distances.
        needs_same_width: whether x and y must live in the same coordinates.
        range: the lowest and the highest value.
        invariances: what may be done to x alone without changing the value.
        source: where it is defined.

    Example:
        >>> measure("angular").higher_is_similar, measure("cka").higher_is_similar
        (False, True)
    """

    name: str
    function: Callable[[Any, Any], float]
    higher_is_similar: bool
    needs_same_width: bool
    range: tuple[float, float]
    invariances: tuple[str, ...]
    source: str

    def __call__(self, x: Any, y: Any) -> float:
        return self.function(x, y)


def measure(name: str) -> Measure:
    """Return a measure by name.

    Args:
        name: one of `MEASURES`.

    Raises:
        ValueError: for an unknown name; the message lists near ones.

    Example:
        >>> x = torch.eye(6)
        >>> round(measure("procrustes")(x, 2 * x), 6)
        1.0
        >>> measure("proscrutes")
        Traceback (most recent call last):
        ValueError: Unknown similarity measure 'proscrutes'. Did you mean: 'procrustes'?
    """
    return lookup(MEASURES, name, "similarity measure")


def cka_biased(x: Any, y: Any) -> float:
    """Return biased linear CKA, see `cka`.

    Example:
        >>> round(cka_biased(torch.eye(6), torch.eye(6)), 6)
        1.0
    """
    return cka(x, y, estimator="biased")


def rbf_cka(x: Any, y: Any) -> float:
    """Return debiased CKA with the RBF kernel of 0.8 times the median distance, see `cka`.

    Example:
        >>> x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
        >>> round(rbf_cka(x, x), 6)
        1.0
    """
    return cka(x, y, kernel="rbf")


def block_influence(x: Any, y: Any) -> float:
    """Return the mean of ``1 - cos(x_s, y_s)`` over samples: 0 (same directions) to 2; a dissimilarity.

    Args:
        x: features before a block, ``(n, d)``.
        y: features after it, ``(n, d)``.

    Raises:
        ValueError: for unequal shapes, NaN or infinite values, or a sample whose features are all zero.

    Source: Men et al. 2024, "ShortGPT".

    Example:
        >>> block_influence(torch.eye(3), -torch.eye(3))
        2.0
    """
    left, right = _same_width(x, y)
    # 1 - cos = |u - v|^2 / 2 for unit vectors: exact for nearly equal ones, where the dot product would cancel
    return float((left - right).square().sum(1).mean() / 2)


def angular(x: Any, y: Any) -> float:
    """Return the mean of ``arccos(cos(x_s, y_s)) / pi`` over samples: 0 (same directions) to 1; a dissimilarity.

    Args:
        x: features before a block, ``(n, d)``.
        y: features after it, ``(n, d)``.

    Raises:
        ValueError: as `block_influence`.

    Source: Gromov et al. 2024, "The Unreasonable Ineffectiveness of the Deeper Layers".

    Example:
        >>> round(angular(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]])), 6)
        0.5
    """
    left, right = _same_width(x, y)
    # Kahan's form: exact for small angles, where arccos of a rounded cosine is not
    angle = 2 * torch.atan2((left - right).norm(dim=1), (left + right).norm(dim=1))
    return float(angle.mean() / torch.pi)


def rsa(x: Any, y: Any) -> float:
    """Return the Pearson correlation of the two sets of pairwise Euclidean distances: -1 to 1; a similarity.

    Args:
        x: features ``(n, p)``.
        y: features ``(n, q)``.

    Raises:
        ValueError: for fewer than 3 samples, NaN or infinite values, or distances that are all equal.

    Source: Kriegeskorte et al. 2008, "Representational similarity analysis", with Euclidean distances.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [3.0]])
        >>> round(rsa(x, 5 * x), 6)
        1.0
    """
    return _correlation(*_distances(x, y))


def rsa_spearman(x: Any, y: Any) -> float:
    """Return the Spearman rank correlation of the two sets of pairwise distances; otherwise as `rsa`.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [3.0]])
        >>> round(rsa_spearman(x, x**3), 6)
        1.0
    """
    from scipy.stats import rankdata

    left, right = (torch.from_numpy(rankdata(side.cpu().numpy())) for side in _distances(x, y))
    return _correlation(left, right)


def procrustes(x: Any, y: Any) -> float:
    """Return ``|X'Y|_* / (|X|_F |Y|_F)`` of the centred features: 0 to 1; a similarity.

    It is the cosine of the angle that the best rotation leaves between the two; its arc cosine is the Procrustes
    shape distance. Far from 0 for unrelated features unless n is much larger than the widths: see
    `permutation_null`.

    Args:
        x: features ``(n, p)``.
        y: features ``(n, q)``.

    Raises:
        ValueError: for fewer than 2 samples, NaN or infinite values, or constant features.

    Source: Williams et al. 2021, "Generalized Shape Metrics on Neural Representations"; Ding et al. 2021.

    Example:
        >>> x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
        >>> round(procrustes(x, x[:, [2, 0, 1]]), 6)
        1.0
    """
    (ux, sx), (uy, sy) = _decompose(x, y)
    nuclear = torch.linalg.svdvals((ux * sx).T @ (uy * sy)).sum()
    return float(nuclear / (sx.norm() * sy.norm()))


def cca(x: Any, y: Any) -> float:
    """Return the mean canonical correlation over the smaller rank: 0 to 1; a similarity.

    Once the ranks add up to more than n - 1, some correlations are 1 for anything, and all of them when a width
    reaches n: it needs n far above the widths, see `permutation_null`.

    Args:
        x: features ``(n, p)``.
        y: features ``(n, q)``.

    Raises:
        ValueError: as `procrustes`.

    Source: Hotelling 1936; the mean as in Raghu et al. 2017.

    Example:
        >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        >>> round(cca(x, x @ torch.tensor([[1.0, 2, 3], [0, 1, 4], [0, 0, 9]])), 6)
        1.0
    """
    (ux, _), (uy, _) = _decompose(x, y)
    return float(torch.linalg.svdvals(ux.T @ uy).mean())


def svcca(x: Any, y: Any) -> float:
    """Return `cca` of the leading principal components that hold 99 % of each variance.

    Source: Raghu et al. 2017, "SVCCA".

    Example:
        >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        >>> round(svcca(x, 7 * x - 2), 6)
        1.0
    """
    (ux, sx), (uy, sy) = _decompose(x, y)
    kept = []
    for u, s in ((ux, sx), (uy, sy)):
        variance = s.square().cumsum(0) / s.square().sum()
        kept.append(u[:, : int((variance < _SVCCA_VARIANCE).sum()) + 1])
    return float(torch.linalg.svdvals(kept[0].T @ kept[1]).mean())


def pwcca(x: Any, y: Any) -> float:
    """Return the canonical correlations averaged by how much of x each direction carries: 0 to 1; not symmetric.

    Source: Morcos et al. 2018, "Insights on representational similarity with CCA".

    Example:
        >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        >>> round(pwcca(x, x), 6)
        1.0
    """
    (ux, _), (uy, _) = _decompose(x, y)
    left, correlations, _ = torch.linalg.svd(ux.T @ uy, full_matrices=False)
    original = column_centred(x)
    weights = ((ux @ left).T @ original).abs().sum(1)
    return float((weights * correlations).sum() / weights.sum())


def column_centred(x: Any, index: int = 0) -> torch.Tensor:
    """Return the features minus their column means, float64 ``(n, d)``.

    Args:
        x: features ``(n, d)``.
        index: the number of the layer, for the error message.

    Raises:
        ValueError: for NaN or infinite values.

    Example:
        >>> column_centred(torch.tensor([[1.0], [3.0]])).tolist()
        [[-1.0], [1.0]]
    """
    (tensor,) = check_features([x], 1, "")
    return tensor.double() - column_mean(tensor, index)


def _same_width(x: Any, y: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Check that rows are comparable, and return them as float64 unit vectors."""
    left, right = check_features([x, y], 1, "needs at least 1.")
    if left.shape != right.shape:
        raise ValueError(
            f"x has width {left.shape[1]} and y {right.shape[1]}; this measure compares the same coordinates. "
            "Use 'cka' or 'procrustes' for layers of different width."
        )
    out = []
    for i, tensor in enumerate((left, right)):
        column_mean(tensor, i)
        tensor = tensor.double()
        norm = tensor.norm(dim=1, keepdim=True)
        zero = (norm == 0).nonzero()
        if len(zero):
            raise ValueError(f"Sample {int(zero[0, 0])} of {'xy'[i]} is all zero and has no direction; leave it out.")
        out.append(tensor / norm)
    return out[0], out[1].to(out[0].device)


def _distances(x: Any, y: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both sets of pairwise distances, float64 ``(n (n-1) / 2,)``."""
    check_features([x, y], 3, "RSA needs at least 3. Use more samples.")
    out = []
    with exact_math():
        for i, side in enumerate((x, y)):
            centred = column_centred(side, i)
            n = len(centred)
            rows, cols = torch.triu_indices(n, n, offset=1, device=centred.device)
            # differences of rows, not expanded squares: no cancellation, and equal rows are at distance 0 exactly
            distances = torch.cdist(centred, centred, compute_mode="donot_use_mm_for_euclid_dist")[rows, cols]
            if distances.max() == distances.min():
                raise ValueError(f"RSA is undefined: all samples of {'xy'[i]} are equally far from each other.")
            out.append(distances)
    return out[0], out[1].to(out[0].device)


def _correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / (a.norm() * b.norm()))


def _decompose(x: Any, y: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return left singular vectors and values of both centred features, cut at the numerical rank."""
    x, y = check_features([x, y], 2, "this measure needs at least 2. Use more samples.")
    out = []
    with exact_math():
        for i, side in enumerate((x, y)):
            centred = column_centred(side, i).to(x.device)
            u, s, _ = torch.linalg.svd(centred, full_matrices=False)
            # directions below the rounding of the features as they came are noise, which CCA would count like any other
            eps = max(torch.finfo(side.dtype).eps, max(centred.shape) * torch.finfo(torch.float64).eps)
            rank = int((s > eps * float(side.double().norm())).sum())
            if rank == 0:
                raise ValueError(
                    f"{'xy'[i]} is constant over the {len(side)} samples, or varies by rounding only; leave it out."
                )
            out.append((u[:, :rank], s[:rank]))
    return out


_SHAPE = ("rotation", "scale", "shift")
_LINEAR = ("invertible linear map", "shift")

MEASURES: dict[str, Measure] = {
    m.name: m
    for m in (
        Measure("cka", cka, True, False, (-1, 1), _SHAPE, "Kornblith et al. 2019; Song et al. 2012"),
        Measure("cka_biased", cka_biased, True, False, (0, 1), _SHAPE, "Kornblith et al. 2019"),
        Measure("rbf_cka", rbf_cka, True, False, (-1, 1), _SHAPE, "Kornblith et al. 2019"),
        Measure("block_influence", block_influence, False, True, (0, 2), ("scale per sample",), "Men et al. 2024"),
        Measure("angular", angular, False, True, (0, 1), ("scale per sample",), "Gromov et al. 2024"),
        Measure("rsa", rsa, True, False, (-1, 1), _SHAPE, "Kriegeskorte et al. 2008"),
        Measure("rsa_spearman", rsa_spearman, True, False, (-1, 1), _SHAPE, "Kriegeskorte et al. 2008"),
        Measure("procrustes", procrustes, True, False, (0, 1), _SHAPE, "Williams et al. 2021"),
        Measure("cca", cca, True, False, (0, 1), _LINEAR, "Hotelling 1936; Raghu et al. 2017"),
        Measure("svcca", svcca, True, False, (0, 1), _SHAPE, "Raghu et al. 2017"),
        Measure("pwcca", pwcca, True, False, (0, 1), ("scale", "shift"), "Morcos et al. 2018"),
    )
}
