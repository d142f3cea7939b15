"""Criteria: what each layer, sub-layer, KV group and MLP unit is worth.

One file per family of criteria, one table per signature: ``DEPTH`` scores layers and sub-layers, ``WIDTH`` scores KV
groups and MLP units. Nothing is removed here.
"""

from hf_cka.pruning.criteria.base import (
    CriterionEntry,
    DepthScores,
    ScoringContext,
    Structure,
    WidthScores,
    check_usable,
    score,
)
from hf_cka.pruning.criteria.depth import DEPTH
from hf_cka.pruning.criteria.width import WIDTH

__all__ = [
    "DEPTH",
    "WIDTH",
    "CriterionEntry",
    "DepthScores",
    "ScoringContext",
    "Structure",
    "WidthScores",
    "check_usable",
    "score",
]
