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
from hf_cka.evaluation.classification import Classification, classify, classify_by_words
from hf_cka.evaluation.classification_media import classify_audio, classify_images
from hf_cka.evaluation.compare import compare
from hf_cka.evaluation.comparison import Comparison, ComparisonSettings
from hf_cka.evaluation.cost import Efficiency, Flops, count_flops, measure_efficiency
from hf_cka.evaluation.disagreement import Disagreements, disagreements
from hf_cka.evaluation.efficiency import (
    DecodeSpeed,
    ParameterCount,
    count_parameters,
    decode_speed,
)
from hf_cka.evaluation.energy import Energy, generation_energy
from hf_cka.evaluation.language import Perplexity, perplexity
from hf_cka.evaluation.memory import MemoryPeak, ModelMemory, model_memory, peak_memory
from hf_cka.evaluation.multiple_choice import MultipleChoice, ScoredItem, multiple_choice
from hf_cka.evaluation.report import Highlight, ReportData, Section, library_versions, write_report
from hf_cka.evaluation.robustness import ChoiceRobustness, Robustness, choice_robustness, robustness
from hf_cka.evaluation.rows import CompletionLoss, ExactMatch, Example, completion_loss, exact_match
from hf_cka.evaluation.similarity_map import LayerSimilarity, layer_similarity
from hf_cka.evaluation.speech import Transcript, WordErrorRate, word_error_rate
from hf_cka.evaluation.structure import layer_strip, original_layers
from hf_cka.evaluation.sts import SentenceSimilarity, sentence_similarity
from hf_cka.evaluation.tasks import EvaluationResult, EvaluationSettings, TaskResult, evaluate
from hf_cka.evaluation.training_curves import training_curves

__all__ = [
    "Check",
    "Checks",
    "ChoiceRobustness",
    "Classification",
    "Comparison",
    "ComparisonSettings",
    "CompletionLoss",
    "Curve",
    "Curves",
    "DecodeSpeed",
    "Disagreements",
    "Efficiency",
    "Energy",
    "EvaluationResult",
    "EvaluationSettings",
    "ExactMatch",
    "Example",
    "Excerpt",
    "Excerpts",
    "Flops",
    "Frontier",
    "Heatmap",
    "Highlight",
    "LayerScores",
    "LayerSimilarity",
    "LayerStack",
    "MemoryPeak",
    "ModelMemory",
    "MultipleChoice",
    "ParameterCount",
    "Perplexity",
    "Point",
    "ReportData",
    "Robustness",
    "ScoredItem",
    "Section",
    "SentenceSimilarity",
    "Strip",
    "Table",
    "TaskResult",
    "Transcript",
    "WordErrorRate",
    "choice_robustness",
    "classify",
    "classify_audio",
    "classify_by_words",
    "classify_images",
    "compare",
    "completion_loss",
    "count_flops",
    "count_parameters",
    "decode_speed",
    "disagreements",
    "evaluate",
    "exact_match",
    "generation_energy",
    "layer_similarity",
    "layer_strip",
    "library_versions",
    "measure_efficiency",
    "model_memory",
    "multiple_choice",
    "original_layers",
    "peak_memory",
    "perplexity",
    "robustness",
    "sentence_similarity",
    "training_curves",
    "word_error_rate",
    "write_report",
]
