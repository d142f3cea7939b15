"""The model card of a pruned checkpoint, written from its folder alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_cka.hub.facts import Facts, bare_name, hub_id, read_facts
from hf_cka.hub.tables import (
    layer_stack,
    markdown_table,
    removed_table,
    results_table,
    score_table,
    width_table,
)
from hf_cka.modeling.modeling_hf_cka import stock_name

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

TEMPLATE = Path(__file__).with_name("templates") / "pruned_model_card.md"
BEGIN = "<!-- hf_cka begins: text between these marks is made from config.json and replaced; text outside is kept -->"
END = "<!-- hf_cka ends -->"
# stands in the examples for the repository's name where that is not known yet; `push_pruned` fills it in
PLACEHOLDER = "USER/NAME"
_SECONDS = 4.0  # to wait for the Hub when asking for the licence of the base
_CALIBRATION = {
    "num_samples": "{:,} samples",
    "samples": "{:,} samples",
    "num_tokens": "{:,} tokens",
    "max_length": "cut at {:,} tokens",
    "seed": "seed {}",
    "hash": "hash {}",
}
_LICENSE_FIELDS = ("license", "license_name", "license_link")


def model_card(
    folder: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    license: str | None = None,
    results: Any = None,
    datasets: str | Sequence[str] | None = None,
    limits: str | Sequence[str] | None = None,
    repo_id: str | None = None,
) -> ModelCard:
    """Return the model card of a pruned checkpoint; nothing is written (`card.save(f"{folder}/README.md")` does).

    A README that is in the folder already is updated: the text between the card's own marks is replaced (appended
    where there are none), everything else is kept, and so is its metadata, except for what is given here.

    Args:
        folder: what `save_pruned` wrote.
        base_model: Hub id of the base; by default what the record names.
        license: its licence, as the Hub spells it ("apache-2.0"); by default what the base's own card says. Where
            neither is known the card has none, and says so.
        results: measured results: rows, or the path of a JSON file with rows; see `hf_cka.hub.tables.results_table`.
        datasets: Hub ids of the data; by default the calibration data, where the record names it by its Hub id.
        limits: more sentences for the section on limits.
        repo_id: the repository it is for, named in the examples.

    Raises:
        FileNotFoundError: if there is no such folder, no checkpoint in it, or no such results file.
        ValueError: for a checkpoint without a pruning record, a name that is no Hub id, results of another form, or a
            README whose marks or metadata are broken.
        ImportError: without jinja2.

    Source: the metadata fields are those of https://huggingface.co/docs/hub/model-cards. The relation to the base is
    "finetune": the Hub's vocabulary has no "pruned", and guesses wrong where none is given.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hf_cka import PruningPlan, apply_plan, save_pruned
        >>> config = LlamaConfig(
        ...     num_hidden_layers=3, hidden_size=8, intermediate_size=16, num_attention_heads=2, vocab_size=16
        ... )
        >>> plan = PruningPlan(num_layers=3, model_type="llama", removed_layers=(1,))
        >>> model = apply_plan(LlamaForCausalLM(config), plan)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = save_pruned(model, f"{folder}/out", verify=False)
        ...     card = model_card(saved.folder, base_model="user/base", license="mit")
        >>> card.data.pipeline_tag, card.data.base_model_relation, card.data.license
        ('text-generation', 'finetune', 'mit')
    """
    from huggingface_hub import ModelCard

    facts = read_facts(folder)
    for name, value in (("base_model", base_model), ("repo_id", repo_id)):
        if value is not None and hub_id(value) is None:
            raise ValueError(f"{name}={value!r} is not a Hub id; give one such as 'user/name'.")
    extra = [datasets] if isinstance(datasets, str) else list(datasets or ())
    table = results_table(results) if results is not None else ("", None, None)
    old = _existing(Path(folder) / "README.md")
    given = {"license": license} if license else {}
    kept = {k: v for k in _LICENSE_FIELDS if old is not None and (v := old.data.get(k))}
    edited = old.data.get("base_model") if old is not None else None
    base = base_model or (edited if isinstance(edited, str) else facts.base_model)
    known, note = (given or kept, "") if given or kept else _license_of_base(base, facts)
    card = _render(
        facts,
        _metadata(facts, base, known, extra),
        base_model=base,
        base_name=base or facts.base_name,
        title=_title(facts, base, repo_id),
        license=known.get("license"),
        license_note=note,
        repo=repo_id or PLACEHOLDER,
        results=table,
        limits=[*_limits(facts, bool(table[0])), *([limits] if isinstance(limits, str) else limits or ())],
    )
    if old is None:
        return card
    explicit = {name for name, value in (("base_model", base_model), ("datasets", extra)) if value}
    if given:
        explicit.add("license")
        for name in _LICENSE_FIELDS:  # a name and a link of another licence
            old.data.pop(name)
    return ModelCard(_merged(old, card, explicit))


def _metadata(facts: Facts, base: str | None, license: Mapping[str, Any], datasets: list[str]) -> dict[str, Any]:
    record = facts.record
    source = (record.get("calibration") or {}).get("source")
    named = hub_id(str(source).partition(":")[0]) if source and not Path(str(source)).exists() else None
    settings = record.get("settings") or {}
    found = {
        "library_name": "transformers",
        "pipeline_tag": facts.task,
        "base_model": base,
        "base_model_relation": "finetune" if base else None,
        **license,
        "datasets": datasets or ([named] if named else None),
        "tags": ["hf_cka", "pruned", *(["cka"] if "cka" in settings.values() else [])],
    }
    return {name: value for name, value in found.items() if value is not None}


def _license_of_base(base: str | None, facts: Facts) -> tuple[dict[str, Any], str]:
    """The licence fields of the base's own card; where they are not to be had, a sentence that says why."""
    from huggingface_hub import ModelCard, hf_hub_download

    if base is None:
        return {}, "the base model is not known by its Hub id."
    revision = facts.record.get("base_revision") if base == facts.base_model else None
    try:
        file = hf_hub_download(base, "README.md", revision=revision, etag_timeout=_SECONDS)
        data = ModelCard.load(file, ignore_metadata_errors=True).data
    except Exception:  # the client's errors have no common base: offline mode, DNS, TLS, HTTP status, broken YAML
        return {}, f"the card of {base} could not be read when this one was made."
    found = {name: value for name in _LICENSE_FIELDS if (value := data.get(name))}
    return found, "" if "license" in found else f"the card of {base} states none."


