"""Which way to compute, by cost and memory.

Feature space costs ``n d^2`` per layer and per pair, sample space ``n^2 d / 2`` per layer and a little per pair: for
all pairs of L layers sample space wins until n is about L times the width, for consecutive pairs until about 3 times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from hf_cka.similarity.engine import Pair, is_dense

PRECISIONS = ("auto", "fp64", "fp32", "bf16")

# precision="auto" multiplies in float64 up to this many multiply-adds (some tens of milliseconds of one CPU core):
# there the time does not matter. Beyond, float32 products with float64 sums, at twice the speed.
_CHEAP = 1e9

# Costs in multiply-adds of a float32 matrix product, measured on one core of an AVX512 CPU.
_ELEMENTWISE = 24.0  # one product-and-sum of two tile elements, by row and by column
_BATCHED = 8.0  # one multiply-add of the skinny products of all layers with all

_TILES_CPU = (256, 128, 64, 32, 16)
_TILES_CUDA = (1024, 512, *_TILES_CPU)
_BLOCK = 1024


@dataclass(frozen=True)
class Plan:
    """How a similarity was computed, and what the planner weighed.

    Attributes:
        space: "sample", "feature", or "streaming".
        precision: "fp64", "fp32" or "bf16", the precision of the products; sums are float64 always.
        tile: rows of a block; in sample space the side of a tile.
        keep_centred: whether the centred features were held in memory.
        sample_cost: estimated multiply-adds in sample space.
        feature_cost: the same in feature space; infinite for kernels that have none.
        memory: estimated bytes beyond the features.
        repeated: layers whose pairs were computed again in float64, because float32 products would have left an
            error above 4e-6 in the debiased value.

    Example:
        >>> print(Plan("sample", "fp32", 256, True, 2e9, 5e9, 1 << 20))
        sample space, fp32 products, blocks of 256 rows; 2.0e+09 multiply-adds (feature space: 5.0e+09); 1.0 MiB
    """

    space: str
    precision: str
    tile: int
    keep_centred: bool
    sample_cost: float
    feature_cost: float
    memory: int
    repeated: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.space == "streaming":
            return f"streaming, {self.precision} products; {self.memory / 2**20:.1f} MiB"
        chosen, other, name = self.sample_cost, self.feature_cost, "feature"
        if self.space == "feature":
            chosen, other, name = other, chosen, "sample"
        text = (
            f"{self.space} space, {self.precision} products, blocks of {self.tile} rows; {chosen:.1e} multiply-adds "
            f"({name} space: {other:.1e}); {self.memory / 2**20:.1f} MiB"
        )
        if self.repeated:
            text += f"; layers {', '.join(map(str, self.repeated))} again in fp64"
        return text

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready fields (an infinite cost becomes None)."""
        fields = asdict(self)
        fields["repeated"] = list(self.repeated)
        if self.feature_cost == float("inf"):
            fields["feature_cost"] = None
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Plan:
        """Return the plan that `to_dict` wrote.

        Example:
            >>> plan = Plan("sample", "fp32", 256, True, 2e9, float("inf"), 0)
            >>> Plan.from_dict(plan.to_dict()) == plan
            True
        """
        cost = fields["feature_cost"]
        return cls(
            **{
                **fields,
                "repeated": tuple(fields["repeated"]),
                "feature_cost": float("inf") if cost is None else cost,
            }
        )

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.precision == "fp64" else torch.float32


