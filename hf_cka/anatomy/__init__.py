"""What a model is made of: where its layers, attention, MLP, projections and norms are.

One declarative entry per family, and a structural fallback for Llama-shaped families that are not in the table.
Nothing here computes on data, reads weights, or depends on the class of a projection.
"""

from hf_cka.anatomy.families import FAMILIES, Family
from hf_cka.anatomy.model import Anatomy, LayerSizes, find_anatomy

__all__ = ["FAMILIES", "Anatomy", "Family", "LayerSizes", "find_anatomy"]
