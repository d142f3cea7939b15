"""Every measure: known answers, an independent formula, its invariances, and its null."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import linalg, stats
from scipy.spatial.distance import pdist

from hf_cka.similarity import MEASURES, RBF, cka, measure, permutation_null

SIMILARITIES = [name for name, m in MEASURES.items() if m.higher_is_similar]
DISTANCES = [name for name, m in MEASURES.items() if not m.higher_is_similar]


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    """Related features, 80 samples, equal width."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(80, 6, generator=g, dtype=torch.float64) * torch.tensor([5.0, 3, 2, 1, 1, 0.5])
    return x, torch.tanh(x @ torch.randn(6, 6, generator=g, dtype=torch.float64)) + x


def rotation(width: int, seed: int = 1) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, generator=g, dtype=torch.float64))[0]


def cosines(x, y):
    return [float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in zip(x, y, strict=True)]


def canonical_correlations(x, y):
    """By principal angles, from scipy."""
    return np.cos(linalg.subspace_angles(x - x.mean(0), y - y.mean(0)))


def best_rotation(x, y):
    """Through scipy's solver of the orthogonal Procrustes problem: tr(R'X'Y) is the nuclear norm."""
    x, y = x - x.mean(0), y - y.mean(0)
    return linalg.orthogonal_procrustes(x, y)[1] / np.linalg.norm(x) / np.linalg.norm(y)


def principal(x):
    x = x - x.mean(0)
    values, vectors = np.linalg.eigh(x.T @ x)
    values, vectors = values[::-1], vectors[:, ::-1]
    return x @ vectors[:, : int(np.searchsorted(np.cumsum(values) / values.sum(), 0.99)) + 1]


def projection_weighted(x, y):
    """Morcos et al.: the canonical variates of x, weighted by how much they project on its neurons."""
    x, y = x - x.mean(0), y - y.mean(0)
    qx, qy = np.linalg.qr(x)[0], np.linalg.qr(y)[0]
    u, s, _ = np.linalg.svd(qx.T @ qy)
    weights = np.abs((qx @ u).T @ x).sum(1)
    return (weights * s).sum() / weights.sum()


