"""CKA over batches that are never stored: exact, mergeable, in memory that does not grow with the samples.

For features whose samples are too many to keep (every token of a corpus). One vector per text is smaller kept than
streamed until n is about 4 times the width: use `pairwise_similarity` there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_cka.similarity.estimators import Products, estimate
from hf_cka.similarity.features import Pairs, check_features, exact_math, judge, resolve_pairs
from hf_cka.similarity.pairwise import Found, similarity_result, without_empty_debiased
from hf_cka.similarity.planner import Plan
from hf_cka.similarity.result import SimilarityResult, check_estimator

# Small batches are collected to this many rows before they are multiplied: adding one batch costs a few passes over
# the accumulators whatever its size.
_COLLECT = 512
_CHUNK_ROWS = 2048


@dataclass(frozen=True)
class Moments:
    """Sums over a set of samples, about the set's own mean; float64.

    With z the centred rows of a layer: everything that biased and debiased CKA are made of. Two sets join exactly,
    by algebra, whatever their means.

    Attributes:
        n: number of samples.
        mean: per layer ``(d_l,)``.
        energy: per layer, the sum of ``|z|^2``.
        top: per layer ``(2, d_l)``, the two samples farthest from the mean (of two samples alone, both are as far).
        cross: per job (i, j), ``sum z_i z_j'``, ``(d_i, d_j)``.
        third: per job, ``sum |z_i|^2 z_j`` and ``sum |z_j|^2 z_i``.
        fourth: per job, ``sum |z_i|^2 |z_j|^2``.
    """

    n: int
    mean: list[torch.Tensor]
    energy: list[torch.Tensor]
    top: list[torch.Tensor]
    cross: list[torch.Tensor]
    third: list[tuple[torch.Tensor, torch.Tensor]]
    fourth: list[torch.Tensor]


def moments(rows: Sequence[torch.Tensor], jobs: Sequence[tuple[int, int]]) -> Moments:
    """Return the moments of one set of samples.

    Args:
        rows: per layer ``(n, d_l)``, float64, n > 0.
        jobs: the index pairs that are accumulated.

    Example:
        >>> moments([torch.tensor([[1.0], [3.0]], dtype=torch.float64)], [(0, 0)]).cross[0].item()
        2.0
    """
    mean = [x.mean(0) for x in rows]
    z = [x - m for x, m in zip(rows, mean, strict=True)]
    r = [x.square().sum(1) for x in z]
    return Moments(
        n=len(rows[0]),
        mean=mean,
        energy=[x.sum() for x in r],
        top=[x[e.topk(min(2, len(e))).indices] for x, e in zip(rows, r, strict=True)],
        cross=[z[i].T @ z[j] for i, j in jobs],
        third=[(r[i] @ z[j], r[j] @ z[i]) for i, j in jobs],
        fourth=[r[i] @ r[j] for i, j in jobs],
    )


def join(a: Moments, b: Moments, jobs: Sequence[tuple[int, int]]) -> Moments:
    """Return the moments of the union of two sets.

    Args:
        a: moments of one set.
        b: moments of another, disjoint set.
        jobs: the index pairs of both.

    Example:
        >>> x, jobs = torch.randn(9, 2, dtype=torch.float64), [(0, 0)]
        >>> whole, parts = moments([x], jobs), join(moments([x[:2]], jobs), moments([x[2:]], jobs), jobs)
        >>> torch.allclose(whole.cross[0], parts.cross[0]), torch.allclose(whole.fourth[0], parts.fourth[0])
        (True, True)
    """
    n = a.n + b.n
    mean = [p + (q - p) * (b.n / n) for p, q in zip(a.mean, b.mean, strict=True)]
    a, b = _about(a, mean, jobs), _about(b, mean, jobs)
    both = [torch.cat(rows) for rows in zip(a.top, b.top, strict=True)]
    far = [rows[(rows - m).square().sum(1).topk(2).indices] for rows, m in zip(both, mean, strict=True)]
    return Moments(
        n=n,
        mean=mean,
        energy=[p + q for p, q in zip(a.energy, b.energy, strict=True)],
        top=far,
        cross=[p.add_(q) for p, q in zip(a.cross, b.cross, strict=True)],
        third=[(p[0] + q[0], p[1] + q[1]) for p, q in zip(a.third, b.third, strict=True)],
        fourth=[p + q for p, q in zip(a.fourth, b.fourth, strict=True)],
    )


def _about(m: Moments, mean: Sequence[torch.Tensor], jobs: Sequence[tuple[int, int]]) -> Moments:
    """The same sums about another point: z becomes z + d, with d the old mean minus the new, and sum z = 0."""
    n, shift = m.n, [old - new for old, new in zip(m.mean, mean, strict=True)]
    size = [d @ d for d in shift]
    cross, third, fourth = [], [], []
    for (i, j), c, (q_ij, q_ji), f in zip(jobs, m.cross, m.third, m.fourth, strict=True):
        di, dj = shift[i], shift[j]
        forward, back = c.T @ di, c @ dj
        cross.append(torch.addr(c, di, dj, alpha=n))
        third.append(
            (
                q_ij + 2 * forward + (m.energy[i] + n * size[i]) * dj,
                q_ji + 2 * back + (m.energy[j] + n * size[j]) * di,
            )
        )
        fourth.append(
            f
            + 2 * (dj @ q_ij)
            + 2 * (di @ q_ji)
            + 4 * (di @ back)
            + size[j] * m.energy[i]
            + size[i] * m.energy[j]
            + n * size[i] * size[j]
        )
    energy = [e + n * s for e, s in zip(m.energy, size, strict=True)]
    return Moments(n, list(mean), energy, m.top, cross, third, fourth)


class StreamingCKA:
    """CKA of pairs of layers, from batches in any number, size and order.

    Memory is one float64 ``(d_i, d_j)`` matrix per layer and per pair, and at most 512 rows of every layer. The
    result equals that of all samples at once to float64 rounding. Parts that saw different batches, in other processes
    too, merge exactly: send ``state_dict()``, or the object itself, which can be pickled.

    Standard errors are NaN: streamed samples are tokens, and tokens of one text are not independent. The diagnostic
    ``top_sample_share`` is a lower bound, exact for a sample that dominates.

    Args:
        num_layers: the number of layers of every update.
        pairs: "consecutive", "all", or a list of index pairs.

    Raises:
        ValueError: for pairs out of range.

    Source: the sums of Nguyen et al. 2021 and Székely and Rizzo 2014 in feature space; joined as in Chan et al. 1979.

    Example:
        >>> x = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
        >>> first, second = StreamingCKA(2), StreamingCKA(2)
        >>> for batch in x[:200].split(64):
        ...     first.update([batch, batch.abs()])
        >>> second.update([x[200:], x[200:].abs()])
        >>> from hf_cka.similarity import cka
        >>> abs(first.merge(second).result().values[0] - cka(x, x.abs())) < 1e-9
        np.True_
    """

    def __init__(self, num_layers: int, pairs: Pairs = "consecutive") -> None:
        self.num_layers = num_layers
        self.pairs = resolve_pairs(pairs, num_layers)
        self._jobs = [(i, i) for i in range(num_layers)] + list(self.pairs)
        self._moments: Moments | None = None
        self._pending: list[list[torch.Tensor]] = []
        self._widths: list[int] | None = None
        self._coarsest: list[torch.dtype] = [torch.float64] * num_layers

    @property
    def n(self) -> int:
        """The number of samples so far."""
        return (self._moments.n if self._moments else 0) + sum(len(rows[0]) for rows in self._pending)

    def update(self, features: Sequence[Any]) -> None:
        """Add a batch.

        Args:
            features: per layer ``(b, d_l)``, any float dtype; b may differ from batch to batch, and may be 0.

        Raises:
            ValueError: for another number of layers, other widths than before, unequal b, or NaN or infinite values.
                Nothing is added then.
        """
        rows = check_features(features, 0, "")
        if len(rows) != self.num_layers:
            raise ValueError(f"Got {len(rows)} feature matrices; this StreamingCKA was made for {self.num_layers}.")
        widths = [x.shape[1] for x in rows]
        self._check_widths(widths)
        for i, x in enumerate(rows):
            bad = int((~torch.isfinite(x)).sum())
            if bad:
                raise ValueError(
                    f"features[{i}] holds {bad} NaN or infinite value{'' if bad == 1 else 's'}. Run the model in "
                    "bfloat16 or float32 instead of float16, or leave those samples out."
                )
        self._widths = widths
        self._coarsest = [max((a, x.dtype), key=_eps) for a, x in zip(self._coarsest, rows, strict=True)]
        if len(rows[0]) == 0:
            return
        # copies: the caller may reuse its buffers before the rows are multiplied
        self._pending.append([x.clone() for x in rows])
        if sum(len(part[0]) for part in self._pending) >= _COLLECT:
            self._flush()

    def merge(self, other: StreamingCKA) -> StreamingCKA:
        """Add what another one has seen, and return self.

        Args:
            other: for the same layers and pairs; unchanged.

        Raises:
            ValueError: for other layers, pairs or widths.
        """
        if other.num_layers != self.num_layers or other.pairs != self.pairs:
            raise ValueError(
                f"Cannot merge: {self.num_layers} layers with {len(self.pairs)} pairs, and {other.num_layers} layers "
                f"with {len(other.pairs)} pairs. Make all parts with the same arguments."
            )
        if other._widths is not None:
            self._check_widths(other._widths)
            self._widths = other._widths
        self._coarsest = [max(pair, key=_eps) for pair in zip(self._coarsest, other._coarsest, strict=True)]
        self._flush()
        other._flush()
        if other._moments is not None:
            self._add(other._moments)
        return self

    def result(self, estimator: str = "debiased") -> SimilarityResult:
        """Return the similarities of everything seen so far; more can be added afterwards.

        Args:
            estimator: "debiased" or "biased": which one ``values`` holds.

        Raises:
            ValueError: for fewer than 4 samples (biased: 2).
        """
        check_estimator(estimator)
        minimum = 4 if estimator == "debiased" else 2
        self._flush()
        m = self._moments
        if m is None or m.n < minimum:
            raise ValueError(
                f"{self.n} samples so far: the {estimator} estimator needs at least {minimum}. Update with more samples"
                + (", or use estimator='biased'." if estimator == "debiased" else ".")
            )
        count, n = self.num_layers, m.n
        energy = np.array([float(e) for e in m.energy])
        away = np.array([n * float(mean @ mean) for mean in m.mean])
        far = np.array([float((t - mean).square().sum(1).max()) for t, mean in zip(m.top, m.mean, strict=True)])
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = np.where(energy > 0, np.sqrt(energy / (energy + away)), 0.0)
            share = far / energy
        status = tuple(judge(ratio[i], share[i], n, self._coarsest[i]) for i in range(count))
        usable = np.array([s in ("ok", "outlier_dominated") for s in status])

        left, right = np.array(self._jobs).T
        square = np.array([float(c.square().sum()) for c in m.cross])
        fourth = np.array([float(f) for f in m.fourth])
        u = square
        if n >= 4:
            u = square - n / (n - 2) * fourth + energy[left] * energy[right] / ((n - 1) * (n - 2))
        u = np.where(usable[left] & usable[right], u, np.nan)
        estimates = estimate(Products(u[:count], u[count:], fourth[:count], fourth[count:], energy, n), self.pairs)
        held = 8 * sum(c.numel() for c in m.cross)
        plan = Plan("streaming", "fp64", _COLLECT, False, float("inf"), float("inf"), held)
        error = np.full(len(self.pairs), np.nan)
        found = Found(estimates, error, status, tuple(map(float, ratio)), tuple(map(float, share)))
        return similarity_result(without_empty_debiased(found, self.pairs, plan), self.pairs, estimator, plan, n)

    def state_dict(self) -> dict[str, Any]:
        """Return everything as tensors, numbers, strings and lists, for ``torch.save`` or another process."""
        self._flush()
        m = self._moments
        return {
            "version": 1,
            "num_layers": self.num_layers,
            "pairs": [list(pair) for pair in self.pairs],
            "widths": self._widths,
            "coarsest": [str(dtype).removeprefix("torch.") for dtype in self._coarsest],
            "n": m.n if m else 0,
            "mean": m.mean if m else [],
            "energy": m.energy if m else [],
            "top": m.top if m else [],
            "cross": m.cross if m else [],
            "third": [list(pair) for pair in m.third] if m else [],
            "fourth": m.fourth if m else [],
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> StreamingCKA:
        """Return the object whose `state_dict` this is.

        Raises:
            ValueError: for another version.
        """
        if state.get("version") != 1:
            raise ValueError(f"StreamingCKA state of version {state.get('version')!r}; this hf_cka reads version 1.")
        out = cls(state["num_layers"], [(i, j) for i, j in state["pairs"]])
        out._widths = state["widths"]
        out._coarsest = [getattr(torch, name) for name in state["coarsest"]]
        if state["n"]:
            sums = {key: list(state[key]) for key in ("mean", "energy", "top", "cross", "fourth")}
            out._moments = Moments(n=state["n"], third=[(a, b) for a, b in state["third"]], **sums)
        return out

    def _check_widths(self, widths: list[int]) -> None:
        if self._widths is not None and widths != self._widths:
            layer = next(i for i, (a, b) in enumerate(zip(widths, self._widths, strict=True)) if a != b)
            raise ValueError(f"features[{layer}] has width {widths[layer]}; it was {self._widths[layer]} before.")

    def _flush(self) -> None:
        if not self._pending:
            return
        device = self._moments.mean[0].device if self._moments else self._pending[0][0].device
        layers = [torch.cat([part[i].to(device) for part in self._pending]) for i in range(self.num_layers)]
        self._pending = []
        with exact_math():
            for chunk in zip(*(x.split(_CHUNK_ROWS) for x in layers), strict=True):
                self._add(moments([x.double() for x in chunk], self._jobs))

    def _add(self, more: Moments) -> None:
        # joining makes new tensors, so that parts and states may share the old ones
        with exact_math():
            if self._moments is None:
                self._moments = more
            else:
                self._moments = join(self._moments, _to(more, self._moments.mean[0].device), self._jobs)


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _to(m: Moments, device: torch.device) -> Moments:
    def move(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [t.to(device) for t in tensors]

    third = [(a.to(device), b.to(device)) for a, b in m.third]
    return Moments(m.n, move(m.mean), move(m.energy), move(m.top), move(m.cross), third, move(m.fourth))
