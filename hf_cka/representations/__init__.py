"""Run a model over calibration batches and read what enters and leaves each layer.

Readouts are taken by hooks inside the layers, because ``hidden_states[-1]`` of a language model is after the final
norm. No decisions are taken here.
"""

from hf_cka.representations.masks import rows_of
from hf_cka.representations.pooling import SINK_TOKENS, Pooling, default_pooling, pool, resolve_pooling
from hf_cka.representations.readouts import Readouts, collect, stream_cka
from hf_cka.representations.running import (
    check_runnable,
    distributed,
    evaluating,
    forward,
    is_main_process,
    run,
    token_mask,
)

__all__ = [
    "SINK_TOKENS",
    "Pooling",
    "Readouts",
    "check_runnable",
    "collect",
    "default_pooling",
    "distributed",
    "evaluating",
    "forward",
    "is_main_process",
    "pool",
    "resolve_pooling",
    "rows_of",
    "run",
    "stream_cka",
    "token_mask",
]
