"""From sums of products to CKA values, their standard error, and a verdict on each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hf_cka.similarity.engine import Pair


@dataclass(frozen=True)
class Products:
    """The sums that both estimators are made of; arrays are float64, NaN where a layer is not usable.

    Attributes:
        u_self: ``(L,)`` <U(K), U(K)> per layer.
        u_pair: ``(P,)`` <U(K), U(L)> per pair.
        cross_self: ``(L,)`` inner product of the energies (diagonal of HKH) with themselves.
        cross_pair: ``(P,)`` inner product of the two energies.
        energy: ``(L,)`` summed energies.
        n: the number of samples; below 4, ``u_*`` are the whole inner products and there is nothing to debias.
    """

    u_self: np.ndarray
    u_pair: np.ndarray
    cross_self: np.ndarray
    cross_pair: np.ndarray
    energy: np.ndarray
    n: int


@dataclass(frozen=True)
class Estimates:
    """Both estimators per pair, and per layer ``kappa`` (biased over debiased self product) and participation ratio."""

    biased: np.ndarray
    debiased: np.ndarray
    kappa: np.ndarray
    participation: np.ndarray


def estimate(products: Products, pairs: Sequence[Pair]) -> Estimates:
    """Compute biased and debiased CKA.

    The debiased value is the cosine of the U-centred Gram matrices (Székely and Rizzo 2014), hence at most 1; it is
    the ratio of unbiased HSIC estimates (Song et al. 2012; Nguyen et al. 2021). The biased one is the cosine of the
    centred Gram matrices (Kornblith et al. 2019), <HKH, HLH> = U + n/(n-2) <r,q> - (sum r)(sum q)/((n-1)(n-2)):
    derived by adding, never the reverse, which would cancel.

    Args:
        products: the sums.
        pairs: index pairs of ``u_pair``.

    Example:
        >>> one = np.array([1.0, 4.0])
        >>> sums = Products(one, np.array([2.0]), one * 0, np.array([0.0]), one * 0, 8)
        >>> estimate(sums, [(0, 1)]).debiased.tolist()
        [1.0]
    """
    n = products.n
    left, right = np.array(pairs, dtype=int).reshape(-1, 2).T
    with np.errstate(invalid="ignore", divide="ignore"):
        if n < 4:
            g_self, g_pair = products.u_self, products.u_pair
            debiased = np.full(len(left), np.nan)
        else:
            spread = products.energy / np.sqrt((n - 1) * (n - 2))
            g_self = products.u_self + n / (n - 2) * products.cross_self - spread**2
            g_pair = products.u_pair + n / (n - 2) * products.cross_pair - spread[left] * spread[right]
            debiased = products.u_pair / np.sqrt(products.u_self[left] * products.u_self[right])
        return Estimates(
            biased=g_pair / np.sqrt(g_self[left] * g_self[right]),
            debiased=debiased,
            kappa=g_self / products.u_self if n >= 4 else np.full(len(g_self), np.nan),
            participation=products.energy**2 / g_self,
        )


def standard_error(rows_self: np.ndarray, rows_pair: np.ndarray, pairs: Sequence[Pair]) -> np.ndarray:
    """Compute the standard error of debiased CKA over the choice of samples, from influence functions.

    Sample s moves the value v = U_xy / sqrt(U_xx U_yy) by
    ``2 n (g_s / sqrt(U_xx U_yy) - v h_s / (2 U_xx) - v h'_s / (2 U_yy))``, with g, h, h' the row sums of the three
    products; the standard error is the root of the mean square influence over n - 1. For independent features,
    where the value fluctuates around 0 at second order only, it is too wide by a factor of about sqrt(2).

    Args:
        rows_self: ``(L, n)`` row sums of U(K) * U(K).
        rows_pair: ``(P, n)`` row sums of U(K) * U(L).
        pairs: index pairs of ``rows_pair``.

    Returns:
        ``(P,)`` float64, NaN where the rows are NaN.

    Example:
        >>> rows = np.array([[1.0, 2.0, 3.0, 4.0, 5.0]])
        >>> standard_error(rows, rows, [(0, 0)]).tolist()
        [0.0]
    """
    n = rows_self.shape[1]
    totals = rows_self.sum(1)
    out = np.full(len(pairs), np.nan)
    for p, (i, j) in enumerate(pairs):
        if not (totals[i] > 0 and totals[j] > 0):
            continue
        norm = np.sqrt(totals[i] * totals[j])
        value = rows_pair[p].sum() / norm
        half = value / 2 * (rows_self[i] / totals[i] + rows_self[j] / totals[j])
        influence = 2 * n * (rows_pair[p] / norm - half)
        out[p] = np.sqrt(np.sum(influence**2) / (n * (n - 1)))
    return out
