"""What a similarity computation returns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_cka.similarity.planner import Plan


@dataclass(frozen=True, eq=False)
class SimilarityResult:
    """CKA of pairs of layers, with both estimators, a standard error, and what is wrong with any layer.

    Attributes:
        pairs: index pairs.
        values: the values of the chosen estimator, ``(P,)`` float64; NaN only where ``status`` says why.
        biased: the biased values, ``(P,)``, between 0 and 1; near 1 for anything when n is far below the width.
        debiased: the debiased values, ``(P,)``, at most 1, around 0 for independent features; NaN for n < 4.
        standard_error: of the debiased values, ``(P,)``, over the choice of samples; all NaN if it was not asked for,
            for n < 4, and for streamed sums (whose samples, tokens, are not independent).
        status: per layer "ok", "constant", "low_signal" (spread below the resolution of its dtype, or no direction
            shared by two samples) or "outlier_dominated" (one sample holds more than half of the energy).
        diagnostics: per layer ``signal_ratio`` (norm after centring over norm before), ``top_sample_share``,
            ``participation_ratio`` (effective number of dimensions) and ``kappa`` (biased over debiased
            self-similarity; far above 1 where debiasing matters).
        n: the number of samples.
        estimator: "debiased" or "biased", which of the two ``values`` are.
        plan: how it was computed, and why.

    Example:
        >>> from hf_cka.similarity import pairwise_similarity
        >>> layer = np.random.default_rng(0).normal(size=(50, 8))
        >>> result = pairwise_similarity([layer, 3 * layer + 1, np.ones((50, 4))])
        >>> result.pairs, result.status
        (((0, 1), (0, 2), (1, 2)), ('ok', 'ok', 'constant'))
        >>> result.matrix().round(6)
        array([[ 1.,  1., nan],
               [ 1.,  1., nan],
               [nan, nan, nan]])
    """

    pairs: tuple[tuple[int, int], ...]
    values: np.ndarray
    biased: np.ndarray
    debiased: np.ndarray
    standard_error: np.ndarray
    status: tuple[str, ...]
    diagnostics: tuple[dict[str, float], ...]
    n: int
    estimator: str
    plan: Plan

    def matrix(self, estimator: str | None = None) -> np.ndarray:
        """Return the values as an ``(L, L)`` array: NaN for absent pairs, 1 on the diagonal of usable layers.

        Args:
            estimator: "debiased" or "biased"; by default the one of ``values``.

        Raises:
            ValueError: for another word.
        """
        chosen = check_estimator(estimator or self.estimator)
        values = self.debiased if chosen == "debiased" else self.biased
        out = np.full((len(self.status), len(self.status)), np.nan)
        for layer, status in enumerate(self.status):
            if status in ("ok", "outlier_dominated"):
                out[layer, layer] = 1.0
        for (i, j), value in zip(self.pairs, values, strict=True):
            if i != j:
                out[i, j] = out[j, i] = value
        return out

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready fields; NaN becomes None, which strict JSON can hold."""
        return {
            "version": 1,
            "pairs": [list(pair) for pair in self.pairs],
            "biased": _to_list(self.biased),
            "debiased": _to_list(self.debiased),
            "standard_error": _to_list(self.standard_error),
            "status": list(self.status),
            "diagnostics": [
                dict(zip(d, _to_list(np.array(list(d.values()), dtype=np.float64)), strict=True))
                for d in self.diagnostics
            ],
            "n": self.n,
            "estimator": self.estimator,
            "plan": self.plan.to_dict(),
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> SimilarityResult:
        """Return the result that `to_dict` wrote.

        Raises:
            ValueError: for another version.
        """
        if fields.get("version") != 1:
            raise ValueError(f"Similarity record of version {fields.get('version')!r}; this hf_cka reads version 1.")
        biased, debiased, error = (_from_list(fields[k]) for k in ("biased", "debiased", "standard_error"))
        return cls(
            pairs=tuple((int(i), int(j)) for i, j in fields["pairs"]),
            values=debiased if fields["estimator"] == "debiased" else biased,
            biased=biased,
            debiased=debiased,
            standard_error=error,
            status=tuple(fields["status"]),
            diagnostics=tuple({k: math.nan if v is None else v for k, v in d.items()} for d in fields["diagnostics"]),
            n=fields["n"],
            estimator=fields["estimator"],
            plan=Plan.from_dict(fields["plan"]),
        )


def check_estimator(estimator: str) -> str:
    """Return the name of an estimator, or raise.

    Example:
        >>> check_estimator("unbiased")
        Traceback (most recent call last):
        ValueError: Unknown estimator 'unbiased'. Use 'debiased' or 'biased'.
    """
    if estimator not in ("debiased", "biased"):
        raise ValueError(f"Unknown estimator {estimator!r}. Use 'debiased' or 'biased'.")
    return estimator


def _to_list(values: np.ndarray) -> list[float | None]:
    return [None if math.isnan(v) else float(v) for v in values]


def _from_list(values: Sequence[float | None]) -> np.ndarray:
    return np.array([math.nan if v is None else v for v in values], dtype=np.float64)
