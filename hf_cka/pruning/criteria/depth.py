"""The table of depth criteria: what each layer and sub-layer is worth. A criterion is one row and its test."""

from __future__ import annotations

from functools import partial

from hf_cka.pruning.criteria import loraprune
from hf_cka.pruning.criteria.base import CriterionEntry
from hf_cka.pruning.criteria.consensus import score_cka, score_consensus, score_kl, score_one, score_perplexity
from hf_cka.pruning.criteria.controls import (
    score_last,
    score_magnitude,
    score_random,
    score_taylor,
    score_third_to_last,
)
from hf_cka.pruning.criteria.shapes import DISSIMILARITIES
from hf_cka.pruning.criteria.stream import score_angular, score_block_influence

_CKA = "Pons et al. 2024, arXiv 2405.17081"
_CONSENSUS = "arXiv 2411.14345"
_SHORTENED = "Kim et al. 2024, arXiv 2402.02834"

#: name -> criterion
DEPTH: dict[str, CriterionEntry] = {
    entry.name: entry
    for entry in (
        CriterionEntry("cka", score_cka, "1 - debiased CKA of the readouts with and without it", _CKA, lazy=True),
        CriterionEntry(
            "cka_biased",
            partial(score_cka, estimator="biased"),
            "1 - biased CKA of the readouts with and without it",
            _CKA,
            lazy=True,
        ),
        CriterionEntry("consensus", score_consensus, "sum of its ranks by eight dissimilarities", _CONSENSUS),
        CriterionEntry(
            "consensus_by_class",
            partial(score_consensus, labelled=True),
            "sum of its ranks by eight dissimilarities, with Gaussians within classes",
            _CONSENSUS,
            needs_labels=True,
        ),
        *(
            CriterionEntry(name, score_one(name), f"{entry.description}, with and without it", entry.source, lazy=True)
            for name, entry in DISSIMILARITIES.items()
            if name != "cka"
        ),
        CriterionEntry(
            "kl",
            score_kl,
            "KL(output || output without it)",
            "arXiv 2506.04513",
            needs_logits=True,
            lazy=True,
        ),
        CriterionEntry(
            "perplexity",
            score_perplexity,
            "log-perplexity of the model without it",
            _SHORTENED,
            needs_logits=True,
            needs_next_token=True,
            lazy=True,
        ),
        CriterionEntry(
            "block_influence",
            score_block_influence,
            "1 - cosine of the stream before and after it, all tokens",
            "Men et al. 2024, arXiv 2403.03853",
        ),
        CriterionEntry(
            "angular",
            score_angular,
            "angle between the stream before and after it, last token",
            "Gromov et al. 2024, arXiv 2403.17887",
        ),
        CriterionEntry("magnitude", score_magnitude, "mean absolute weight", _SHORTENED, needs_data=False),
        CriterionEntry(
            "taylor",
            score_taylor,
            "sum of |weight * gradient|",
            _SHORTENED,
            needs_logits=True,
            needs_gradients=True,
        ),
        CriterionEntry(
            "loraprune",
            loraprune.score_depth,
            "squared weights times their gradients, estimated from those of the LoRA adapters",
            "Zhang et al. 2023, arXiv 2305.18403",
            needs_logits=True,
            needs_adapters=True,
        ),
        CriterionEntry("last", score_last, "its position: the last goes first", "control", needs_data=False),
        CriterionEntry(
            "third_to_last",
            score_third_to_last,
            "its position: the third-to-last layer goes first",
            "arXiv 2602.06127",
            kinds=("layer",),
            needs_data=False,
        ),
        CriterionEntry("random", score_random, "a draw", "control", needs_data=False),
    )
}
