"""`recover`: heal a pruned model on a data set, through transformers' Trainer or TRL's SFTTrainer."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_cka.data import Batch, row_text
from hf_cka.training.distillation import (
    DistillationConfig,
    DistillationMixin,
    check_label_loss,
    check_teacher,
    open_cache,
)
from hf_cka.training.recovery import LEARNING_RATES, RecoveryConfig, finish_recovery, prepare_recovery


@dataclass(frozen=True)
class RecoveryResult:
    """What :func:`recover` returns.

    Args:
        model: the recovered model, without adapters.
        config: what was trained.
        trainable: parameters that were trained.
        log: the Trainer's log: one entry (loss, learning rate, step ...) each time it logged.
    """

    model: Any
    config: RecoveryConfig
    trainable: int
    log: tuple[Mapping[str, Any], ...]

    @property
    def losses(self) -> tuple[tuple[int, float], ...]:
        """(step, training loss) as logged."""
        return tuple((int(entry["step"]), float(entry["loss"])) for entry in self.log if "loss" in entry)


def recover(
    model: Any,
    train_dataset: Any,
    method: RecoveryConfig | str = "lora",
    *,
    processing_class: Any = None,
    teacher: Any = None,
    distillation: DistillationConfig | None = None,
    batches: Iterable[Batch] | None = None,
    args: Any = None,
    eval_dataset: Any = None,
    callbacks: Sequence[Any] = (),
    resume_from_checkpoint: str | bool | None = None,
    seed: int = 0,
    **settings: Any,
) -> RecoveryResult:
    """Train what is left of a pruned model until it is itself again.

    Rows with ``input_ids`` go through `transformers.Trainer`; any others, in the forms of :func:`hf_cka.calibration`,
    through TRL's `SFTTrainer`, which tokenizes them. There is no loop of our own: schedules, mixed precision,
    accumulation, trackers, checkpoints and several processes are the Trainer's.

    Args:
        model: a pruned model without adapters; trained in place.
        train_dataset: a `datasets.Dataset`, or a list of rows.
        method: which parameters: ``"lora"``, ``"cka_lora"``, ``"norms"`` or ``"full"``, or a config.
        processing_class: the tokenizer.
        teacher: the dense model, for distillation.
        distillation: how; by default the divergence from the teacher alone, at temperature 1.
        batches: model-ready dicts, for methods that measure the model first.
        args: `TrainingArguments` or `SFTConfig`; then ``settings`` stay empty.
        eval_dataset: for the Trainer's evaluations, whose loss is that on the labels, with a teacher as well.
        callbacks: of the Trainer.
        resume_from_checkpoint: as of `Trainer.train`, with the pruned model as it was at the start.
        seed: of LoRA's first weights, the order of the data and dropout.
        settings: fields of the arguments, such as ``max_steps``, ``output_dir``, ``max_length``. Without a
            ``learning_rate`` it is 2e-4 for LoRA, 2e-3 for norms, 5e-5 for everything; it falls as a cosine.

    Raises:
        ValueError: for a teacher with another vocabulary, a loss that cannot be mixed with a teacher's, rows without a
            usable column, settings beside ``args``, or as `prepare_recovery`; before training.

    Example:
        >>> result = recover(pruned, rows, "lora", processing_class=tokenizer, max_steps=200)  # doctest: +SKIP
        >>> save_pruned(result.model, "recovered", tokenizer=tokenizer)  # doctest: +SKIP
    """
    config = RecoveryConfig(method) if isinstance(method, str) else method
    if distillation is not None and teacher is None:
        raise ValueError("distillation needs a teacher: pass teacher=, the model this one was pruned from.")
    if args is not None and settings:
        raise ValueError(f"Give args or {', '.join(settings)}, not both.")
    if teacher is not None:
        check_teacher(model, teacher)
    rows = _dataset(train_dataset)
    tokenized = "input_ids" in rows.column_names
    if not tokenized:
        rows = _texts(rows, processing_class)
    from transformers import set_seed

    with tempfile.TemporaryDirectory() as scratch:
        if args is None:
            defaults = {"learning_rate": LEARNING_RATES[config.method], "save_strategy": "no", "seed": seed}
            args = _arguments(tokenized, {**defaults, "output_dir": scratch, **settings})
        if teacher is not None:
            check_label_loss(args, model)
            open_cache(teacher, distillation or DistillationConfig(), args)
        set_seed(args.seed)
        trained = prepare_recovery(model, config, batches)
        kind, more = _trainer_class(tokenized, teacher is not None), {}
        if tokenized:
            more["data_collator"] = _collator(trained, processing_class)
        trainer = kind(
            model=trained,
            args=args,
            train_dataset=rows,
            eval_dataset=None if eval_dataset is None else _dataset(eval_dataset),
            processing_class=processing_class,
            callbacks=list(callbacks),
            **more,
        )
        if teacher is not None:
            trainer.teacher = teacher.to(trainer.args.device).eval()
            trainer.distillation = distillation or DistillationConfig()
        trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    bare = finish_recovery(trainer.model)
    # TRL puts a forward on the instance, which would follow the model wherever it is copied
    if not hasattr(bare, "_hf_hook"):
        bare.__dict__.pop("forward", None)
    return RecoveryResult(bare, config, trainable, tuple(trainer.state.log_history))


def _dataset(rows: Any) -> Any:
    if hasattr(rows, "column_names"):
        return rows
    from datasets import Dataset

    return Dataset.from_list([dict(row) if isinstance(row, Mapping) else {"text": row} for row in rows])


def _texts(rows: Any, tokenizer: Any) -> Any:
    """The rows as TRL reads them: its own forms stay, the others that `row_text` knows become one text."""
    columns = set(rows.column_names)
    if columns & {"text", "messages"} or {"prompt", "completion"} <= columns:
        return rows
    return rows.map(lambda row: {"text": row_text(row, tokenizer)}, remove_columns=rows.column_names)


def _arguments(tokenized: bool, settings: dict[str, Any]) -> Any:
    accelerated = torch.accelerator.is_available()
    defaults = {"report_to": "none", "use_cpu": not accelerated, "logging_steps": 10, "lr_scheduler_type": "cosine"}
    if tokenized:
        from transformers import TrainingArguments

        return TrainingArguments(**{**defaults, **settings})
    from trl import SFTConfig

    return SFTConfig(**{**defaults, "bf16": accelerated, **settings})


def _trainer_class(tokenized: bool, distilled: bool) -> Any:
    base: Any
    if tokenized:
        from transformers import Trainer

        base = Trainer
    else:
        try:
            from trl import SFTTrainer
        except ImportError as error:
            raise ImportError("Rows of text are trained on with TRL: pip install 'hf_cka[trl]'") from error
        base = SFTTrainer
    return type(f"Distilling{base.__name__}", (DistillationMixin, base), {}) if distilled else base


def _collator(model: Any, tokenizer: Any) -> Any:
    from transformers import DataCollatorForLanguageModeling, DataCollatorWithPadding, default_data_collator

    if tokenizer is None:
        return default_data_collator
    causal = "ForCausalLM" in type(getattr(model, "get_base_model", lambda: model)()).__name__
    return DataCollatorForLanguageModeling(tokenizer, mlm=False) if causal else DataCollatorWithPadding(tokenizer)
