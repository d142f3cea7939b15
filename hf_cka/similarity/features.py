"""Feature matrices made ready for a Gram matrix: checked, centred, scaled, and judged.

A feature matrix is ``(n, d)``: n samples, d features. Models and pooling never belong here.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

Pairs = Literal["all", "consecutive"] | Sequence[tuple[int, int]]

# One sample that holds more than half of the centred energy outvotes all others together: the similarity then says
# how two layers treat that sample, not how they arrange the data.
OUTLIER_SHARE = 0.5

# What a forward pass in float32 leaves behind on inputs that are equal in exact arithmetic: a few units in the last
# place, added up over the layers. Half-precision features are judged by their storage rounding (one eps), which is
# far larger: at a spread of one eps, rounding makes up about 4 % of the energy.
FORWARD_NOISE = 16

# Rows are converted to float64 this many elements at a time, in one buffer that stays in the cache: fresh memory for
# every layer would cost more than the arithmetic.
_CHUNK = 1 << 17


@contextlib.contextmanager
def exact_math() -> Iterator[None]:
    """Run a block without gradients, autocast, or reduced-precision float32 products (TF32, bf16), then restore.

    Example:
        >>> with torch.autocast("cpu", dtype=torch.bfloat16), exact_math():
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.float32
    """
    before = torch.get_float32_matmul_precision()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        if before != "highest":
            torch.set_float32_matmul_precision("highest")
            stack.callback(torch.set_float32_matmul_precision, before)
        yield


def check_features(features: Sequence[Any], minimum: int, why: str) -> list[torch.Tensor]:
    """Return the feature matrices as floating-point tensors, or say which one cannot be used.

    Args:
        features: matrices of shape ``(n, d_l)``; tensors, or anything ``torch.as_tensor`` takes.
        minimum: the smallest n that the caller can use.
        why: what needs that many samples, and what to do instead; the end of the error message.

    Raises:
        ValueError: for no features, another shape than (n, d), no columns, an integer dtype, unequal n, or n too small.

    Example:
        >>> [tuple(f.shape) for f in check_features([torch.rand(5, 3), torch.rand(5, 2)], 2, "")]
        [(5, 3), (5, 2)]
    """
    if len(features) == 0:
        raise ValueError("No features: the list is empty. Give at least one (n, d) matrix.")
    tensors = []
    for i, raw in enumerate(features):
        x = torch.as_tensor(raw).detach()
        if x.ndim != 2 or x.shape[1] == 0:
            raise ValueError(
                f"features[{i}] has shape {tuple(x.shape)}; expected (n_samples, n_features), at least 1 feature. "
                "Pool the tokens, or flatten them with x.flatten(0, -2)."
            )
        if not x.is_floating_point():
            raise ValueError(f"features[{i}] has dtype {x.dtype}; expected floating point. Convert it with x.float().")
        if x.is_meta:
            raise ValueError(f"features[{i}] is on the meta device and holds no values. Load the weights first.")
        # MPS has no float64, and the means need it
        tensors.append(x.cpu() if x.device.type == "mps" else x)
    n = tensors[0].shape[0]
    for i, x in enumerate(tensors):
        if x.shape[0] != n:
            raise ValueError(
                f"features[{i}] has {x.shape[0]} samples and features[0] has {n}; row s of every matrix must be the "
                "same sample."
            )
    if n < minimum:
        raise ValueError(f"{n} sample{'' if n == 1 else 's'}: {why}")
    return tensors


def resolve_pairs(pairs: Pairs, count: int) -> tuple[tuple[int, int], ...]:
    """Return the pairs of layers as a tuple of index pairs.

    Args:
        pairs: ``"all"`` (every i < j), ``"consecutive"`` (every (i, i+1)), or a list of index pairs.
        count: the number of feature matrices.

    Raises:
        ValueError: for another word, an index outside ``range(count)``, or no pair at all.

    Example:
        >>> resolve_pairs("consecutive", 3)
        ((0, 1), (1, 2))
        >>> resolve_pairs([(0, 7)], 3)
        Traceback (most recent call last):
        ValueError: Pair (0, 7) is out of range: there are 3 feature matrices, numbered 0 to 2.
    """
    if isinstance(pairs, str):
        if pairs not in ("all", "consecutive"):
            raise ValueError(f"Unknown pairs {pairs!r}. Use 'all', 'consecutive', or a list of index pairs.")
        if count < 2:
            raise ValueError(f"pairs={pairs!r} needs at least 2 feature matrices; got {count}.")
        if pairs == "all":
            return tuple(itertools.combinations(range(count), 2))
        return tuple((i, i + 1) for i in range(count - 1))
    out = []
    for pair in pairs:
        if len(pair) != 2:
            raise ValueError(f"Pair {tuple(pair)!r} must hold two indices.")
        i, j = int(pair[0]), int(pair[1])
        if not (0 <= i < count and 0 <= j < count):
            raise ValueError(
                f"Pair {(i, j)} is out of range: there are {count} feature matrices, numbered 0 to {count - 1}."
            )
        out.append((i, j))
    if not out:
        raise ValueError("No pairs: the list is empty. Give index pairs, 'all', or 'consecutive'.")
    return tuple(out)


def row_blocks(n: int, size: int) -> list[slice]:
    """Cut ``range(n)`` into slices of at most ``size``.

    Example:
        >>> row_blocks(5, 2)
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def column_mean(x: torch.Tensor, index: int) -> torch.Tensor:
    """Return the column means ``(d,)`` of ``x (n, d)`` in float64.

    Args:
        x: the features.
        index: the number of the layer, for the error message.

    Raises:
        ValueError: if the features hold NaN or infinity; the message counts them and names the first.

    Example:
        >>> column_mean(torch.tensor([[1.0, 2.0], [3.0, 2.0]]), 0).tolist()
        [2.0, 2.0]
    """
    n, d = x.shape
    total = torch.zeros(d, dtype=torch.float64, device=x.device)
    for _, part in _in_float64(x):
        total += part.sum(0)
    if not bool(torch.isfinite(total).all()):
        bad = (~torch.isfinite(x)).nonzero()
        if len(bad) == 0:
            raise ValueError(f"features[{index}] holds values too large to sum in float64. Scale them down.")
        s, k = bad[0].tolist()
        raise ValueError(
            f"features[{index}] holds {len(bad)} NaN or infinite value{'' if len(bad) == 1 else 's'} (the first: "
            f"{float(x[s, k])} at sample {s}, feature {k}). Run the model in bfloat16 or float32 instead of float16, "
            "or leave that sample out."
        )
    return total / n


