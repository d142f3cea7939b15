"""The table of depth criteria: what each layer and sub-layer is worth.

Leave-one-out criteria run the model without each structure; the others read weights, positions, or one forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from hf_cka.pruning.criteria.base import CriterionEntry, DepthScores, ScoringContext, Structure
from hf_cka.pruning.criteria.leave_one_out import leave_one_out
from hf_cka.similarity import pairwise_similarity


def cka_scores(context: ScoringContext, structures: Sequence[Structure], estimator: str = "debiased") -> DepthScores:
    """Return 1 - CKA between the model's readout and the readout without each structure.

    Args:
        context: the model, the data, and the pooling of the readout.
        structures: what to leave out, one at a time.
        estimator: ``"debiased"``, or ``"biased"`` as the paper does.

    Raises:
        ValueError: for too few samples, or a readout of the whole model that is the same for every sample.

    Source: arXiv 2405.17081, section 3: the structure whose removal leaves the readout most alike goes first.
    """
    left = leave_one_out(context, structures)
    assert left.reference is not None
    result = pairwise_similarity(
        [left.reference, *left.readouts],
        pairs=[(0, k + 1) for k in range(len(structures))],
        estimator=estimator,
        standard_error=estimator == "debiased",
    )
    if result.status[0] not in ("ok", "outlier_dominated"):
        raise ValueError(
            f"The readout of the whole model is {result.status[0].replace('_', ' ')} over the {result.n} samples, so "
            f"nothing can be compared with it. Read another token: pooling is {context.pooling.kind!r}; try 'mean'."
        )
    notes = {
        s: f"CKA is undefined: without it the readout is {status.replace('_', ' ')}"
        for s, status, value in zip(structures, result.status[1:], result.values, strict=True)
        if math.isnan(value)
    }
    return DepthScores(
        tuple(structures),
        tuple(math.inf if math.isnan(v) else 1 - float(v) for v in result.values),
        details={
            "cka": tuple(map(float, result.debiased)),
            "cka_biased": tuple(map(float, result.biased)),
            "standard_error": tuple(map(float, result.standard_error)),
        },
        notes=notes,
        layer_calls=left.layer_calls,
    )


_CKA_PAPER = "Pons et al. 2024, arXiv 2405.17081"

#: name -> criterion
DEPTH: dict[str, CriterionEntry] = {
    entry.name: entry
    for entry in (
        CriterionEntry(
            "cka",
            cka_scores,
            "1 - debiased CKA between the readouts with and without the structure",
            _CKA_PAPER + "; debiased",
            lazy=True,
        ),
        CriterionEntry(
            "cka_biased",
            partial(cka_scores, estimator="biased"),
            "1 - biased CKA between the readouts with and without the structure",
            _CKA_PAPER,
            lazy=True,
        ),
    )
}