def _title(facts: Facts, base: str | None, repo_id: str | None) -> str:
    if repo_id:
        return repo_id.partition("/")[2]
    name = base or facts.base_name or facts.plan.model_type
    count = facts.parameters[1]
    return f"{name.rpartition('/')[2]}, pruned to {f'{count / 1e6:,.1f}M' if count >= 1e6 else f'{count:,}'} parameters"


def _loaders(facts: Facts) -> str:
    """Who can load the checkpoint; the transformers rows are what the project tests."""
    if facts.rung == "hf_cka":
        vllm = (
            "no: its transformers backend refuses layers without attention"
            if facts.without_attention
            else "through its transformers backend, with `--trust-remote-code`"
        )
        rows = [("transformers", "with hf_cka, or with `trust_remote_code=True`"), ("vLLM", vllm), ("llama.cpp", "no")]
    else:
        as_what = f"as any `{facts.model_type}` model; hf_cka is not needed"
        rows = [("transformers", as_what), ("vLLM, llama.cpp", as_what)]
    return markdown_table(["program", "loads it"], rows)


def _limits(facts: Facts, measured: bool) -> list[str]:
    limits = ["What the base model's card says about biases, risks and intended use holds here too."]
    if not measured:
        limits.insert(
            0, "Removing parts of a model costs quality, and how much was not measured here: measure it first."
        )
    calibration = facts.record.get("calibration") or {}
    samples = calibration.get("num_samples") or calibration.get("samples")
    if samples:
        limits.append(
            f"What to remove was decided on {samples:,} samples of the data named above; on text of another kind "
            "(other languages, code, long contexts) more may be lost."
        )
    return limits


