"""Score the layers of a model and choose the ones that matter.

A layer matters when its output is unlike its input: its score is ``1 - CKA(input, output)`` (arXiv 2602.05988).
Nothing here trains, removes or needs PEFT; the result is data that says which layers, and why.
"""

from hf_cka.selection.choose import CRITERIA, select_layers
from hf_cka.selection.record import SIDECAR, LayerSelection

__all__ = ["CRITERIA", "SIDECAR", "LayerSelection", "select_layers"]
