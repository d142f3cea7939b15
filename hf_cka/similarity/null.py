"""What a measure gives for features that have nothing to do with each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_cka.similarity.features import check_features
from hf_cka.similarity.measures import Measure, measure


@dataclass(frozen=True, eq=False)
class Null:
    """The distribution of a measure when the samples of y are shuffled.

    Attributes:
        observed: the value for the samples as given.
        mean: mean of the shuffled values.
        std: their standard deviation.
        values: the shuffled values, ``(permutations,)`` float64.
        p_value: share of values, the observed one included, at least as similar as the observed one.
    """

    observed: float
    mean: float
    std: float
    values: np.ndarray
    p_value: float


def permutation_null(
    name: str | Callable[[Any, Any], float], x: Any, y: Any, *, permutations: int = 100, seed: int = 0
) -> Null:
    """Return the distribution of a measure under shuffled samples.

    Procrustes and CCA are far from 0 for unrelated features (0.5 and 1.0 at n=128 and width 384): compare them with
    their null, not with 0.

    Args:
        name: a name of `MEASURES`, a `Measure`, or any ``(x, y) -> float`` where higher is more similar.
        x: features ``(n, p)``.
        y: features ``(n, q)``.
        permutations: the number of shuffles.
        seed: of the shuffles.

    Raises:
        ValueError: for an unknown name, no permutations, or features that the measure refuses.

    Source: Phipson and Smyth 2010 for the p-value, which is never 0.

    Example:
        >>> x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
        >>> permutation_null("cka", x, x, permutations=19).p_value
        0.05
    """
    if permutations < 1:
        raise ValueError(f"permutations={permutations} must be at least 1.")
    function = measure(name) if isinstance(name, str) else name
    similar = function.higher_is_similar if isinstance(function, Measure) else True
    left, right = check_features([x, y], 2, "shuffling needs at least 2 samples.")
    observed = function(left, right)
    generator = torch.Generator().manual_seed(seed)
    values = np.array(
        [
            function(left, right[torch.randperm(len(right), generator=generator).to(right.device)])
            for _ in range(permutations)
        ]
    )
    extreme = values >= observed if similar else values <= observed
    return Null(
        observed=observed,
        mean=float(values.mean()),
        std=float(values.std(ddof=1)) if permutations > 1 else float("nan"),
        values=values,
        p_value=float((1 + extreme.sum()) / (1 + permutations)),
    )
