"""What a saved folder says about itself: the pruning record, the structure, who can load it. Reads, never writes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

from hf_cka.modeling.loading import weight_files
from hf_cka.modeling.plan import PruningPlan

SCORES_FILE = "pruning_scores.json"
_FORMATS = (1, 2)
# how an architecture ends -> the task the Hub files it under
_TASKS = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
    "ForAudioClassification": "audio-classification",
    "ForCTC": "automatic-speech-recognition",
    "Model": "feature-extraction",
}
_LOCAL_SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet", ".arrow")


@dataclass(frozen=True)
class Facts:
    """What is known about a pruned checkpoint from its folder alone.

    Attributes:
        architecture: the class that was saved ("LlamaForCausalLM").
        auto_class: the auto class that loads it, or the class itself where no auto class knows its head.
        model_type: of `config.json`.
        rung: who can load it ("stock", "relabel" or "hf_cka").
        task: the Hub's name for what it does, if it has one.
        plan: what was removed, by original index.
        kv_groups: per original layer, (before, after); (0, 0) where a layer has none, or the record does not say.
        units: likewise.
        parameters: (before, after).
        file_bytes: size of the weight files.
        record: the whole `pruning` entry of `config.json`.
        scores: what `pruning_scores.json` holds, if it is there.
        base_model: Hub id of the base, if the record names one.
        base_name: its name in words: the id, or the name of the folder it was loaded from.
        has_tokenizer: whether a tokenizer is saved beside the model.
    """

    architecture: str
    auto_class: str
    model_type: str
    rung: Literal["stock", "relabel", "hf_cka"]
    task: str | None
    plan: PruningPlan
    kv_groups: tuple[tuple[int, int], ...]
    units: tuple[tuple[int, int], ...]
    parameters: tuple[int, int]
    file_bytes: int
    record: Mapping[str, Any]
    scores: Any
    base_model: str | None
    base_name: str | None
    has_tokenizer: bool

    @property
    def ratio(self) -> float:
        """Removed parameters over all parameters."""
        return 1 - self.parameters[1] / self.parameters[0]

    @property
    def without_attention(self) -> bool:
        """Whether some layer that is left has no attention."""
        return bool(set(self.plan.removed_attention) - set(self.plan.removed_mlp))


def read_facts(folder: str | os.PathLike[str]) -> Facts:
    """Read what a saved folder says about itself.

    Args:
        folder: what `save_pruned`, or `save_pretrained` of a pruned model, wrote.

    Raises:
        FileNotFoundError: if there is no such folder, or no checkpoint in it.
        ValueError: if the checkpoint has no pruning record, or one that this version cannot read.

    Example:
        >>> read_facts("nowhere")
        Traceback (most recent call last):
        FileNotFoundError: There is no folder 'nowhere'. Give the folder that save_pruned wrote.
    """
    from hf_cka.modeling.modeling_hf_cka import MODEL_TYPE
    from hf_cka.modeling.probe import auto_class

    path = Path(folder)
    config = _read_config(path)
    record = config.get("pruning")
    if not isinstance(record, Mapping) or "plan" not in record:
        raise ValueError(
            f"{str(path)!r} holds a {config.get('model_type')!r} checkpoint without a 'pruning' record in config.json, "
            "so nothing can be said about what was removed. Save the model that hf_cka pruned with hf_cka.save_pruned."
        )
    if record.get("format_version") not in _FORMATS:
        raise ValueError(
            f"The pruning record of {str(path)!r} has format_version {record.get('format_version')!r}; this hf_cka "
            f"reads {' and '.join(map(str, _FORMATS))}. Update hf_cka."
        )
    missing = sorted({"parameters_after", "parameters_before", "widths_before"} - set(record))
    if missing:
        raise ValueError(f"The pruning record of {str(path)!r} lacks {', '.join(missing)}. Save the model again.")
    plan = PruningPlan.from_dict(record["plan"])
    architecture = (config.get("architectures") or [""])[0]
    model_type = config.get("model_type", "")
    rung: Literal["stock", "relabel", "hf_cka"] = "stock"
    if model_type == MODEL_TYPE:
        rung = "hf_cka"
    elif model_type == "mistral" and plan.model_type == "llama":
        rung = "relabel"
    loader = auto_class(architecture).__name__
    if loader == "AutoModel" and rung == "stock" and not architecture.endswith("Model"):
        loader = architecture  # a head that no auto class knows; AutoModel would drop it
    gone = set(plan.removed_layers)
    widths = record["widths_before"]
    return Facts(
        architecture=architecture,
        auto_class=loader,
        model_type=model_type,
        rung=rung,
        task=next((task for ending, task in _TASKS.items() if architecture.endswith(ending)), None),
        plan=plan,
        kv_groups=_widths(widths["num_key_value_heads"], plan, "heads", gone | set(plan.removed_attention)),
        units=_widths(widths["intermediate_size"], plan, "units", gone | set(plan.removed_mlp)),
        parameters=(record["parameters_before"], record["parameters_after"]),
        file_bytes=sum(file.stat().st_size for file in weight_files(path)),
        record=record,
        scores=_read_scores(path),
        base_model=hub_id(record.get("base_model")),
        base_name=bare_name(record.get("base_model")),
        has_tokenizer=(path / "tokenizer_config.json").is_file(),
    )


def hub_id(name: Any) -> str | None:
    """Return a name if it can be a Hub id with a namespace, else None.

    Args:
        name: what a record or a user gave.

    Example:
        >>> hub_id("HuggingFaceTB/SmolLM2-135M"), hub_id("stories260k"), hub_id("data/train.jsonl"), hub_id("/x/y")
        ('HuggingFaceTB/SmolLM2-135M', None, None, None)
    """
    if not isinstance(name, str) or name.lower().endswith(_LOCAL_SUFFIXES):
        return None
    return name if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) else None


def bare_name(name: Any) -> str | None:
    """Return a name without the folders of a machine.

    Args:
        name: a name, a Hub id or a path.

    Example:
        >>> bare_name("/data/models/llama"), bare_name("user/llama"), bare_name(None)
        ('llama', 'user/llama', None)
    """
    if not name:
        return None
    text = str(name)
    if os.path.isabs(text) or text.startswith(("~", ".")) or PureWindowsPath(text).drive:
        return PureWindowsPath(text).name
    return text


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise FileNotFoundError(f"There is no folder {str(path)!r}. Give the folder that save_pruned wrote.")
    file = path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{str(path)!r} holds no checkpoint: it has no config.json. Give the folder that save_pruned wrote."
        )
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(file)!r} is not JSON ({error}). Save the checkpoint again.") from error


def _read_scores(path: Path) -> Any:
    file = path / SCORES_FILE
    return json.loads(file.read_text(encoding="utf-8")).get("scores") if file.is_file() else None


def _widths(before: list[int], plan: PruningPlan, kind: str, gone: set[int]) -> tuple[tuple[int, int], ...]:
    """What each original layer had and has."""
    kept = plan.kept.get(kind, {})
    before = before if len(before) == plan.num_layers else [0] * plan.num_layers  # those of another stack
    return tuple((width, 0 if i in gone else len(kept[i]) if i in kept else width) for i, width in enumerate(before))
