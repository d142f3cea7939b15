"""Kernels, as sources of U-centred Gram tiles.

A Gram source gives, for any block of rows and columns, the tile of the U-centred Gram matrix

    U(K)_st = K_st - k_s/(n-2) - k_t/(n-2) + k/((n-1)(n-2)),   U(K)_ss = 0,

with k_s the sum of row s without its diagonal and k the sum of all k_s (Székely and Rizzo 2014). U-centring does not
see terms that depend on s or t alone, so each kernel starts from the form with the least cancellation: centred
features for the linear kernel (then k_s = -|x_s|^2, no extra pass), K - 1 for the RBF kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hf_cka.lookup import lookup
from hf_cka.similarity.features import Centred, row_blocks

# The median distance is taken over at most this many evenly spaced samples (2 million distances); its sampling error
# is then far below anything a bandwidth can matter for.
_MEDIAN_ROWS = 2048


@dataclass(frozen=True)
class RBF:
    """The Gaussian kernel ``exp(-|x-y|^2 / (2 s^2))``, its bandwidth s relative to the data.

    Args:
        bandwidth: s as a fraction of the median distance between two samples; 0.5 to 1 is robust, 5 tends to the
            linear kernel, 0.2 sees only near neighbours. A bandwidth in absolute units would be meaningless across
            layers, whose norms differ by orders of magnitude.

    Raises:
        ValueError: if the bandwidth is not positive and finite.

    Source: Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited".

    Example:
        >>> RBF(0.8)
        RBF(bandwidth=0.8)
    """

    bandwidth: float = 0.8

    def __post_init__(self) -> None:
        if not 0 < self.bandwidth < float("inf"):
            raise ValueError(
                f"bandwidth={self.bandwidth} must be positive and finite: a fraction of the median distance."
            )


@dataclass(frozen=True)
class Linear:
    """The linear kernel ``<x, y>``.

    Example:
        >>> Linear()
        Linear()
    """


Kernel = Linear | RBF
KERNELS: dict[str, Callable[[], Kernel]] = {"linear": Linear, "rbf": RBF}


def resolve_kernel(kernel: str | Kernel) -> Kernel:
    """Return a kernel from its name or itself.

    Raises:
        ValueError: for an unknown name.

    Example:
        >>> resolve_kernel("rbf")
        RBF(bandwidth=0.8)
    """
    if isinstance(kernel, Linear | RBF):
        return kernel
    return lookup(KERNELS, kernel, "kernel")()


@dataclass(frozen=True)
class Gram:
    """A source of tiles of one layer's Gram matrix.

    Attributes:
        centred: the features.
        offset: what U-centring adds per row, float64 ``(n,)``; U(K)_st = K_st + offset_s + offset_t.
        energy: the diagonal of the (biased) centred Gram matrix HKH, float64 ``(n,)``.
        gamma: ``1 / (2 s^2)`` for the RBF kernel, None for the linear one.
        reduced: multiply in bfloat16.
        cast: the offset in the dtype of the tiles.
    """

    centred: Centred
    offset: torch.Tensor
    energy: torch.Tensor
    gamma: float | None
    reduced: bool
    cast: torch.Tensor

    def tile(self, rows: slice, cols: slice, out: torch.Tensor) -> None:
        """Write the U-centred tile ``(rows, cols)`` to ``out``; rows and cols are disjoint, or the same."""
        raw_tile(self.centred, rows, cols, out, self.gamma, self.reduced)
        out += self.cast[rows, None].to(out.device)
        out += self.cast[cols].to(out.device)
        if rows.start == cols.start:
            out.fill_diagonal_(0)


def raw_tile(
    centred: Centred, rows: slice, cols: slice, out: torch.Tensor, gamma: float | None, reduced: bool = False
) -> None:
    """Write K (linear kernel) or K - 1 (RBF kernel) for the given rows and columns to ``out``.

    Args:
        centred: the features.
        rows: rows of the tile.
        cols: columns of the tile.
        out: ``(len(rows), len(cols))``, overwritten.
        gamma: ``1 / (2 s^2)``, or None for the linear kernel.
        reduced: multiply in bfloat16.

    Example:
        >>> from hf_cka.similarity.features import centre
        >>> x = centre(torch.tensor([[0.0], [2.0], [0.0], [2.0]]), 0, torch.float64, keep=True)
        >>> out = torch.empty(2, 2, dtype=torch.float64)
        >>> raw_tile(x, slice(0, 2), slice(0, 2), out, None)
        >>> (out[0, 0] == -out[0, 1]).item()
        True
    """
    left = centred.block(rows).to(out.device)
    right = left if rows == cols else centred.block(cols, 1).to(out.device)
    if reduced:
        out.copy_(left.bfloat16() @ right.bfloat16().T)
    else:
        torch.mm(left, right.T, out=out)
    if gamma is None:
        return
    norms = centred.energy.to(device=out.device, dtype=out.dtype)
    out *= -2
    out += norms[rows, None]
    out += norms[cols]
    if rows.start == cols.start:
        out.fill_diagonal_(0)
    out *= -gamma
    # exp(z) - 1 without cancellation: for a wide bandwidth K is 1 plus the little that matters
    torch.expm1(out, out=out)


def gram_source(centred: Centred, kernel: Kernel, tile: int, reduced: bool = False) -> Gram | None:
    """Return the Gram source of a layer, or None if the median distance, and with it the RBF bandwidth, is zero.

    Args:
        centred: a usable layer.
        kernel: linear or RBF.
        tile: the block size of the pass that sums the rows of the RBF kernel.
        reduced: multiply in bfloat16.

    Example:
        >>> from hf_cka.similarity.features import centre
        >>> x = centre(torch.eye(5)[:, :3], 0, torch.float64, keep=True)
        >>> gram = gram_source(x, Linear(), 2)
        >>> out = torch.empty(5, 5, dtype=torch.float64)
        >>> gram.tile(slice(0, 5), slice(0, 5), out)
        >>> out.sum(0).abs().max().item() < 1e-12
        True
    """
    n = centred.n
    if isinstance(kernel, Linear):
        sums, energy, gamma = -centred.energy, centred.energy, None
    else:
        median = _median_square_distance(centred, tile)
        if not median > 0:
            return None
        gamma = 1 / (2 * kernel.bandwidth**2 * median)
        sums = _row_sums(centred, gamma, tile)
        # diagonal of H(K - 1)H, where (K - 1) has a zero diagonal
        energy = sums.sum() / n**2 - 2 * sums / n
    # fewer than 4 samples: nothing to debias, `tiny_samples` centres the whole matrix
    offset = sums.sum() / (2 * (n - 1) * (n - 2)) - sums / (n - 2) if n >= 4 else torch.zeros_like(sums)
    return Gram(centred, offset, energy, gamma, reduced, offset.to(centred.dtype))


def _median_square_distance(centred: Centred, tile: int) -> float:
    n = centred.n
    # copies: a block is valid only until the next one is read
    if n > _MEDIAN_ROWS:
        chosen = torch.linspace(0, n - 1, _MEDIAN_ROWS, device=centred.source.device).round().long()
        rows = torch.cat([centred.block(slice(i, i + 1)).clone() for i in chosen.tolist()])
        norms = centred.energy[chosen]
    else:
        rows, norms = torch.cat([centred.block(part).clone() for part in row_blocks(n, tile)]), centred.energy
    values = []
    for block in row_blocks(len(rows), tile):
        square = norms[block, None] + norms[block.start :] - 2 * (rows[block] @ rows[block.start :].T).double()
        i, j = torch.triu_indices(square.shape[0], square.shape[1], offset=1, device=square.device)
        values.append(square[i, j])
    return float(torch.cat(values).median())


def _row_sums(centred: Centred, gamma: float, tile: int) -> torch.Tensor:
    """Sum K - 1 over each row, the zero diagonal included, in float64 ``(n,)``."""
    sums = torch.zeros_like(centred.energy)
    blocks = row_blocks(centred.n, tile)
    for a, rows in enumerate(blocks):
        for cols in blocks[a:]:
            shape = (rows.stop - rows.start, cols.stop - cols.start)
            out = torch.empty(shape, dtype=centred.dtype, device=sums.device)
            raw_tile(centred, rows, cols, out, gamma)
            sums[rows] += out.sum(1, dtype=torch.float64)
            if rows.start != cols.start:
                sums[cols] += out.sum(0, dtype=torch.float64)
    return sums