@dataclass(frozen=True)
class Centred:
    """One feature matrix minus its column means, scaled by a power of two to a root mean square of about 1.

    The scale keeps squares in range for any input (float16 features squared overflow float16, 1e-20 squared
    underflows float32); a power of two changes no bit of the mantissa, and no measure here depends on it.

    Attributes:
        source: the features as given, ``(n, d)``, on any device.
        mean: float64 column means ``(d,)``.
        scale: the power of two.
        energy: squared row norms after centring and scaling, float64 ``(n,)``.
        dtype: what `block` returns.
        kept: the whole centred matrix, if it is worth its memory.
        room: where `block` may write, ``(2, elements)``, shared by layers; None to allocate.
        status: "ok", "constant", "low_signal" or "outlier_dominated".
        signal_ratio: norm of the centred over the norm of the given features.
        top_sample_share: the largest share of the centred energy that one sample holds.
    """

    source: torch.Tensor
    mean: torch.Tensor
    scale: float
    energy: torch.Tensor
    dtype: torch.dtype
    kept: torch.Tensor | None
    room: torch.Tensor | None
    status: str
    signal_ratio: float
    top_sample_share: float

    @property
    def n(self) -> int:
        return self.source.shape[0]

    @property
    def width(self) -> int:
        return self.source.shape[1]

    @property
    def usable(self) -> bool:
        """Whether a similarity with this layer is a number."""
        return self.status in ("ok", "outlier_dominated")

    def block(self, rows: slice, side: int = 0) -> torch.Tensor:
        """Return the centred, scaled rows ``(b, d)``; valid until the next block of the same side is read."""
        if self.kept is not None:
            return self.kept[rows]
        shape = (rows.stop - rows.start, self.width)
        if self.room is None:
            out = torch.empty(shape, dtype=self.dtype, device=self.source.device)
        else:
            out = self.room[side, : shape[0] * shape[1]].view(shape)
        return _subtract(self.source[rows], self.mean, out).mul_(self.scale)


