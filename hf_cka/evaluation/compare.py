"""Measure a model and others that were made from it side by side, on the same data.

What is measured is in the modules beside this one, the data that comes out in ``comparison``, and how that is put into
a report in ``comparison_report``.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from hf_cka.data import calibration, parts_of, public_name, row_text
from hf_cka.evaluation.comparison import Comparison, ComparisonSettings, Measured
from hf_cka.evaluation.cost import cache_bytes, count_flops
from hf_cka.evaluation.disagreement import disagreements
from hf_cka.evaluation.efficiency import count_parameters, decode_speed
from hf_cka.evaluation.language import perplexity
from hf_cka.evaluation.memory import model_memory
from hf_cka.evaluation.multiple_choice import multiple_choice
from hf_cka.evaluation.robustness import choice_robustness, robustness
from hf_cka.evaluation.rows import completion_loss, exact_match
from hf_cka.evaluation.running import check_causal, context_limit
from hf_cka.evaluation.similarity_map import layer_similarity
from hf_cka.evaluation.structure import layer_strip
from hf_cka.evaluation.tasks import EvaluationSettings, evaluate
from hf_cka.evaluation.training_curves import log_curves, training_curves
from hf_cka.modeling.loading import load_model, weight_files
from hf_cka.representations import collect

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = str | Mapping[str, Any]
_DECODING = {"prompt_tokens": 12, "new_tokens": 24}  # of speed and memory


def compare(
    base: Any,
    others: Mapping[str, Any] | Sequence[str],
    data: Sequence[Row],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    base_name: str = "",
    settings: ComparisonSettings | None = None,
    logs: Mapping[str, Iterable[Mapping[str, Any]]] | None = None,
    source: str = "",
    device: str = "auto",
    dtype: str = "auto",
    say: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Measure a causal language model and others made from it: quality, speed, similarity, disagreement, robustness.

    Models that are given by name are loaded one after the other, and only the base stays in memory beside one of them.
    Nothing is decided from the data, so one set serves all parts.

    Args:
        base: the reference: a loaded model, a folder or a Hub id.
        others: the other models by name, loaded or as folders or Hub ids; or a list of folders or Hub ids.
        data: texts, or rows as :func:`hf_cka.calibration` takes them; loss and exact match need ``prompt`` and
            ``completion``, accuracy needs ``question``, ``choices`` and ``gold`` (index of the right one).
        tokenizer: of all models; needed where the base is a loaded model.
        base_name: shown for the base; by default its folder or id, or "dense".
        settings: how much is measured.
        logs: training logs by name of the model (the ``log`` of `hf_cka.recover`), whose losses are drawn; those that
            folders hold are found by themselves.
        source: name of the data, for the record.
        device: for models given by name.
        dtype: for models given by name.
        say: called with what is being done.

    Raises:
        FileNotFoundError: for a folder that is not there or is no model.
        ValueError: for no data or no other model, a loaded base without tokenizer, a model that is not causal, or one
            whose tokenizer is not the base's.

    Example:
        >>> comparison = compare(dense, {"pruned": pruned}, texts, tokenizer=tokenizer)  # doctest: +SKIP
        >>> write_report(comparison.report(), "out/report.html")  # doctest: +SKIP
    """
    chosen = settings or ComparisonSettings()
    named = _named(others)
    _check_folders([base, *named.values()])
    if not len(data):
        raise ValueError("There is no text to measure on: data is empty. Pass at least one text or row.")
    name = base_name or (public_name(base) if isinstance(base, str) else "") or "dense"
    if name in named:
        name = f"{name} (base)"

    def fresh_memory(shown: str, what: Any) -> dict[str, Any]:
        """Before the model is loaded here: there is most room then."""
        if not isinstance(what, str) or "speed" not in chosen.parts:
            return {}
        say(f"memory of {shown}")
        try:
            return {"memory": model_memory(what, **_DECODING, device=device, dtype=dtype)}
        except RuntimeError as error:
            return {"notes": [f"no peak memory: {error}"]}

    memory = fresh_memory(name, base)
    say("loading the base")
    model, tokens = _loaded(base, tokenizer, device, dtype)
    texts = [text for row in data if (text := _text(row, tokens))]
    if not texts:
        raise ValueError(f"There is no text to measure on: all {len(data)} rows are empty.")
    bench = _Bench(model, tokens, data, texts, chosen, dict(logs or {}), say)
    reference = bench.measure(name, model, base, memory)
    measured = []
    for other, what in named.items():
        memory = fresh_memory(other, what)
        say(f"loading {other}")
        loaded, own = _loaded(what, tokens, device, dtype)
        _check_tokenizer(other, tokens, own)
        measured.append(bench.measure(other, loaded, what, memory))
        del loaded, own
        gc.collect()
    return Comparison(reference, tuple(measured), chosen, source, str(next(model.parameters()).device))


