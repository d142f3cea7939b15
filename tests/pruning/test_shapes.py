"""The dissimilarities of the consensus, against formulas written another way."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch

from hf_cka.pruning.criteria.shapes import (
    DISSIMILARITIES,
    cca_angle,
    gaussian_distance,
    permutation_angle,
    procrustes_angle,
    wasserstein_distance,
)


def readouts(n, d, noise=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, dtype=torch.float64, generator=generator) * torch.linspace(0.2, 2, d)
    return x, x + noise * torch.randn(n, d, dtype=torch.float64, generator=generator) + 0.3


def unit(x):
    x = x - x.mean(0)
    return (x / x.norm()).numpy()


@pytest.mark.parametrize(("n", "d"), [(40, 6), (12, 30)])
def test_procrustes_is_the_nuclear_norm_of_the_cross_covariance(n, d):
    x, y = readouts(n, d)
    expected = math.acos(np.linalg.norm(unit(x).T @ unit(y), "nuc"))
    assert procrustes_angle(x, y) == pytest.approx(expected, rel=1e-9)
    assert procrustes_angle(x, y[:, : d - 2]) == pytest.approx(
        math.acos(np.linalg.norm(unit(x).T @ unit(y[:, : d - 2]), "nuc")), rel=1e-9
    )


def test_cca_is_the_mean_canonical_correlation():
    x, y = readouts(60, 5)
    a, b = (scipy.linalg.orth(unit(v)) for v in (x, y))
    correlations = np.linalg.svd(a.T @ b, compute_uv=False)
    assert cca_angle(x, y) == pytest.approx(math.acos(correlations.mean()), rel=1e-9)
    assert math.isnan(cca_angle(*readouts(12, 30)))


@pytest.mark.parametrize(("n", "d"), [(50, 6), (6, 9)])
@pytest.mark.parametrize("alpha", [0, 1, 2])
def test_gaussian_distance_is_the_one_with_matrix_square_roots(n, d, alpha):
    x, y = readouts(n, d)
    a, b = (np.cov(v.numpy().T, bias=True) for v in (x, y))
    root = scipy.linalg.sqrtm(a).real
    bures = np.trace(a + b) - 2 * np.trace(scipy.linalg.sqrtm(root @ b @ root).real)
    means = float((x.mean(0) - y.mean(0)).square().sum())
    expected = math.sqrt(alpha * means + (2 - alpha) * bures)
    assert gaussian_distance(x, y, alpha) == pytest.approx(expected, rel=1e-5)


def test_permutation_is_the_best_of_all():
    x, y = readouts(30, 5)
    best = max(np.sum(unit(x) * unit(y)[:, list(p)]) for p in itertools.permutations(range(5)))
    assert permutation_angle(x, y) == pytest.approx(math.acos(best), rel=1e-9)


def test_wasserstein_is_that_of_scipy():
    from scipy.stats import wasserstein_distance as oracle

    x, y = readouts(20, 4)
    assert wasserstein_distance(x, y) == pytest.approx(oracle(x.flatten(), y.flatten()), rel=1e-9)


@pytest.mark.parametrize("name", DISSIMILARITIES)
def test_nothing_changed_is_zero_and_more_change_is_farther(name):
    distance = DISSIMILARITIES[name].distance
    x, near = readouts(80, 6, noise=0.01)
    _, far = readouts(80, 6, noise=3)
    near, far = near - 0.25, far + 0.5
    assert distance(x, x) == pytest.approx(0, abs=1e-7)
    assert 1e-6 < distance(x, near) < distance(x, far)
    assert len(DISSIMILARITIES) == 8
