"""Publish pruned models: the model card, and the push that checks what it sends.

Measuring, pruning and saving never belong here.
"""

from hf_cka.hub.card import model_card
from hf_cka.hub.private import Finding, find_private
from hf_cka.hub.push import push_pruned

__all__ = ["Finding", "find_private", "model_card", "push_pruned"]
