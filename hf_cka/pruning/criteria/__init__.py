"""Criteria: what each layer, sub-layer, KV group and MLP unit is worth.

One file per family of criteria, one table per signature: ``DEPTH`` scores layers and sub-layers, ``WIDTH`` scores KV
groups and MLP units, ``EXPERTS`` whole experts. Nothing is removed here.
"""

from collections.abc import Mapping

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
from hf_cka.pruning.criteria.whole_experts import EXPERTS
from hf_cka.pruning.criteria.width import WIDTH

__all__ = [
    "DEPTH",
    "EXPERTS",
    "WIDTH",
    "CriterionEntry",
    "DepthScores",
    "ScoringContext",
    "Structure",
    "WidthScores",
    "check_usable",
    "score",
    "width_criteria",
]


def width_criteria(structures: str) -> Mapping[str, CriterionEntry]:
    """Return the criteria that can score some kinds of width, by name.

    Args:
        structures: of :class:`~hf_cka.pruning.width_budgets.WidthSettings`.

    Example:
        >>> "reap" in width_criteria("experts"), "reap" in width_criteria("units")
        (True, False)
    """
    return EXPERTS if structures == "experts" else WIDTH
