"""Representation similarity: pure mathematics on feature matrices ``(n_samples, n_features)``.

Models and tokenizers never belong here.
"""

from hf_cka.similarity.kernels import RBF
from hf_cka.similarity.measures import MEASURES, Measure, measure
from hf_cka.similarity.null import Null, permutation_null
from hf_cka.similarity.pairwise import cka, pairwise_similarity
from hf_cka.similarity.planner import Plan
from hf_cka.similarity.result import SimilarityResult
from hf_cka.similarity.streaming import StreamingCKA

__all__ = [
    "MEASURES",
    "RBF",
    "Measure",
    "Null",
    "Plan",
    "SimilarityResult",
    "StreamingCKA",
    "cka",
    "measure",
    "pairwise_similarity",
    "permutation_null",
]
