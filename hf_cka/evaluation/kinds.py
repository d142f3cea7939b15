"""The kinds of task that are measured here, by name: which function measures one, and what data it reads."""

from __future__ import annotations

import random
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hf_cka.data import AUDIO, IMAGE, load_rows, row_text
from hf_cka.evaluation.classification import Classification, classify, classify_by_words
from hf_cka.evaluation.classification_media import classify_audio, classify_images
from hf_cka.evaluation.cost import measure_efficiency
from hf_cka.evaluation.language import perplexity
from hf_cka.evaluation.multiple_choice import TEMPLATE, multiple_choice
from hf_cka.evaluation.results import EvaluationSettings
from hf_cka.evaluation.rows import completion_loss, exact_match
from hf_cka.evaluation.running import context_limit
from hf_cka.evaluation.speech import NORMALISATION, word_error_rate
from hf_cka.evaluation.sts import sentence_similarity
from hf_cka.lookup import lookup
from hf_cka.modeling.loading import weight_files

Measured = tuple[dict[str, float], dict[str, float], int, dict[str, Any]]


def _perplexity(model: Any, tokenizer: Any, text: str, settings: EvaluationSettings, progress: bool) -> Measured:
    context = min(settings.context, context_limit(model) or settings.context)
    result = perplexity(
        model,
        tokenizer,
        text,
        context=context,
        stride=settings.stride,
        max_tokens=settings.max_tokens,
        batch_size=settings.batch_size,
        progress=progress,
    )
    details = {"context": result.context, "stride": result.stride}
    return {"perplexity": result.value, "nll": result.nll}, {}, result.tokens, details


def _multiple_choice(model: Any, tokenizer: Any, rows: Any, settings: EvaluationSettings, progress: bool) -> Measured:
    template = settings.template or TEMPLATE
    result = multiple_choice(
        model, tokenizer, rows, template=template, batch_size=settings.batch_size, progress=progress
    )
    metrics = {"acc": result.accuracy, "acc_norm": result.accuracy_norm}
    errors = {"acc": result.standard_error, "acc_norm": result.standard_error_norm}
    return metrics, errors, result.n, {"template": template}


def _classification(model: Any, tokenizer: Any, rows: Any, settings: EvaluationSettings, progress: bool) -> Measured:
    options: dict[str, Any] = {"batch_size": settings.batch_size, "progress": progress}
    details: dict[str, Any] = {}
    if settings.label_words:
        if settings.template:
            options["template"] = settings.template
        result = classify_by_words(model, tokenizer, rows, settings.label_words, **options)
        details["label_words"] = list(settings.label_words)
    else:
        result = classify(model, tokenizer, rows, **options)
    metrics = {"accuracy": result.accuracy, "majority": result.majority}
    return metrics, {"accuracy": result.standard_error}, result.n, details


def _exact_match(model: Any, tokenizer: Any, rows: Any, settings: EvaluationSettings, progress: bool) -> Measured:
    result = exact_match(
        model,
        tokenizer,
        rows,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        progress=progress,
    )
    details = {"max_new_tokens": settings.max_new_tokens}
    return {"exact_match": result.value}, {"exact_match": result.standard_error}, result.n, details


def _completion_loss(model: Any, tokenizer: Any, rows: Any, settings: EvaluationSettings, progress: bool) -> Measured:
    result = completion_loss(model, tokenizer, rows, batch_size=settings.batch_size, progress=progress)
    return {"completion_loss": result.value}, {}, result.rows, {"tokens": result.tokens}


def _image_classification(
    model: Any, processor: Any, rows: Any, settings: EvaluationSettings, progress: bool
) -> Measured:
    return _classified(
        classify_images(model, processor, rows, batch_size=settings.batch_size, progress=progress), settings
    )


def _audio_classification(
    model: Any, processor: Any, rows: Any, settings: EvaluationSettings, progress: bool
) -> Measured:
    return _classified(
        classify_audio(model, processor, rows, batch_size=settings.batch_size, progress=progress), settings
    )


def _classified(result: Classification, settings: EvaluationSettings) -> Measured:
    metrics = {"accuracy": result.accuracy, "majority": result.majority}
    return metrics, {"accuracy": result.standard_error}, result.n, _drawn(settings, len(result.skipped))


def _speech(model: Any, processor: Any, rows: Any, settings: EvaluationSettings, progress: bool) -> Measured:
    result = word_error_rate(model, processor, rows, batch_size=settings.batch_size, progress=progress)
    error = result.standard_error
    details = {"words": result.words, "normalisation": NORMALISATION, **_drawn(settings, len(result.skipped))}
    return {"wer": result.value}, {} if error is None else {"wer": error}, result.n, details


