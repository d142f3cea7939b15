"""The two ways to the sums behind every CKA value: tiles of Gram matrices, or cross-covariances.

Both give, per layer and per pair, ``U_xy = <U(K), U(L)>``, the inner product of U-centred Gram matrices (n(n-3) times
the unbiased HSIC), and per sample its row sums, from which the standard error follows. The biased value is derived
from U afterwards, by adding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hf_cka.similarity.features import Centred, row_blocks
from hf_cka.similarity.kernels import Gram, raw_tile

Pair = tuple[int, int]


@dataclass(frozen=True)
class Sums:
    """What an engine returns for a list of pairs, on the CPU in float64.

    Attributes:
        total: ``(P,)`` inner products of U-centred Gram matrices, diagonal excluded; of the whole centred Gram
            matrices where n < 4.
        rows: ``(P, n)`` their row sums, or None if no standard error was asked for.
    """

    total: torch.Tensor
    rows: torch.Tensor | None


def sample_space(grams: Sequence[Gram], pairs: Sequence[Pair], tile: int, with_rows: bool) -> Sums:
    """Sum products of U-centred Gram matrices over upper-triangular tiles.

    Args:
        grams: one Gram source per layer.
        pairs: index pairs into ``grams``; (i, i) gives the self product.
        tile: rows and columns of a tile.
        with_rows: also sum each row.

    Returns:
        The sums. Memory beyond ``with_rows`` is ``L * tile^2`` elements, twice that if many pairs share a layer.

    Example:
        >>> from hf_cka.similarity.features import centre
        >>> from hf_cka.similarity.kernels import Linear, gram_source
        >>> x = centre(torch.randn(20, 3), 0, torch.float64, keep=True)
        >>> grams = [gram_source(x, Linear(), 8)]
        >>> one, many = sample_space(grams, [(0, 0)], 20, True), sample_space(grams, [(0, 0)], 7, True)
        >>> torch.allclose(one.total, many.total), torch.allclose(one.rows.sum(1), one.total)
        (True, True)
    """
    n = grams[0].centred.n
    device, dtype = grams[0].energy.device, grams[0].centred.dtype
    left, right = (torch.tensor(side, device=device) for side in zip(*pairs, strict=True))
    dense = is_dense(len(grams), len(pairs))
    sums = torch.zeros(len(pairs), n if with_rows else 1, dtype=torch.float64, device=device)
    blocks = row_blocks(n, tile)
    for a, rows in enumerate(blocks):
        for cols in blocks[a:]:
            b, c = rows.stop - rows.start, cols.stop - cols.start
            stack = torch.empty(len(grams), b, c, dtype=dtype, device=device)
            for layer, gram in enumerate(grams):
                gram.tile(rows, cols, stack[layer])
            mirrored = rows.start != cols.start
            by_row, by_col = _products(stack, pairs, left, right, dense, with_rows and mirrored)
            if with_rows:
                sums[:, rows] += by_row
                if by_col is not None:
                    sums[:, cols] += by_col
            else:
                sums[:, 0] += by_row.sum(1) * (2 if mirrored else 1)
    return Sums(sums.sum(1).cpu(), sums.cpu() if with_rows else None)


def is_dense(layers: int, pairs: int) -> bool:
    """Whether so many pairs share layers that one product of all layers with all beats one product per pair.

    Example:
        >>> is_dense(31, 31 + 465), is_dense(31, 31 + 30)
        (True, False)
    """
    return 3 * pairs >= layers**2


def _products(
    stack: torch.Tensor, pairs: Sequence[Pair], left: torch.Tensor, right: torch.Tensor, dense: bool, with_cols: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sum the products of pairs of tiles ``(L, b, c)`` over columns ``(P, b)``, and over rows ``(P, c)`` if asked."""
    if dense:
        by_row = _gathered(stack.permute(1, 0, 2), left, right)
        return by_row, _gathered(
            stack.transpose(1, 2).contiguous().permute(1, 0, 2), left, right
        ) if with_cols else None
    row_sums, col_sums = [], []
    for i, j in pairs:
        product = stack[i] * stack[j]
        row_sums.append(product.sum(1))
        if with_cols:
            col_sums.append(product.sum(0))
    return torch.stack(row_sums).double(), torch.stack(col_sums).double() if with_cols else None


