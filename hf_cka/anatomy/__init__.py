"""What a model is made of: stacks of layers, their branches (attention, MLP) and widths (heads, units), measured.

A small random twin of the model is taken apart: what may go, and what must go with it, is seen and not listed.
Nothing here computes on data, reads the model's weights, or decides what to remove.
"""

from hf_cka.anatomy.model import OUTPUTS, Anatomy, LayerSizes, find_anatomy
from hf_cka.anatomy.parts import Branch, Findings, Layer, Slice, Stack, Width

__all__ = [
    "OUTPUTS",
    "Anatomy",
    "Branch",
    "Findings",
    "Layer",
    "LayerSizes",
    "Slice",
    "Stack",
    "Width",
    "find_anatomy",
]