def _sts(model: Any, tokenizer: Any, rows: Any, settings: EvaluationSettings, progress: bool) -> Measured:
    result = sentence_similarity(model, tokenizer, rows, batch_size=settings.batch_size, progress=progress)
    return (
        {"spearman": result.spearman},
        {"spearman": result.standard_error},
        result.n,
        {"pooling": "mean", **_drawn(settings, 0)},
    )


def _drawn(settings: EvaluationSettings, skipped: int) -> dict[str, Any]:
    """Which rows were measured, where it was not all of them."""
    details: dict[str, Any] = {"skipped": skipped} if skipped else {}
    return details if settings.limit is None else {**details, "drawn_with_seed": settings.seed}


def _efficiency(
    model: Any, tokenizer: Any, folder: Path | None, settings: EvaluationSettings, progress: bool
) -> Measured:
    found = measure_efficiency({"model": model}, progress=progress)["model"]
    metrics = found.metrics()
    files = sum(file.stat().st_size for file in weight_files(folder)) if folder is not None else 0
    if files:
        metrics["file_bytes"] = files
    first = found.speeds[0]
    details = {"prompt_tokens": first.prompt_tokens, "new_tokens": first.new_tokens, "repeats": first.repeats}
    return metrics, {}, first.repeats, details


# what is measured here; one entry is one more kind of task
KINDS: dict[str, Callable[[Any, Any, Any, EvaluationSettings, bool], Measured]] = {
    "perplexity": _perplexity,
    "multiple_choice": _multiple_choice,
    "classification": _classification,
    "exact_match": _exact_match,
    "completion_loss": _completion_loss,
    "image_classification": _image_classification,
    "audio_classification": _audio_classification,
    "speech": _speech,
    "sts": _sts,
    "efficiency": _efficiency,
}
# what a kind reads, where that is no text: it gets the whole processor
MEDIA = {"image_classification": IMAGE, "audio_classification": AUDIO, "speech": AUDIO}
# whose first rows are unlike the others: on the first 500 of the STS benchmark (dev; all captions) MiniLM has .926, on
# all of it .867
DRAWN = (*MEDIA, "sts")
WITHOUT_DATA = ("efficiency",)


def parse_task(name: str, dataset: str | None) -> tuple[str, str] | None:
    """Return the kind and the dataset of a task of this room, or None for a name that lm-eval must know.

    Args:
        name: KIND, or KIND:DATASET.
        dataset: of a kind that is named without one.

    Raises:
        ValueError: for data that are missing or too much, or a name near one of a kind.

    Example:
        >>> parse_task("speech:clips", None), parse_task("piqa", None)
        (('speech', 'clips'), None)
    """
    kind, colon, where = name.partition(":")
    if name in WITHOUT_DATA:
        return kind, ""
    if kind in WITHOUT_DATA:
        raise ValueError(f"The task {kind!r} takes no data: write it without {colon + where!r}.")
    if kind in KINDS:
        if not (where or dataset):
            raise ValueError(f"The task {name!r} needs data: write {kind}:FILE, or give a dataset.")
        return kind, where or str(dataset)
    if colon and get_close_matches(kind, KINDS, n=1):
        lookup(KINDS, kind, "kind of task")  # raises, with the near name
    return None


def task_data(kind: str, where: str, settings: EvaluationSettings) -> Any:
    """Return rows; for perplexity one text: a text file as it is, or other rows with an empty line between them.

    A limit takes the first rows. Of data that lie in order (class folders, the genres of the STS benchmark) it draws as
    many by the seed.

    Args:
        kind: of ``KINDS``.
        where: the dataset.
        settings: with the split, the limit and the seed.
    """
    path = Path(where).expanduser()
    if kind == "perplexity" and path.suffix.lower() == ".txt" and path.is_file() and settings.limit is None:
        return path.read_text(encoding="utf-8")
    if kind in DRAWN:
        dataset = load_rows(where, settings.split)
        if settings.limit is None or settings.limit >= len(dataset):
            return dataset
        return dataset.select(sorted(random.Random(settings.seed).sample(range(len(dataset)), settings.limit)))
    rows = list(load_rows(where, settings.split))[: settings.limit]
    return "\n\n".join(text for row in rows if (text := row_text(row))) if kind == "perplexity" else rows