FORMULAS = {
    "block_influence": lambda x, y: 1 - np.mean(cosines(x, y)),
    "angular": lambda x, y: np.mean(np.arccos(cosines(x, y))) / np.pi,
    "rsa": lambda x, y: stats.pearsonr(pdist(x), pdist(y)).statistic,
    "rsa_spearman": lambda x, y: stats.spearmanr(pdist(x), pdist(y)).statistic,
    "procrustes": best_rotation,
    "cca": lambda x, y: np.mean(canonical_correlations(x, y)),
    "svcca": lambda x, y: np.mean(canonical_correlations(principal(x), principal(y))),
    "pwcca": projection_weighted,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_measure_equals_an_independent_formula(name, pair):
    x, y = pair
    assert measure(name)(x, y) == pytest.approx(FORMULAS[name](x.numpy(), y.numpy()), abs=1e-9)


def test_cka_measures_are_cka(pair, oracle):
    x, y = pair
    assert measure("cka")(x, y) == pytest.approx(oracle(x, y), abs=1e-9)
    assert measure("cka_biased")(x, y) == pytest.approx(oracle(x, y, "biased"), abs=1e-9)
    assert measure("rbf_cka")(x, y) == pytest.approx(cka(x, y, kernel=RBF(0.8)), abs=1e-12)
    assert set(MEASURES) == {*FORMULAS, "cka", "cka_biased", "rbf_cka"}


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_identity_is_the_best_value(name, dtype, pair):
    x = pair[0].to(dtype)
    low, high = MEASURES[name].range
    assert measure(name)(x, x) == pytest.approx(high if MEASURES[name].higher_is_similar else low, abs=1e-9)


@pytest.mark.parametrize("name", MEASURES)
def test_value_stays_in_its_range_and_below_identity(name, pair):
    x, y = pair
    low, high = MEASURES[name].range
    value = measure(name)(x, y)
    assert low <= value <= high
    assert abs(value - measure(name)(x, x)) > 0.01


CHANGES = {
    "rotation": lambda x: x @ rotation(x.shape[1]),
    "scale": lambda x: 7 * x,
    "shift": lambda x: x + torch.arange(x.shape[1]),
    "scale per sample": lambda x: x * torch.arange(1, len(x) + 1)[:, None],
    "invertible linear map": lambda x: x @ (rotation(x.shape[1]) * torch.arange(1, x.shape[1] + 1)),
}


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("change", CHANGES)
def test_measure_is_invariant_to_what_it_says_and_to_nothing_else(name, change, pair):
    x, y = pair
    before, after = measure(name)(x, y), measure(name)(CHANGES[change](x), y)
    promised = set(MEASURES[name].invariances)
    # a scale for all samples is a case of one per sample; rotation and scale are cases of a linear map
    implied = {"scale per sample": {"scale"}, "invertible linear map": {"rotation", "scale"}}
    promised |= set().union(*(implied.get(p, set()) for p in promised))
    assert (before == pytest.approx(after, abs=1e-9)) == (change in promised)


@pytest.mark.parametrize("name", MEASURES)
def test_order_of_samples_does_not_matter_but_their_pairing_does(name, pair):
    x, y = pair
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    function = measure(name)
    assert function(x[order], y[order]) == pytest.approx(function(x, y), abs=1e-9)
    worse = function(x[order], y)
    assert worse < function(x, y) if function.higher_is_similar else worse > function(x, y)


@pytest.mark.parametrize("name", [n for n in MEASURES if not MEASURES[n].needs_same_width])
def test_widths_may_differ(name, pair):
    x, y = pair
    assert measure(name)(x, y[:, :3]) < measure(name)(x, x)


@pytest.mark.parametrize("name", MEASURES)
def test_unrelated_features_look_like_their_null(name):
    g = torch.Generator().manual_seed(5)
    x, y = torch.randn(64, 20, generator=g), torch.randn(64, 20, generator=g)
    null = permutation_null(name, x, y, permutations=40)
    assert null.p_value > 0.02
    assert abs(null.observed - null.mean) < 4 * null.std
    assert null.mean == pytest.approx(null.values.mean())
    assert len(null.values) == 40


def test_nulls_tell_which_measures_start_from_zero():
    """At n=64 and width 20, CKA and RSA start from 0, Procrustes and CCA far above."""
    g = torch.Generator().manual_seed(5)
    x, y = torch.randn(64, 20, generator=g), torch.randn(64, 20, generator=g)
    means = {name: permutation_null(name, x, y, permutations=30).mean for name in SIMILARITIES}
    for name in ("cka", "rbf_cka", "rsa", "rsa_spearman"):
        assert abs(means[name]) < 0.03
    for name in ("procrustes", "cca", "svcca", "pwcca"):
        assert means[name] > 0.3


@pytest.mark.parametrize("name", MEASURES)
def test_related_features_leave_their_null(name, pair):
    null = permutation_null(name, *pair, permutations=39)
    assert null.p_value == 1 / 40
    assert (null.observed > null.mean) == MEASURES[name].higher_is_similar


def test_null_is_the_same_for_the_same_seed_and_takes_any_function(pair):
    x, y = pair
    first, second = (permutation_null("rsa", x, y, permutations=5, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.values, second.values)
    assert not np.array_equal(first.values, permutation_null("rsa", x, y, permutations=5, seed=4).values)
    own = permutation_null(lambda a, b: measure("rsa")(a, b), x, y, permutations=5, seed=3)
    np.testing.assert_array_equal(own.values, first.values)
    with pytest.raises(ValueError, match="permutations=0"):
        permutation_null("rsa", x, y, permutations=0)


def test_small_angles_are_exact():
    """A layer that hardly changes its input: 1 - cos in float32 would be 0 or noise."""
    x = torch.zeros(10, 2, dtype=torch.float64)
    x[:, 0] = 1
    y = x.clone()
    y[:, 1] = 1e-9
    assert measure("angular")(x, y) == pytest.approx(1e-9 / math.pi, rel=1e-6)
    assert measure("block_influence")(x, y) == pytest.approx(0.5e-18, rel=1e-6)


def test_cca_ignores_directions_that_are_rounding_noise(pair):
    x, y = pair
    doubled = torch.cat([x, x @ rotation(6)], dim=1)
    noisy = doubled.float()  # the copy is exact in float64 only: float32 leaves noise in 6 directions
    assert measure("cca")(noisy, y) == pytest.approx(measure("cca")(x, y), abs=1e-4)


@pytest.mark.parametrize("name", MEASURES)
def test_constant_features_are_an_error_or_a_plain_number(name, pair):
    x, _ = pair
    constant = torch.ones_like(x)
    if name in DISTANCES:  # per sample: nothing is estimated from the spread
        assert 0 < measure(name)(x, constant) < 2
    else:
        with pytest.raises(ValueError, match="constant|equally far"):
            measure(name)(x, constant)


@pytest.mark.parametrize("name", MEASURES)
def test_nan_is_named(name, pair):
    x, y = pair
    y = y.clone()
    y[4, 2] = float("nan")
    with pytest.raises(ValueError, match="1 NaN or infinite value .*sample 4, feature 2"):
        measure(name)(x, y)


def test_bad_input_is_named_with_its_fix(pair):
    x, y = pair
    with pytest.raises(ValueError, match="Unknown similarity measure 'prokrustes'. Did you mean: 'procrustes'"):
        measure("prokrustes")
    for name in DISTANCES:
        with pytest.raises(ValueError, match="x has width 6 and y 3.*'procrustes'"):
            measure(name)(x, y[:, :3])
        with pytest.raises(ValueError, match="Sample 0 of y is all zero"):
            measure(name)(x, torch.zeros_like(x))
    with pytest.raises(ValueError, match=r"features\[1\] has 79 samples"):
        measure("rsa")(x, y[:79])
    with pytest.raises(ValueError, match="1 sample: this measure needs at least 2"):
        measure("cca")(x[:1], y[:1])
