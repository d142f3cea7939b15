"""What is trained to heal a pruned model: which parameters, chosen before training and merged after it.

Running the training never belongs here (see `recovery_run`), nor does the loss (see `distillation`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn

from hf_cka.anatomy import Anatomy, find_anatomy
from hf_cka.data import Batch
from hf_cka.lookup import lookup
from hf_cka.pruning.history import recorded_plan
from hf_cka.selection import select_layers

_VERSION = 1

# how the ranks of LoRA are spread over the layers
RANK_BUDGETS = {
    "uniform": "the same rank everywhere",
    "importance": "by the block influence of each layer, the mean kept",
}
# Adam's, where none is given. A Trainer's own are for all weights, and heal next to nothing with few of them trained.
LEARNING_RATES = {"lora": 2e-4, "cka_lora": 2e-4, "norms": 2e-3, "full": 5e-5}
# settings that only some methods read
_ONLY_FOR = {
    "rank": ("lora", "cka_lora"),
    "alpha": ("lora", "cka_lora"),
    "dropout": ("lora", "cka_lora"),
    "rank_budget": ("lora",),
    "keep_ratio": ("cka_lora",),
}


@dataclass(frozen=True)
class RecoveryConfig:
    """Which parameters of a pruned model are trained.

    Args:
        method: ``"lora"`` (adapters in every projection, merged at the end), ``"cka_lora"`` (only in the layers that
            CKA chooses on the pruned model, arXiv 2602.05988), ``"norms"`` (norms and biases, PERP, arXiv 2312.15230)
            or ``"full"``.
        rank: of LoRA.
        alpha: of LoRA; the update is scaled by ``alpha / rank``. By default twice the rank.
        dropout: of LoRA, 0 to 1.
        rank_budget: of ``"lora"`` over the layers: ``"uniform"``, or ``"importance"``, which gives layers that change
            the hidden state more a higher rank (CFSP, arXiv 2409.13199); the mean stays ``rank``.
        keep_ratio: share of the layers ``"cka_lora"`` adapts, above 0 and at most 1.
        version: of this format.

    Raises:
        ValueError: for an unknown name (near ones are listed), a value out of range, or a setting that the method does
            not read.

    Example:
        >>> config = RecoveryConfig("lora", rank=4)
        >>> config.alpha, RecoveryConfig.from_json(config.to_json()) == config
        (8.0, True)
        >>> RecoveryConfig("norm")
        Traceback (most recent call last):
        ValueError: Unknown recovery method 'norm'. Did you mean: 'norms'?
    """

    method: str = "lora"
    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    rank_budget: str = "uniform"
    keep_ratio: float = 0.5
    version: int = _VERSION

    def __post_init__(self) -> None:
        if self.version != _VERSION:
            raise ValueError(
                f"This config has version {self.version}; this hf_cka reads version {_VERSION}. Update it."
            )
        lookup(RECOVERIES, self.method, "recovery method")
        lookup(RANK_BUDGETS, self.rank_budget, "rank budget")
        for field in fields(self):
            given = getattr(self, field.name) != field.default
            if given and self.method not in _ONLY_FOR.get(field.name, (self.method,)):
                readers = " and ".join(repr(name) for name in _ONLY_FOR[field.name])
                raise ValueError(
                    f"{field.name}={getattr(self, field.name)!r} is for the method {readers}; {self.method!r} does not "
                    "read it. Leave it out."
                )
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1.")
        if not 0 < self.keep_ratio <= 1:
            raise ValueError(f"keep_ratio={self.keep_ratio} must be above 0 and at most 1.")
        if self.alpha is None and self.method in _ONLY_FOR["alpha"]:
            object.__setattr__(self, "alpha", 2.0 * self.rank)

    @property
    def needs_batches(self) -> bool:
        """Whether the pruned model is measured before it is trained."""
        return self.method == "cka_lora" or self.rank_budget == "importance"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RecoveryConfig:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: for unknown fields, and as the constructor.
        """
        unknown = sorted(set(data) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"Not a recovery config: unknown fields {unknown}.")
        return cls(**data)

    def to_json(self) -> str:
        """Return the config as JSON."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> RecoveryConfig:
        """Read what `to_json` wrote."""
        return cls.from_dict(json.loads(text))


def prepare_recovery(model: Any, config: RecoveryConfig | str, batches: Iterable[Batch] | None = None) -> Any:
    """Make exactly those parameters of a model trainable that a recovery trains.

    Args:
        model: a pruned model without adapters (any transformers model will do), changed in place.
        config: which parameters; a name stands for the method with its defaults.
        batches: model-ready dicts, for ``"cka_lora"`` and ``rank_budget="importance"``, which measure the model.

    Returns:
        The model, or for LoRA the `PeftModel` around it. Seed torch before: LoRA starts from random weights.

    Raises:
        ValueError: for a model with adapters, one whose weights are quantized and would have to be trained, missing
            batches, or a method that finds nothing to train; before anything is changed.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(
        ...     num_hidden_layers=1, hidden_size=8, intermediate_size=16, num_attention_heads=2, vocab_size=16
        ... ))
        >>> model = prepare_recovery(model, "norms")
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['model.layers.0.input_layernorm.weight', 'model.layers.0.post_attention_layernorm.weight', 'model.norm.weight']
    """
    config = RecoveryConfig(config) if isinstance(config, str) else config
    anatomy = find_anatomy(model)
    bare: Any = anatomy.model
    if getattr(bare, "peft_config", None) or getattr(bare, "_hf_peft_config_loaded", False):
        raise ValueError(
            "The model holds adapters already. Merge them (`model = peft_model.merge_and_unload()`), or train them "
            "with your own trainer."
        )
    if config.needs_batches and batches is None:
        raise ValueError(
            f"Recovery {config.method!r} with rank_budget={config.rank_budget!r} measures the pruned model first: pass "
            "batches, for example hf_cka.calibration(texts, tokenizer)."
        )
    return RECOVERIES[config.method](anatomy, config, batches)


def finish_recovery(model: Any) -> Any:
    """Merge what recovery added, so that the model is a bare one again, all its parameters trainable.

    Args:
        model: what `prepare_recovery` returned, trained.

    Returns:
        The model without adapters, of the class it had before.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     num_hidden_layers=1, hidden_size=8, intermediate_size=16, num_attention_heads=2, vocab_size=16
        ... )
        >>> type(finish_recovery(prepare_recovery(LlamaForCausalLM(config), "lora"))).__name__
        'LlamaForCausalLM'
    """
    bare = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    for parameter in bare.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return bare


def _lora(anatomy: Anatomy, config: RecoveryConfig, batches: Iterable[Batch] | None) -> Any:
    from peft import LoraConfig, get_peft_model

    settings: dict[str, Any] = _lora_settings(anatomy, config)
    stacks = _pruned_stacks(anatomy)
    if config.rank_budget == "importance":
        data = list(batches or ())
        pattern: dict[str, Any] = {}
        for on in stacks:
            path = on.stack.path
            chosen = select_layers(on.model, data, 1.0, criterion="block_influence", stack=path, progress=False)
            for index, rank in enumerate(spread_ranks(chosen.scores, config.rank)):
                # keys are regular expressions that PEFT matches at the end of a name
                pattern |= {rf"^{name}".replace(".", r"\."): rank for name in _projections(on, index)}
        settings["rank_pattern"] = pattern
        settings["alpha_pattern"] = {key: settings["lora_alpha"] * rank / config.rank for key, rank in pattern.items()}
    targets = [name for on in stacks for index in range(on.num_layers) for name in _projections(on, index)]
    return get_peft_model(anatomy.model, LoraConfig(target_modules=targets, **settings))


def _cka_lora(anatomy: Anatomy, config: RecoveryConfig, batches: Iterable[Batch] | None) -> Any:
    from peft import get_peft_model

    from hf_cka.lora import CKALoraConfig

    settings, stacks = _lora_settings(anatomy, config), _pruned_stacks(anatomy)
    where = stacks[0].stack.path if len(stacks) == 1 else None
    chosen = CKALoraConfig.from_model(anatomy.model, batches, keep_ratio=config.keep_ratio, stack=where, **settings)
    # by full name: in a pruned model a projection may be gone from some of the layers
    chosen.target_modules = chosen.selection.module_names()
    chosen.layers_to_transform = chosen.layers_pattern = None
    return get_peft_model(anatomy.model, chosen)


def _norms(anatomy: Anatomy, config: RecoveryConfig, batches: Iterable[Batch] | None) -> Any:
    wanted = {
        id(parameter)
        for module in anatomy.model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if name == "bias" or "norm" in type(module).__name__.lower()
    }
    return _train_only(anatomy.model, wanted)


def _full(anatomy: Anatomy, config: RecoveryConfig, batches: Iterable[Batch] | None) -> Any:
    return _train_only(anatomy.model, {id(parameter) for parameter in anatomy.model.parameters()})


#: method -> makes its parameters trainable and returns the model
RECOVERIES: dict[str, Callable[[Anatomy, RecoveryConfig, Iterable[Batch] | None], Any]] = {
    "lora": _lora,
    "cka_lora": _cka_lora,
    "norms": _norms,
    "full": _full,
}


def spread_ranks(scores: Sequence[float | None], rank: int) -> list[int]:
    """Spread LoRA ranks over layers in proportion to their importance, at least 1 each; the sum is kept.

    Args:
        scores: importance of each layer; negative and missing ones count as 0.
        rank: the mean.

    Example:
        >>> spread_ranks([0.3, 0.1, 0.0, 0.2], 4)
        [7, 3, 1, 5]
    """
    weights = [max(score or 0.0, 0.0) for score in scores]
    whole = sum(weights)
    if not whole:
        return [rank] * len(weights)
    spare = (rank - 1) * len(weights)
    shares = [spare * weight / whole for weight in weights]
    ranks = [int(share) for share in shares]
    # what rounding down left over goes to the largest remainders, the lower layer first
    order = sorted(range(len(shares)), key=lambda i: (ranks[i] - shares[i], i))
    for index in order[: spare - sum(ranks)]:
        ranks[index] += 1
    return [1 + extra for extra in ranks]


def _lora_settings(anatomy: Anatomy, config: RecoveryConfig) -> dict[str, Any]:
    """Arguments of `LoraConfig`. The head of a classifier is trained whole, as PEFT does for its task type."""
    name = type(anatomy.model).__name__
    task = next((task for ending, task in _TASKS.items() if name.endswith(ending)), None)
    return {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout, "task_type": task}


_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def _pruned_stacks(anatomy: Anatomy) -> list[Anatomy]:
    """The stacks that were pruned, by the model's record; that with most parameters where it has none."""
    plan = recorded_plan(anatomy.model)
    parts = plan.by_stack if plan is not None else ()
    return [part.seen_in(anatomy) for part in parts] or [anatomy]


def _projections(anatomy: Anatomy, index: int) -> list[str]:
    return [f"{anatomy.layer_name(index)}.{path}" for path in anatomy.stack.layers[index].linears]


def _train_only(model: nn.Module, wanted: set[int]) -> nn.Module:
    chosen = [(name, p) for name, p in model.named_parameters() if id(p) in wanted]
    if not chosen:
        raise ValueError(
            f"{type(model).__name__} has no such parameters: nothing would be trained. Use the method 'lora'."
        )
    packed = [name for name, p in chosen if not p.is_floating_point()]
    if packed:
        raise ValueError(
            f"The weights are quantized (first: {packed[0]}) and cannot be trained. Use the method 'lora', or load the "
            "model without quantization."
        )
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in wanted and parameter.is_floating_point())
    return model