def make_plan(
    n: int,
    widths: Sequence[int],
    pairs: Sequence[Pair],
    *,
    linear: bool = True,
    precision: str = "auto",
    memory: int = 2**30,
    with_rows: bool = True,
    double: bool = False,
    cuda: bool = False,
) -> Plan:
    """Choose the space, the precision and the block size.

    Args:
        n: the number of samples.
        widths: the width of each layer.
        pairs: the pairs, without the self pairs that every layer needs.
        linear: whether the kernel is linear; other kernels exist in sample space only.
        precision: "auto", "fp64", "fp32" or "bf16".
        memory: bytes that may be used beyond the features.
        with_rows: whether row sums, for the standard error, are wanted.
        double: whether the features came in float64; "auto" then stays in float64.
        cuda: whether the features live on a CUDA device, where larger tiles pay.

    Raises:
        ValueError: for an unknown precision, bf16 with another kernel than the linear one, or too little memory.

    Example:
        >>> make_plan(1024, [576] * 31, [(i, j) for i in range(31) for j in range(i)]).space
        'sample'
        >>> make_plan(8192, [576] * 31, [(i, i + 1) for i in range(30)]).space
        'feature'
    """
    if precision not in PRECISIONS:
        raise ValueError(f"Unknown precision {precision!r}. Use one of {', '.join(map(repr, PRECISIONS))}.")
    if precision == "bf16" and not linear:
        raise ValueError("precision='bf16' works with the linear kernel only: use 'fp32', 'fp64' or 'auto'.")
    sample, feature = costs(n, widths, pairs, with_rows)
    if not linear:
        sample, feature = 2 * sample, float("inf")
    space = "feature" if feature < sample and n >= 4 and precision != "bf16" else "sample"
    if precision == "auto":
        precision = "fp64" if double or min(sample, feature) <= _CHEAP else "fp32"
    plan = Plan(space, precision, 0, True, sample, feature, 0)
    tiles = _TILES_CUDA if cuda else _TILES_CPU
    # With two blocks or fewer every row is centred at most twice, which costs less than fresh memory for all layers.
    # With more, kept features save centring again for every tile; blocks of 64 rows are enough to prefer keeping,
    # below that centring again is cheaper than tiny products.
    kept_tiles = [t for t in tiles if t >= 64] if space == "feature" or n > 2 * tiles[0] else []
    for keep, allowed in ((True, kept_tiles), (False, tiles)):
        for tile in allowed if space == "sample" else (_BLOCK, 256, 64, 16):
            need = _memory(plan, n, widths, len(pairs), tile, keep, with_rows)
            if need <= memory:
                return replace(plan, tile=min(tile, max(n, 1)), keep_centred=keep, memory=need)
    raise ValueError(
        f"memory={memory} bytes is too little: {len(pairs)} pairs of {len(widths)} layers at n={n} need at least {need}"
        + (" (less with standard_error=False)." if with_rows else ".")
    )


def costs(n: int, widths: Sequence[int], pairs: Sequence[Pair], with_rows: bool) -> tuple[float, float]:
    """Return the estimated multiply-adds in sample space and in feature space.

    Example:
        >>> sample, feature = costs(128, [4096] * 31, [(i, i + 1) for i in range(30)], True)
        >>> sample < feature / 50
        True
    """
    layers, wanted = len(widths), len(pairs) + len(widths)
    # half of the n x n tiles, and the lower half of those on the diagonal
    products = n * (n + min(n, _TILES_CPU[0])) / 2
    per_element = _BATCHED * layers**2 / 2 if is_dense(layers, wanted) else _ELEMENTWISE * wanted / 2
    sample = products * sum(widths) + n**2 * per_element
    squares = sum(d * d for d in widths) + sum(widths[i] * widths[j] for i, j in pairs)
    feature = (2.0 if with_rows else 1.0) * n * squares
    return sample, feature


def _memory(plan: Plan, n: int, widths: Sequence[int], pairs: int, tile: int, keep: bool, with_rows: bool) -> int:
    """Estimate the bytes beyond the features."""
    size = 8 if plan.precision == "fp64" else 4
    layers, wanted, widest = len(widths), pairs + len(widths), max(widths)
    total = 8 * n * (2 * layers + (wanted if with_rows else 0))
    if keep:
        total += size * n * sum(widths)
    # two blocks of rows, in the working precision and, while centring, in float64
    total += 2 * (size + 8) * tile * widest
    if plan.space == "feature":
        return total + (size + 16) * widest**2 + size * tile * widest
    stacks = 2 if with_rows and is_dense(layers, wanted) else 1
    total += size * stacks * layers * tile**2
    return total + (2 * size + 8) * tile * (layers**2 if is_dense(layers, wanted) else tile)