def _calibration(record: Mapping[str, Any]) -> str:
    data = dict(record.get("calibration") or {})
    source = bare_name(data.pop("source", None))
    parts = [source] if source else []
    for name, text in _CALIBRATION.items():
        if (value := data.pop(name, None)) is not None:
            parts.append(text.format(value))
    parts += [f"{name} {value}" for name, value in data.items() if value is not None]
    return ", ".join(parts).replace("|", "\\|") or "not recorded"


def _history(record: Mapping[str, Any]) -> str:
    steps = record.get("history") or []
    if len(steps) < 2:
        return ""
    rows = [(number, step.get("method"), step.get("parameters_after")) for number, step in enumerate(steps, 1)]
    return markdown_table(["round", "method", "parameters after"], rows)


def _searchable(record: Mapping[str, Any]) -> bool:
    """Whether the method and settings of the record are those of a `PruningConfig`."""
    from hf_cka.pruning.config import PruningConfig

    try:
        PruningConfig.from_dict({"method": record["method"], **record["settings"]})
    except (KeyError, TypeError, ValueError):
        return False
    return True


def _render(
    facts: Facts, metadata: Mapping[str, Any], *, results: tuple[str, str | None, str | None], **more: Any
) -> Any:
    from huggingface_hub import ModelCard, ModelCardData

    settings = facts.record.get("settings")
    scores = score_table(facts)
    fields = {
        **more,
        "facts": facts,
        "record": facts.record,
        "begin": BEGIN,
        "end": END,
        "layer_stack": layer_stack(facts),
        "removed_table": removed_table(facts),
        "width_table": width_table(facts),
        "score_title": scores[0],
        "score_table": scores[1],
        "loaders": _loaders(facts),
        "stock_class": stock_name(facts.architecture),
        "calibration": _calibration(facts.record),
        "settings": json.dumps(settings) if settings else "",
        "history": _history(facts.record),
        "searchable": _searchable(facts.record),
        "results_table": results[0],
        "results_command": results[1],
        "results_notes": results[2],
    }
    try:
        card = ModelCard.from_template(ModelCardData(**metadata), template_path=str(TEMPLATE), **fields)
    except ImportError as error:
        raise ImportError("Writing a model card needs jinja2: pip install 'hf_cka[report]'") from error
    card.text = card.text.rstrip() + "\n"  # jinja drops the last line's end
    return card


def _existing(path: Path) -> Any:
    """The card that is in the folder, or None."""
    from huggingface_hub import ModelCard

    if not path.is_file():
        return None
    try:
        card = ModelCard(path.read_text(encoding="utf-8"))
    except Exception as error:  # YAML errors and those of the Hub's own checks have no common base
        raise ValueError(
            f"The metadata of {str(path)!r} cannot be read ({error}). Repair or remove that file."
        ) from error
    begins, ends = card.text.count(BEGIN), card.text.count(END)
    if (begins, ends) not in ((0, 0), (1, 1)) or card.text.find(BEGIN) > card.text.find(END):
        raise ValueError(
            f"{str(path)!r} has {begins} marks {BEGIN.split(':')[0]!r} and {ends} marks {END!r}; it needs one of each, "
            "in this order, or none. Repair them or remove the file."
        )
    return card


def _merged(old: Any, new: Any, explicit: set[str]) -> str:
    """The old card with the new block, and with the metadata that it lacks."""
    block = new.text[new.text.index(BEGIN) : new.text.index(END) + len(END)]
    if BEGIN in old.text:
        head, tail = old.text[: old.text.index(BEGIN)], old.text[old.text.index(END) + len(END) :]
        old.text = head + block + tail
    else:
        old.text = f"{old.text.rstrip()}\n\n{block}\n"
    for name, value in new.data.to_dict().items():
        if name in explicit or not old.data.get(name):
            old.data[name] = value
        elif name in ("tags", "datasets"):
            before = old.data[name] if isinstance(old.data[name], list) else [old.data[name]]
            old.data[name] = list(dict.fromkeys([*before, *value]))
    return str(old)