@dataclass
class _Bench:
    """What all models are measured on, and the base's side of what compares two."""

    base: Any
    tokenizer: Any
    data: Sequence[Row]
    texts: list[str]
    settings: ComparisonSettings
    logs: Mapping[str, Iterable[Mapping[str, Any]]]
    say: Callable[[str], None]
    _readouts: Any = field(default=None, init=False)
    _batches: Any = field(default=None, init=False)

    @property
    def questions(self) -> list[Mapping[str, Any]]:
        found = [row for row in self.data if not isinstance(row, str) and _is_question(row)]
        return found[: self.settings.rows]

    def measure(self, name: str, model: Any, origin: Any, memory: Mapping[str, Any]) -> Measured:
        check_causal(model, "compare")
        parts, options = self.settings.parts, self.settings
        count = count_parameters(model)
        found: dict[str, Any] = {"notes": [], **memory}
        folder = Path(origin).expanduser() if isinstance(origin, str) else None
        if folder is not None and folder.is_dir():
            found["curves"] = training_curves(folder)
            found["file_bytes"] = sum(file.stat().st_size for file in weight_files(folder)) or None
        if name in self.logs:
            found["curves"] = log_curves(self.logs[name])
        if options.tasks:
            self.say(f"tasks of {name}")
            limits = EvaluationSettings(limit=options.limit, seed=options.seed)
            results = evaluate(model, options.tasks, tokenizer=self.tokenizer, settings=limits, progress=False).tasks
            found["tasks"] = {f"{r.task} {metric}": value for r in results for metric, value in r.metrics.items()}
        if "quality" in parts:
            self.say(f"quality of {name}")
            found |= self._quality(model)
        if "speed" in parts:
            self.say(f"speed of {name}")
            found |= self._speed(model)
        if "robustness" in parts:
            self.say(f"robustness of {name}")
            limit = context_limit(model) or 96
            damage: dict[str, Any] = {"rates": options.rates, "seed": options.seed, "progress": False}
            lengths: dict[str, Any] = {"max_context": min(64, limit * 2 // 3), "max_continuation": min(32, limit // 3)}
            found["robustness"] = robustness(model, self.tokenizer, self.texts[: options.rows], **lengths, **damage)
            if self.questions:
                try:
                    found["choice_robustness"] = choice_robustness(model, self.tokenizer, self.questions, **damage)
                except ValueError as error:  # a damaged question may be longer than the context
                    found["notes"].append(f"no robustness of the questions: {error}")
        if model is not self.base:
            self._compare(name, model, found)
        found["notes"] = tuple(found["notes"])
        return Measured(name, count.total, count.non_embedding, layer_strip(name, model), **found)

    def _quality(self, model: Any) -> dict[str, Any]:
        options = self.settings
        context = min(options.context, context_limit(model) or options.context)
        text = "\n\n".join(self.texts)[: 12 * options.max_tokens]  # no tokenizer makes tokens of 12 letters on average
        found: dict[str, Any] = {
            "perplexity": perplexity(
                model, self.tokenizer, text, context=context, max_tokens=options.max_tokens, progress=False
            )
        }
        rows = [row for row in self.data if not isinstance(row, str) and {"prompt", "completion"} <= set(row)]
        if rows:
            rows = rows[: options.rows]
            found["completion"] = completion_loss(model, self.tokenizer, rows, progress=False)
            found["exact"] = exact_match(
                model, self.tokenizer, rows, max_new_tokens=options.max_new_tokens, progress=False
            )
        if self.questions:
            found["choices"] = multiple_choice(model, self.tokenizer, self.questions, progress=False)
        return found

    def _speed(self, model: Any) -> dict[str, Any]:
        """Short measurements of base and model in turn, so that a drift of the machine hits both."""
        turn = (model,) if model is self.base else (self.base, model)
        speeds = [
            [decode_speed(which, **_DECODING, repeats=1, progress=False) for which in turn]
            for _ in range(self.settings.repeats)
        ]
        ratio = median(row[-1].tokens_per_second / row[0].tokens_per_second for row in speeds)
        return {
            "tokens_per_second": median(row[-1].tokens_per_second for row in speeds),
            "speed_ratio": ratio,
            "decode_flops": count_flops(model, prompt_tokens=12).decode,
            "cache_bytes_per_token": cache_bytes(model, 32) / 32,
        }

    def _compare(self, name: str, model: Any, found: dict[str, Any]) -> None:
        options = self.settings
        if not {"similarity", "disagreement"} & set(options.parts):
            return
        if self._batches is None:
            self._batches = calibration(
                self.texts, self.tokenizer, options.num_samples, options.max_length, options.seed
            )
        if "similarity" in options.parts:
            self.say(f"similarity of the layers of {name}")
            if sum(len(batch["input_ids"]) for batch in self._batches) < 4:
                found["notes"].append("similarity of layers needs at least 4 texts")
            else:
                self._readouts = self._readouts or collect(self.base, self._batches, progress=False)
                try:
                    found["similarity"] = layer_similarity(
                        self.base, model, self._batches, base_readouts=self._readouts, progress=False
                    )
                except ValueError as error:
                    found["notes"].append(f"no similarity of layers: {error}")
        if "disagreement" in options.parts:
            self.say(f"disagreement of {name} with the base")
            found["disagreement"] = disagreements(
                self.base, model, self.tokenizer, self._batches, top=options.top, progress=False
            )


def _named(others: Mapping[str, Any] | Sequence[str]) -> dict[str, Any]:
    if isinstance(others, Mapping):
        named = dict(others)
    else:
        named = {}
        for other in others:
            short = public_name(other) or str(other)
            named[short if short not in named else str(other)] = other
    if not named:
        raise ValueError("There is nothing to compare the base with: give at least one other model.")
    return named


def _check_folders(models: Sequence[Any]) -> None:
    """Say before anything is loaded that a folder holds no model."""
    for model in models:
        folder = Path(model).expanduser() if isinstance(model, str) else None
        if folder is not None and folder.is_dir() and not (folder / "config.json").is_file():
            adapter = (folder / "adapter_config.json").is_file()
            raise FileNotFoundError(
                f"The folder {str(folder)!r} is no model: it has no config.json. "
                + ("It holds an adapter: merge it first." if adapter else "Give the folder of a saved model.")
            )


def _loaded(model: Any, tokenizer: Any, device: str, dtype: str) -> tuple[Any, Any]:
    if not isinstance(model, str):
        if tokenizer is None:
            raise ValueError("A loaded model needs its tokenizer: pass tokenizer=...")
        return model, _tokenizer(tokenizer)
    loaded, processor = load_model(model, device, dtype)
    return loaded, _tokenizer(processor)


def _tokenizer(processor: Any) -> Any:
    found = parts_of(processor).tokenizer
    if found is None:
        raise ValueError(
            f"compare measures causal language models, and {type(processor).__name__} reads no text. For models of "
            "pictures or sound run hf-cka evaluate on each."
        )
    return found


def _check_tokenizer(name: str, base: Any, other: Any) -> None:
    if base is other or base.get_vocab() == other.get_vocab():
        return
    raise ValueError(
        f"{name!r} has another tokenizer than the base ({len(other)} and {len(base)} tokens, or other ones): "
        "perplexity and disagreement would compare different things. Compare models made from one base."
    )


def _is_question(row: Mapping[str, Any]) -> bool:
    return {"question", "choices", "gold"} <= set(row)


def _text(row: Row, tokenizer: Any) -> str:
    """The text of a row; of a question with choices, that with the right one."""
    if not isinstance(row, str) and _is_question(row):
        return f"{row['question']} {row['choices'][row['gold']]}"
    return row_text(row, tokenizer)