def centre(x: torch.Tensor, index: int, dtype: torch.dtype, keep: bool, room: torch.Tensor | None = None) -> Centred:
    """Centre a feature matrix by float64 means, and judge how much signal is left.

    Args:
        x: features ``(n, d)`` of any float dtype.
        index: the number of the layer, for error messages.
        dtype: float32 or float64, what the centred rows are returned in.
        keep: hold the centred matrix in memory, instead of centring rows when they are read.
        room: memory for the rows that are read, ``(2, elements)`` of ``dtype``.

    Raises:
        ValueError: for NaN or infinite values.

    Example:
        >>> centre(torch.tensor([[1.0], [2.0], [3.0], [2.0]]), 0, torch.float32, keep=True).status
        'ok'
        >>> centre(torch.full((4, 3), 0.1), 0, torch.float32, keep=True).status
        'constant'
    """
    n, d = x.shape
    mean = column_mean(x, index)
    kept = torch.empty(n, d, dtype=dtype, device=x.device) if keep else None
    energy = torch.empty(n, dtype=torch.float64, device=x.device)
    for rows, part in _in_float64(x):
        energy[rows] = part.sub_(mean).square_().sum(1)
        if kept is not None:
            _subtract(x[rows], mean, kept[rows])
    total = float(energy.sum())
    scale = 1.0
    if total > 0:
        # exponent of the root mean square; frexp is exact, also for denormals
        exponent = int(torch.frexp(torch.tensor(total / (n * d), dtype=torch.float64).sqrt())[1])
        scale = 2.0**-exponent
        energy *= scale
        energy *= scale
        if kept is not None:
            kept *= scale
    whole = total + n * float(mean.square().sum())
    ratio = (total / whole) ** 0.5 if whole > 0 else 0.0
    share = float(energy.max() / energy.sum()) if total > 0 else float("nan")
    return Centred(x, mean, scale, energy, dtype, kept, room, judge(ratio, share, n, x.dtype), ratio, share)


def judge(signal_ratio: float, top_sample_share: float, n: int, dtype: torch.dtype) -> str:
    """Return the status of a layer from its signal ratio and its top sample.

    Args:
        signal_ratio: norm of the centred over the norm of the given features.
        top_sample_share: the largest share of the centred energy that one sample holds.
        n: the number of samples.
        dtype: the dtype in which the features came; its resolution is the yardstick for noise.

    Example:
        >>> judge(0.002, 0.01, 128, torch.float32), judge(0.002, 0.01, 128, torch.bfloat16)
        ('ok', 'low_signal')
    """
    # float64 means of n equal values are exact to a few units in the last place
    if signal_ratio <= 8 * torch.finfo(torch.float64).eps:
        return "constant"
    if signal_ratio < noise_floor(dtype):
        return "low_signal"
    # with 2 samples each holds exactly half
    if n > 2 and top_sample_share > OUTLIER_SHARE:
        return "outlier_dominated"
    return "ok"


def noise_floor(dtype: torch.dtype) -> float:
    """Return the signal ratio below which features of this dtype are rounding noise.

    Example:
        >>> noise_floor(torch.bfloat16)
        0.0078125
    """
    eps = torch.finfo(dtype).eps
    if dtype == torch.float64:
        return FORWARD_NOISE * eps
    return max(eps, FORWARD_NOISE * torch.finfo(torch.float32).eps)


def _in_float64(x: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Blocks of rows and their float64 copies, all in the same buffer, which the caller may overwrite."""
    n, d = x.shape
    blocks = row_blocks(n, max(1, _CHUNK // d))
    if not blocks:
        return
    buffer = torch.empty(blocks[0].stop, d, dtype=torch.float64, device=x.device)
    for rows in blocks:
        part = buffer[: rows.stop - rows.start]
        part.copy_(x[rows])
        yield rows, part


def _subtract(x: torch.Tensor, mean: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Write ``x`` minus a float64 mean to ``out``, rounding only relative to the result.

    In float32 the mean is taken off in two parts, its float32 value and the rest: a float32 subtraction is correctly
    rounded, so this is as exact as subtracting in float64 and rounding once or twice, at a fifth of the time.
    """
    if out.dtype == torch.float64 or x.dtype == torch.float64:
        return out.copy_(x.double() - mean)
    high = mean.to(torch.float32)
    low = (mean - high.double()).to(torch.float32)
    return torch.sub(x, high, out=out).sub_(low)
