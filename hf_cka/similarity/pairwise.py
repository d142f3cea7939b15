"""CKA of two feature matrices, and of many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from hf_cka.similarity.engine import Pair, Sums, feature_space, sample_space, tiny_samples
from hf_cka.similarity.estimators import Estimates, Products, estimate, standard_error
from hf_cka.similarity.features import Centred, Pairs, centre, check_features, exact_math, resolve_pairs
from hf_cka.similarity.kernels import Gram, Kernel, Linear, gram_source, resolve_kernel
from hf_cka.similarity.planner import Plan, make_plan
from hf_cka.similarity.result import SimilarityResult, check_estimator

# Error of a debiased value that float32 products may leave before precision="auto" repeats them in float64.
_ERROR_BUDGET = 4e-6

# A debiased self-similarity this many roundings above zero is still a number.
_ROUNDINGS = 64


def cka(x: Any, y: Any, *, kernel: str | Kernel = "linear", estimator: str = "debiased") -> float:
    """Return the centred kernel alignment of two feature matrices.

    1 means equal up to rotation, scale and shift; 0 means unrelated. The debiased value can fall below 0 by its
    sampling error. The biased value depends on n: on independent Gaussians of width 4096 and n=128 it is 0.97.

    Args:
        x: features ``(n, p)``, of any float dtype.
        y: features ``(n, q)`` of the same samples.
        kernel: "linear", "rbf", or ``RBF(0.8)`` for another bandwidth.
        estimator: "debiased" or "biased".

    Raises:
        ValueError: for fewer than 4 samples (biased: 2), unequal n, NaN or infinite values, or features without
            spread; the message names the value and the fix.

    Source: Kornblith et al. 2019 (biased); Song et al. 2012 and Nguyen et al. 2021 (unbiased HSIC).

    Example:
        >>> x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
        >>> round(cka(x, -2 * x + 5), 6)
        1.0
        >>> cka(x, torch.ones(100, 3))
        Traceback (most recent call last):
        ValueError: CKA is undefined: y is constant over the 100 samples. ...
    """
    result = pairwise_similarity(
        [x, y], pairs=[(0, 1)], kernel=kernel, estimator=estimator, standard_error=False, memory=2**62
    )
    value = float(result.values[0])
    if np.isnan(value):
        # the worst of both: an outlier alone leaves a number unless there is nothing beside it
        layer = max((0, 1), key=lambda i: ("ok", "outlier_dominated", "low_signal", "constant").index(result.status[i]))
        ratio, share = (result.diagnostics[layer][key] for key in ("signal_ratio", "top_sample_share"))
        what = {
            "constant": f"is constant over the {result.n} samples",
            "low_signal": f"holds rounding noise only (its spread is {ratio:.1e} of its norm), or no two of its "
            "samples share a direction",
            "outlier_dominated": f"holds {share:.1%} of its energy in one sample, and nothing beside it",
        }[result.status[layer]]
        raise ValueError(
            f"CKA is undefined: {'xy'[layer]} {what}. Read the features at a token that differs between samples, "
            "or leave this layer out."
        )
    return value


def pairwise_similarity(
    features: Sequence[Any],
    *,
    pairs: Pairs = "all",
    kernel: str | Kernel = "linear",
    estimator: str = "debiased",
    precision: str = "auto",
    memory: int = 2**30,
    standard_error: bool = True,
) -> SimilarityResult:
    """Return the CKA of many pairs of layers.

    To compare two models, give ``features_a + features_b`` and the pairs ``(i, len(features_a) + j)``.

    Args:
        features: L matrices ``(n, d_l)`` of any float dtype, on any device; widths may differ.
        pairs: "all", "consecutive", or a list of index pairs.
        kernel: "linear", "rbf", or ``RBF(0.8)`` for another bandwidth.
        estimator: "debiased" or "biased": which one ``values`` holds; the result always holds both.
        precision: of the products. "auto": float64 where it costs next to nothing or rounding would show, else
            float32; "fp64"; "fp32" (errors below 1e-5, more where one sample dominates); "bf16" (errors of 1e-5 to
            1e-3, twice as fast on hardware that has it). Sums are float64 always.
        memory: bytes that may be used beyond the features.
        standard_error: whether to compute the standard error of the debiased value.

    Raises:
        ValueError: for fewer than 4 samples (biased: 2), unequal n, NaN or infinite values, unknown names, pairs out
            of range, or too little memory. Layers without spread do not raise: see the result's ``status``.

    Source: see `cka`; U-centring: Székely and Rizzo 2014.

    Example:
        >>> layers = [torch.randn(64, width, generator=torch.Generator().manual_seed(width)) for width in (8, 16, 24)]
        >>> result = pairwise_similarity(layers, pairs="consecutive")
        >>> result.pairs, bool(abs(result.values[0]) < 4 * result.standard_error[0])
        (((0, 1), (1, 2)), True)
    """
    check_estimator(estimator)
    chosen_kernel = resolve_kernel(kernel)
    minimum, why = 2, "CKA needs at least 2. Use more samples."
    if estimator == "debiased":
        minimum, why = 4, "the debiased estimator needs at least 4. Use more samples, or estimator='biased'."
    tensors = check_features(features, minimum, why)
    wanted = resolve_pairs(pairs, len(tensors))
    n = tensors[0].shape[0]
    with_rows = standard_error and n >= 4
    plan = make_plan(
        n,
        [x.shape[1] for x in tensors],
        wanted,
        linear=isinstance(chosen_kernel, Linear),
        precision=precision,
        memory=memory,
        with_rows=with_rows,
        double=any(x.dtype == torch.float64 for x in tensors),
        cuda=tensors[0].is_cuda,
    )
    with exact_math():
        found = _compute(tensors, wanted, chosen_kernel, plan, with_rows)
        if precision == "auto" and plan.precision == "fp32":
            again = _inexact_layers(found, plan)
            if again:
                plan = replace(plan, repeated=again)
                found = _repeat(tensors, wanted, chosen_kernel, plan, with_rows, found)
    return similarity_result(found, wanted, estimator, plan, n)


@dataclass(frozen=True)
class Found:
    """What was computed, before it is put together as a `SimilarityResult`; per pair, and per layer."""

    estimates: Estimates
    error: np.ndarray
    status: tuple[str, ...]
    signal_ratio: tuple[float, ...]
    top_sample_share: tuple[float, ...]


def _compute(
    tensors: Sequence[torch.Tensor], pairs: Sequence[Pair], kernel: Kernel, plan: Plan, with_rows: bool
) -> Found:
    layers = _centred(tensors, plan)
    n, count = layers[0].n, len(layers)
    status = [layer.status for layer in layers]
    grams: dict[int, Gram] = {}
    for i, layer in enumerate(layers):
        if layer.usable:
            gram = gram_source(layer, kernel, plan.tile, plan.precision == "bf16")
            if gram is None:
                status[i] = "low_signal"
            else:
                grams[i] = gram

    position = {layer: k for k, layer in enumerate(grams)}
    live = [p for p, (i, j) in enumerate(pairs) if i in grams and j in grams]
    jobs = [(k, k) for k in range(len(grams))] + [(position[pairs[p][0]], position[pairs[p][1]]) for p in live]
    u = np.full(count + len(pairs), np.nan)
    error = np.full(len(pairs), np.nan)
    cross = np.full(count + len(pairs), np.nan)
    energy = np.full(count, np.nan)
    if grams:
        slots = list(grams) + [count + p for p in live]
        sums = _sums(list(grams.values()), [layers[i] for i in grams], jobs, plan, with_rows)
        u[slots] = sums.total.numpy()
        if sums.rows is not None:
            rows = sums.rows.numpy()
            error[live] = standard_error(rows[: len(grams)], rows[len(grams) :], jobs[len(grams) :])
        energies = np.stack([gram.energy.cpu().numpy() for gram in grams.values()])
        energy[list(grams)] = energies.sum(1)
        cross[slots] = [energies[i] @ energies[j] for i, j in jobs]

    estimates = estimate(Products(u[:count], u[count:], cross[:count], cross[count:], energy, n), pairs)
    found = Found(
        estimates,
        error,
        tuple(status),
        tuple(layer.signal_ratio for layer in layers),
        tuple(layer.top_sample_share for layer in layers),
    )
    return without_empty_debiased(found, pairs, plan)


def _centred(tensors: Sequence[torch.Tensor], plan: Plan) -> list[Centred]:
    """Centre all layers; if the centred features are not kept, they share memory for two blocks per device."""
    rooms: dict[torch.device, torch.Tensor] = {}
    if not plan.keep_centred:
        elements = min(plan.tile, len(tensors[0])) * max(x.shape[1] for x in tensors)
        for x in tensors:
            if x.device not in rooms:
                rooms[x.device] = torch.empty(2, elements, dtype=plan.dtype, device=x.device)
    return [centre(x, i, plan.dtype, plan.keep_centred, rooms.get(x.device)) for i, x in enumerate(tensors)]


def _sums(grams: list[Gram], layers: list[Centred], jobs: list[Pair], plan: Plan, with_rows: bool) -> Sums:
    if layers[0].n < 4:
        return tiny_samples(grams, jobs)
    if plan.space == "feature":
        return feature_space(layers, jobs, plan.tile, with_rows)
    return sample_space(grams, jobs, plan.tile, with_rows)


def _rounding(kappa: np.ndarray, plan: Plan, eps: float) -> np.ndarray:
    """Estimate the rounding error of a debiased value: feature space cancels to U, tiles are U-centred one by one."""
    return eps * np.abs(np.sqrt(np.abs(kappa)) if plan.space == "sample" else kappa)


def _inexact_layers(found: Found, plan: Plan) -> tuple[int, ...]:
    """Layers whose debiased values would carry more rounding than the budget."""
    kappa = found.estimates.kappa
    if np.isnan(kappa).all():
        return ()
    with np.errstate(invalid="ignore"):
        bad = (kappa <= 0) | (_rounding(kappa, plan, torch.finfo(torch.float32).eps) > _ERROR_BUDGET)
    return tuple(int(i) for i in np.flatnonzero(bad))


def without_empty_debiased(found: Found, pairs: Sequence[Pair], plan: Plan) -> Found:
    """Replace debiased values by NaN where U(K) is zero up to rounding, and say so in the status.

    It happens when all samples are equally far from each other, or all but one coincide.
    """
    eps = torch.finfo(plan.dtype).eps
    kappa = found.estimates.kappa
    with np.errstate(invalid="ignore"):
        empty = (kappa <= 0) | (_rounding(kappa, plan, eps) * _ROUNDINGS > 1)
    if not empty.any():
        return found
    status = tuple("low_signal" if e and s == "ok" else s for e, s in zip(empty, found.status, strict=True))
    debiased, error = found.estimates.debiased.copy(), found.error.copy()
    for p, (i, j) in enumerate(pairs):
        if empty[i] or empty[j]:
            debiased[p] = error[p] = np.nan
    return replace(found, estimates=replace(found.estimates, debiased=debiased), error=error, status=status)


def _repeat(
    tensors: Sequence[torch.Tensor], pairs: Sequence[Pair], kernel: Kernel, plan: Plan, with_rows: bool, found: Found
) -> Found:
    """Compute the pairs of ``plan.repeated`` layers in float64, and put them in place of the float32 ones."""
    touched = [p for p, pair in enumerate(pairs) if set(pair) & set(plan.repeated)]
    needed = sorted({i for p in touched for i in pairs[p]} | set(plan.repeated))
    where = {layer: k for k, layer in enumerate(needed)}
    exact = _compute(
        [tensors[i] for i in needed],
        [(where[pairs[p][0]], where[pairs[p][1]]) for p in touched],
        kernel,
        replace(plan, precision="fp64", keep_centred=False, tile=max(16, plan.tile // 2)),
        with_rows,
    )
    biased, debiased = found.estimates.biased.copy(), found.estimates.debiased.copy()
    kappa, participation = found.estimates.kappa.copy(), found.estimates.participation.copy()
    error, status = found.error.copy(), list(found.status)
    biased[touched], debiased[touched] = exact.estimates.biased, exact.estimates.debiased
    error[touched] = exact.error
    for layer in plan.repeated:
        k = where[layer]
        kappa[layer], participation[layer] = exact.estimates.kappa[k], exact.estimates.participation[k]
        status[layer] = exact.status[k]
    return replace(
        found, estimates=Estimates(biased, debiased, kappa, participation), error=error, status=tuple(status)
    )


def similarity_result(found: Found, pairs: tuple[Pair, ...], estimator: str, plan: Plan, n: int) -> SimilarityResult:
    """Put together what the user sees."""
    diagnostics = tuple(
        {
            "signal_ratio": found.signal_ratio[i],
            "top_sample_share": found.top_sample_share[i],
            "participation_ratio": float(found.estimates.participation[i]),
            "kappa": float(found.estimates.kappa[i]),
        }
        for i in range(len(found.status))
    )
    biased, debiased = found.estimates.biased, found.estimates.debiased
    return SimilarityResult(
        pairs=pairs,
        values=debiased if estimator == "debiased" else biased,
        biased=biased,
        debiased=debiased,
        standard_error=found.error,
        status=found.status,
        diagnostics=diagnostics,
        n=n,
        estimator=estimator,
        plan=plan,
    )
