"""Measure what a model is worth: quality on held-out data, speed, memory, size; and write the report.

Everything here measures and describes. Nothing here decides what is good enough, changes a model, or trains one.
"""

from hf_cka.evaluation.blocks import (
    Check,
    Checks,
    Curve,
    Curves,
    Excerpt,
    Excerpts,
    Frontier,
    Heatmap,
    LayerScores,
    LayerStack,
    Point,
    Strip,
    Table,
)
from hf_cka.evaluation.efficiency import (
    DecodeSpeed,
    MemoryPeak,
    ParameterCount,
    count_parameters,
    decode_speed,
    peak_memory,
)
from hf_cka.evaluation.language import Perplexity, perplexity
from hf_cka.evaluation.multiple_choice import MultipleChoice, ScoredItem, multiple_choice
from hf_cka.evaluation.report import Highlight, ReportData, Section, library_versions, write_report
from hf_cka.evaluation.rows import CompletionLoss, ExactMatch, Example, completion_loss, exact_match

__all__ = [
    "Check",
    "Checks",
    "CompletionLoss",
    "Curve",
    "Curves",
    "DecodeSpeed",
    "ExactMatch",
    "Example",
    "Excerpt",
    "Excerpts",
    "Frontier",
    "Heatmap",
    "Highlight",
    "LayerScores",
    "LayerStack",
    "MemoryPeak",
    "MultipleChoice",
    "ParameterCount",
    "Perplexity",
    "Point",
    "ReportData",
    "ScoredItem",
    "Section",
    "Strip",
    "Table",
    "completion_loss",
    "count_parameters",
    "decode_speed",
    "exact_match",
    "library_versions",
    "multiple_choice",
    "peak_memory",
    "perplexity",
    "write_report",
]
