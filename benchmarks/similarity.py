"""Time and error of hf_cka against other ways to compute CKA on the same stored features.

    python benchmarks/similarity.py [--quick] [--threads 1] [--rounds 3] [--output benchmarks/results/similarity.md]

The peers are optional packages: `pip install --no-deps pytorch-cka torch-cka` (they also need matplotlib and tqdm).

How they are fed. Both peers read features by hooks on a model. Here the model is a stack of identity modules that emit
the stored features, so that only their engines are timed, with all samples in one batch (which is also what makes
their value the full-sample one). pytorch-cka has a second entry, `cka_from_features`; both are timed. The hook engines
know only all pairs, and compute all where consecutive ones are wanted; beside that, `cka_from_features` and torch-cka
are called pair by pair there. The plain formula is what one writes by hand, per pair and in float32: centre both, then
||X'Y||^2 / (||X'X|| ||Y'Y||) ("features"), or the same from the n x n Gram matrices ("Gram").

What is compared. hf_cka computes the debiased and the biased value, and the standard error, in one call; the peers give
the debiased value alone, the plain formula the biased one alone. Each error is the largest difference to a float64
textbook computation of the same estimator, on the pairs among 8 evenly spaced layers (for torch-cka at n=4096, which
takes minutes, on the first with the last). Rounds are interleaved in one process, and the best of each is taken.

A time marked ~ is extrapolated. The cost of every engine is a*L + b*L^2 in the number of layers for all pairs, a*L for
consecutive ones: the engine is timed at two small numbers of layers (at one if linear), and a, b solved for.
With one thread the seconds are CPU seconds of the process, which other processes disturb less than the wall clock.

Features: a synthetic residual stream. Each layer adds a low-rank function of the one before and some noise, all share
a mean of 3 times their spread, and from a third of the depth on one dimension is 50 times larger, as in real decoders.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import math
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hf_cka.similarity import pairwise_similarity

Features = list[torch.Tensor]
Engine = Callable[[Features, str], torch.Tensor]  # an (L, L) matrix; only the wanted pairs are read


@dataclass(frozen=True)
class Case:
    """Features of one shape, and which pairs are wanted."""

    layers: int
    n: int
    width: int
    pairs: str

    @property
    def name(self) -> str:
        return f"{'all' if self.pairs == 'all' else 'consecutive'} pairs, {self.layers} x ({self.n}, {self.width})"


CASES = (
    Case(31, 1024, 576, "all"),
    Case(31, 4096, 576, "all"),
    Case(33, 512, 4096, "all"),
    Case(31, 128, 4096, "consecutive"),
)
QUICK = (Case(9, 256, 64, "all"), Case(9, 64, 512, "consecutive"))


@dataclass
class Row:
    """One engine on one case."""

    engine: str
    estimator: str
    run: Engine
    subset: tuple[int, ...] | None = None  # numbers of layers to time instead of all
    seconds: list[float] = field(default_factory=list)
    error: float = math.nan
    note: str = ""


def residual_stream(case: Case, dtype: torch.dtype, seed: int = 0) -> Features:
    """Make the features of a case."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(case.n, case.width, generator=g) + 3 * torch.randn(case.width, generator=g)
    out = []
    for layer in range(case.layers):
        rank = max(2, case.width // 16)
        down = torch.randn(case.width, rank, generator=g) / case.width**0.5
        up = torch.randn(rank, case.width, generator=g) / rank**0.5
        x = x + 0.3 * torch.tanh(x @ down) @ up + 0.1 * torch.randn(case.n, case.width, generator=g)
        if layer == case.layers // 3:
            x[:, 7] *= 50
        out.append(x.to(dtype))
    return out


def oracle(features: Features, pairs: list[tuple[int, int]]) -> dict[tuple[int, int], tuple[float, float]]:
    """Debiased and biased CKA in float64, from the textbook formulas."""
    n = len(features[0])
    grams = {}
    for k in {k for pair in pairs for k in pair}:
        x = features[k].double()
        x -= x.mean(0)
        grams[k] = x @ x.T

    def products(i: int, j: int) -> tuple[float, float]:
        k, m = grams[i], grams[j]
        both = float(k.flatten() @ m.flatten())
        k_diagonal, m_diagonal = k.diagonal(), m.diagonal()
        # sums over the Gram matrices without their diagonals
        rows, cols = k.sum(0) - k_diagonal, m.sum(0) - m_diagonal
        corner = rows.sum() * cols.sum() / ((n - 1) * (n - 2))
        return float(both - k_diagonal @ m_diagonal + corner - 2 / (n - 2) * (rows @ cols)), both

    own = {k: products(k, k) for k in grams}
    out = {}
    for i, j in pairs:
        debiased, biased = products(i, j)
        out[i, j] = (debiased / math.sqrt(own[i][0] * own[j][0]), biased / math.sqrt(own[i][1] * own[j][1]))
    return out


def wanted(layers: int, pairs: str) -> list[tuple[int, int]]:
    """List the pairs of a case."""
    every = list(itertools.combinations(range(layers), 2))
    return every if pairs == "all" else [(i, j) for i, j in every if j == i + 1]


# --- engines ------------------------------------------------------------------------------------------------------


def ours(estimator: str, standard_error: bool = True) -> Engine:
    """hf_cka with its defaults."""

    def run(features: Features, pairs: str) -> torch.Tensor:
        result = pairwise_similarity(features, pairs=pairs, standard_error=standard_error)  # type: ignore[arg-type]
        return torch.from_numpy(result.matrix(estimator))

    return run


def plain(space: str) -> Engine:
    """The formula one writes by hand, per pair."""

    def run(features: Features, pairs: str) -> torch.Tensor:
        out = torch.full((len(features), len(features)), math.nan)
        for i, j in wanted(len(features), pairs):
            x, y = (features[k].float() for k in (i, j))
            x, y = x - x.mean(0), y - y.mean(0)
            if space == "features":
                top = (x.T @ y).norm() ** 2
                out[i, j] = top / ((x.T @ x).norm() * (y.T @ y).norm())
            else:
                k, m = x @ x.T, y @ y.T
                out[i, j] = (k * m).sum() / (k.norm() * m.norm())
        return out

    return run


class Emitter(torch.nn.Module):
    """A model whose layers emit stored features."""

    def __init__(self, features: Features) -> None:
        super().__init__()
        self.stored = features
        self.layers = torch.nn.ModuleList(torch.nn.Identity() for _ in features)

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        for layer, x in zip(self.layers, self.stored, strict=True):
            last = layer(x)
        return last


def one_batch(features: Features) -> torch.utils.data.DataLoader:
    """A loader whose only batch stands for all samples."""
    data = torch.utils.data.TensorDataset(torch.zeros(len(features[0]), 1))
    return torch.utils.data.DataLoader(data, batch_size=len(data))


def names(features: Features) -> list[str]:
    """The module names of an `Emitter`."""
    return [f"layers.{i}" for i in range(len(features))]


def pytorch_cka_hooks(features: Features, pairs: str) -> torch.Tensor:
    """The hook engine of the package pytorch-cka, one model with itself."""
    from cka import compute_cka

    model = Emitter(features)
    (matrix,) = compute_cka(model, model, one_batch(features), layers=names(features), device="cpu", progress=False)
    return matrix


def pytorch_cka_features(features: Features, pairs: str) -> torch.Tensor:
    """Its function on features."""
    from cka import cka_from_features

    if pairs == "all":
        return cka_from_features(features, features)
    out = torch.full((len(features), len(features)), math.nan)
    for i, j in wanted(len(features), pairs):
        out[i, j] = cka_from_features(features[i], features[j]).item()
    return out


def torch_cka(features: Features, pairs: str) -> torch.Tensor:
    """The package torch-cka, one model with itself; it only knows all pairs."""
    return _torch_cka(features, features)


def torch_cka_pair_by_pair(features: Features, pairs: str) -> torch.Tensor:
    """The same, called for one pair after the other, each as two models of one layer."""
    out = torch.full((len(features), len(features)), math.nan)
    for i, j in wanted(len(features), pairs):
        out[i, j] = _torch_cka(features[i : i + 1], features[j : j + 1]).item()
    return out


def _torch_cka(x: Features, y: Features) -> torch.Tensor:
    from torch_cka import CKA

    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        job = CKA(Emitter(x), Emitter(y), "a", "b", names(x), names(y))
        job.compare(one_batch(x))
    return job.hsic_matrix


def rows_for(case: Case) -> list[Row]:
    """The engines of a case, and which of them are extrapolated."""
    small = case.n * case.n * case.width * case.layers < 1e8
    few = None if small else (2,) if case.pairs == "consecutive" else (2, 4)
    heavy = None if small else (2, 4) if case.pairs == "consecutive" else (1, 2)
    # stacked Gram matrices of all layers, and two copies of them
    large = case.layers * case.n**2 * 4 * 3 > 2 << 30
    peers_subset = (4, 8) if large else None
    gram_form = None if case.pairs == "consecutive" else few  # a candidate for the fastest there
    rows = [
        Row("hf_cka (both estimators, standard error)", "debiased", ours("debiased")),
        Row("hf_cka, standard_error=False", "biased", ours("biased", standard_error=False)),
        Row("plain formula, Gram", "biased", plain("Gram"), gram_form),
        Row("plain formula, features", "biased", plain("features"), few),
    ]
    rows.append(Row("pytorch-cka, compute_cka", "debiased", pytorch_cka_hooks, peers_subset))
    rows.append(Row("pytorch-cka, cka_from_features", "debiased", pytorch_cka_features, peers_subset))
    rows.append(Row("torch-cka", "debiased", torch_cka, heavy))
    if case.pairs == "consecutive":
        rows.append(Row("torch-cka, pair by pair", "debiased", torch_cka_pair_by_pair))
    return rows


# --- measuring ----------------------------------------------------------------------------------------------------


def clock() -> float:
    """Seconds of this process on the CPU with one thread, which other processes disturb less; else of the wall."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def timed(row: Row, features: Features, pairs: str) -> float:
    """Seconds of one run, extrapolated if the row says so."""

    def once(count: int) -> float:
        part = features[:count]
        start = clock()
        row.run(part, pairs)
        return clock() - start

    full = len(features)
    if row.subset is None:
        return once(full)
    if len(row.subset) == 1:  # consecutive pairs: the same work for every pair
        (count,) = row.subset
        return once(count) * (full - 1) / (count - 1)
    a, b = row.subset
    ta, tb = once(a), once(b)
    square = max(0.0, (tb / b - ta / a) / (b - a))
    return (tb / b - square * b) * full + square * full**2


def error_of(row: Row, features: Features, pairs: str, truth: dict[tuple[int, int], tuple[float, float]]) -> float:
    """Largest difference to the oracle; infinite if any value is not finite."""
    # engines that are fast enough run on all layers, exactly as they are timed; the others on those of the oracle
    kept = list(range(len(features))) if row.subset is None else sorted({k for pair in truth for k in pair})
    if row.run is torch_cka and len(features[0]) > 2048:  # minutes for all of them: the one pair farthest apart
        kept = [kept[0], kept[-1]]
        truth = {(kept[0], kept[1]): truth[kept[0], kept[1]]}
    place = {k: p for p, k in enumerate(kept)}
    matrix = row.run([features[k] for k in kept], pairs).double()
    column = 0 if row.estimator == "debiased" else 1
    differences = [abs(float(matrix[place[i], place[j]]) - value[column]) for (i, j), value in truth.items()]
    return math.inf if any(math.isnan(d) for d in differences) else max(differences)


def measure(case: Case, dtype: torch.dtype, rounds: int) -> list[Row]:
    """Time all engines of a case in turns, and compare them with the oracle."""
    features = residual_stream(case, dtype)
    kept = [round(k * (case.layers - 1) / 7) for k in range(8)] if case.pairs == "all" else list(range(8))
    truth = oracle(features, [(kept[a], kept[b]) for a, b in wanted(8, case.pairs)])
    rows = rows_for(case)
    for row in rows:
        try:
            row.error = error_of(row, features, case.pairs, truth)
        except ImportError:
            row.note = "not installed"
        except (RuntimeError, AssertionError, ValueError) as problem:
            row.note = f"fails: {type(problem).__name__}: {str(problem).splitlines()[0][:70]}"
    # the biased values of hf_cka are checked by its second row; the first row answers for both
    rows[0].error = max(rows[0].error, rows[1].error)
    for turn in range(rounds):
        for row in rows:
            # extrapolated rows are far from the fastest; one measurement is enough
            if not row.note and (turn == 0 or row.subset is None):
                row.seconds.append(timed(row, features, case.pairs))
    return rows


def table(case: Case, dtype: torch.dtype, rows: list[Row]) -> list[str]:
    """Lines of Markdown."""
    base = min(rows[0].seconds)
    out = [
        f"### {case.name}, {str(dtype).removeprefix('torch.')}",
        "",
        "| engine | estimator | seconds | times hf_cka | max error |",
        "|---|---|---:|---:|---:|",
    ]
    for row in rows:
        estimator = "debiased + biased" if row is rows[0] else row.estimator
        if row.note:
            out.append(f"| {row.engine} | {estimator} | {row.note} | | |")
            continue
        best = min(row.seconds)
        mark = "~" if row.subset else ""
        out.append(f"| {row.engine} | {estimator} | {mark}{best:.3g} | {mark}{best / base:.3g} | {row.error:.1e} |")
    return [*out, ""]


def verdict(case: Case, dtype: torch.dtype, rows: list[Row]) -> str:
    """One line: the three targets."""
    base = min(rows[0].seconds)
    others = {row.engine: min(row.seconds) / base for row in rows[2:] if row.seconds}
    fastest = min(others, key=others.__getitem__)
    slow = others.get("torch-cka")
    parts = [
        f"fastest other is {fastest} at {others[fastest]:.2f}x ({'met' if others[fastest] >= 1 else 'MISSED'})",
        f"torch-cka {slow:.0f}x ({'met' if slow >= 50 else 'MISSED'})" if slow else "torch-cka has no time",
        f"error {rows[0].error:.0e} ({'met' if rows[0].error < 1e-5 else 'MISSED'})",
    ]
    return f"- {case.name}, {str(dtype).removeprefix('torch.')}: " + "; ".join(parts)


def main() -> None:
    """Run all cases and print, or write, the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes, seconds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="also write the report there")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    lines, verdicts = [], []
    for case in QUICK if arguments.quick else CASES:
        for dtype in (torch.float32, torch.bfloat16):
            rows = measure(case, dtype, arguments.rounds)
            block = table(case, dtype, rows)
            print("\n".join(block), flush=True)
            lines += block
            verdicts.append(verdict(case, dtype, rows))
    if arguments.quick:
        verdicts = ["(not judged: the targets are for the full shapes)"]
    head = [
        "# Similarity: time and error",
        "",
        f"`python benchmarks/similarity.py --threads {arguments.threads} --rounds {arguments.rounds}"
        f"{' --quick' if arguments.quick else ''}`, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.machine()} CPU, {arguments.threads} thread{'' if arguments.threads == 1 else 's'}. How the peers "
        "are fed, what ~ means and what the features are: see the docstring of the script. Trust the ratios, taken in "
        "one process in turns, more than the seconds.",
        "",
        "Targets: never slower than the fastest other, at least 50 times faster than torch-cka, error below 1e-5.",
        "",
        *verdicts,
        "",
    ]
    print("\n".join(head))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text("\n".join([*head, *lines]))
        print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