def _gathered(slabs: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """From ``(b, L, c)``, all products of layers per row, and of those the wanted pairs: ``(P, b)``."""
    return torch.bmm(slabs, slabs.transpose(1, 2))[:, left, right].T.double()


def feature_space(layers: Sequence[Centred], pairs: Sequence[Pair], block: int, with_rows: bool) -> Sums:
    """Sum the same products from cross-covariances, for the linear kernel and n well above the widths.

    With X, Y centred, C = X'Y, r and q squared row norms:
    ``U_xy = |C|^2 - n/(n-2) <r,q> + (sum r)(sum q)/((n-1)(n-2))``.

    Args:
        layers: the centred layers.
        pairs: index pairs; (i, i) gives the self product.
        block: rows that are read at once.
        with_rows: also give each sample's share, which costs as much again.

    Example:
        >>> from hf_cka.similarity.features import centre
        >>> from hf_cka.similarity.kernels import Linear, gram_source
        >>> x = centre(torch.randn(20, 3), 0, torch.float64, keep=True)
        >>> a = feature_space([x], [(0, 0)], 6, True)
        >>> b = sample_space([gram_source(x, Linear(), 8)], [(0, 0)], 8, True)
        >>> torch.allclose(a.total, b.total), torch.allclose(a.rows, b.rows)
        (True, True)
    """
    n = layers[0].n
    device = layers[0].energy.device
    blocks = row_blocks(n, block)
    totals, shares = [], []
    for i, j in pairs:
        x, y = layers[i], layers[j]
        r, q = x.energy.to(device), y.energy.to(device)
        cross = torch.zeros(x.width, y.width, dtype=x.dtype, device=device)
        # float32 sums of at most 4096 products each; longer ones are added up in float64
        exact = torch.zeros_like(cross, dtype=torch.float64) if n > 4096 and x.dtype != torch.float64 else None
        pending = 0
        for rows in blocks:
            cross.addmm_(x.block(rows).to(device).T, y.block(rows, 1).to(device))
            pending += rows.stop - rows.start
            if exact is not None and (pending >= 4096 or rows.stop == n):
                exact += cross
                cross.zero_()
                pending = 0
        if exact is not None:
            cross = exact.to(x.dtype)
        square = float((exact if exact is not None else cross.double()).square().sum())
        totals.append(square - n / (n - 2) * float(r @ q) + float(r.sum() * q.sum()) / ((n - 1) * (n - 2)))
        if with_rows:
            shares.append(_row_shares(x, y, cross, r, q, blocks).cpu())
    return Sums(torch.tensor(totals, dtype=torch.float64), torch.stack(shares) if with_rows else None)


def _row_shares(
    x: Centred, y: Centred, cross: torch.Tensor, r: torch.Tensor, q: torch.Tensor, blocks: list[slice]
) -> torch.Tensor:
    """Row sums of U(K) * U(L), float64 ``(n,)``: the products of (K_st + a_s + a_t - c) and (L_st + b_s + b_t - e).

    Written out with sum_t K_st = 0 and K_ss = r_s, so that no Gram matrix is built:
    sum_t K_st L_st = x_s' C y_s,  sum_t K_st b_t = x_s' (X' b).
    """
    n = x.n
    a, b = r / (n - 2), q / (n - 2)
    c, e = r.sum() / ((n - 1) * (n - 2)), q.sum() / ((n - 1) * (n - 2))
    weighted_x = torch.zeros(x.width, dtype=torch.float64, device=r.device)
    weighted_y = torch.zeros(y.width, dtype=torch.float64, device=r.device)
    for rows in blocks:
        weighted_x += (x.block(rows).to(r.device).T @ b[rows].to(x.dtype)).double()
        weighted_y += (y.block(rows).to(r.device).T @ a[rows].to(x.dtype)).double()
    out = n * (a - c) * (b - e) + (a - c) * b.sum() + (b - e) * a.sum() + a @ b
    out -= (r + 2 * a - c) * (q + 2 * b - e)
    for rows in blocks:
        left, right = x.block(rows).to(r.device), y.block(rows, 1).to(r.device)
        out[rows] += ((left @ cross) * right).sum(1, dtype=torch.float64)
        out[rows] += (left @ weighted_x.to(x.dtype)).double() + (right @ weighted_y.to(x.dtype)).double()
    return out


def tiny_samples(grams: Sequence[Gram], pairs: Sequence[Pair]) -> Sums:
    """Give the inner products of the whole centred Gram matrices, for fewer than 4 samples (biased only).

    Example:
        >>> from hf_cka.similarity.features import centre
        >>> from hf_cka.similarity.kernels import Linear, gram_source
        >>> x = centre(torch.tensor([[0.0], [2.0]]), 0, torch.float64, keep=True)
        >>> float(tiny_samples([gram_source(x, Linear(), 2)], [(0, 0)]).total[0] / x.energy.sum() ** 2)
        1.0
    """
    n = grams[0].centred.n
    whole = slice(0, n)
    centred = []
    for gram in grams:
        out = torch.empty(n, n, dtype=gram.centred.dtype, device=gram.energy.device)
        raw_tile(gram.centred, whole, whole, out, gram.gamma)
        out = out.double()
        centred.append((out - out.mean(0) - out.mean(1, keepdim=True) + out.mean()).cpu())
    return Sums(torch.stack([(centred[i] * centred[j]).sum() for i, j in pairs]), None)
