"""Train a student on what its dense parent says: the settings, and the mixin that gives the loss to any Trainer.

The divergences are in `divergence`; which parameters are trained is in `recovery`; running the training in
`recovery_run`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional as F

from hf_cka.anatomy import find_anatomy
from hf_cka.training.divergence import hidden_difference, teacher_divergence
from hf_cka.training.teacher_cache import TeacherCache


@dataclass(frozen=True)
class DistillationConfig:
    """How much of the loss comes from the teacher.

    Args:
        weight: of the teacher, 0 to 1; the rest is the loss on the labels.
        temperature: of both distributions; the divergence is multiplied by its square, so that gradients keep their
            size (Hinton et al., arXiv 1503.02531).
        hidden_weight: of the mean squared difference between hidden states of the layers that are left and the same
            layers of the teacher, relative to the teacher's mean square; 0 leaves it out.
        cache_dir: folder for the teacher's answers: each row is asked once, in this run and in later ones with the same
            teacher. See `TeacherCache` for its size.
        cache_top_k: keep, and learn from, only so many of the most likely tokens and the others as one; by default all.

    Raises:
        ValueError: for numbers out of range, or a cache together with hidden states, which it does not hold.

    Example:
        >>> DistillationConfig(weight=0.5).temperature
        1.0
    """

    weight: float = 1.0
    temperature: float = 1.0
    hidden_weight: float = 0.0
    cache_dir: str | None = None
    cache_top_k: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise ValueError(f"weight={self.weight} must be above 0 and at most 1; without a teacher, give none.")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be positive.")
        if self.hidden_weight < 0:
            raise ValueError(f"hidden_weight={self.hidden_weight} must not be negative.")
        if self.cache_dir is not None and self.hidden_weight:
            raise ValueError(
                f"cache_dir holds logits, and hidden_weight={self.hidden_weight} needs the teacher's hidden states. "
                "Leave one of them out."
            )
        if self.cache_top_k is not None and (self.cache_dir is None or self.cache_top_k < 1):
            raise ValueError(f"cache_top_k={self.cache_top_k} must be at least 1, and needs a cache_dir.")

    def to_dict(self) -> dict[str, Any]:
        """Return what shapes the loss as plain JSON data, for a record: where answers were kept does not."""
        return {name: value for name, value in asdict(self).items() if name != "cache_dir"}


def check_teacher(student: Any, teacher: Any) -> None:
    """Refuse a teacher that a student cannot learn from.

    Raises:
        ValueError: naming what is wrong: it is the student itself or shares weights with it, is quantized, or has
            another vocabulary or number of labels.
    """
    mine, theirs = find_anatomy(student), find_anatomy(teacher)
    if mine.model is theirs.model:
        raise ValueError("The teacher is the student itself: give the dense model that the student was pruned from.")
    own = {parameter.data_ptr() for parameter in mine.model.parameters() if not parameter.is_meta}
    for name, parameter in theirs.model.named_parameters():
        if parameter.numel() and parameter.data_ptr() in own:
            raise ValueError(
                f"Teacher and student share weights (first: {name}), so training would change both. Give one of them a "
                "copy: copy.deepcopy(model)."
            )
    if getattr(theirs.model.config, "quantization_config", None) is not None:
        raise ValueError(
            "The teacher is quantized (its config has quantization_config), and its rounding would be taught. Load it "
            "without quantization; dtype=torch.bfloat16 halves its memory."
        )
    heads = [getattr(model.model, "num_labels", None) for model in (mine, theirs)]
    sizes = [getattr(model.config, "vocab_size", None) for model in (mine, theirs)]
    if mine.kind == "decoder" and sizes[0] != sizes[1]:
        raise ValueError(
            f"The teacher's vocabulary has {sizes[1]} tokens and the student's {sizes[0]}: give the model that the "
            "student was pruned from."
        )
    if mine.kind != "decoder" and heads[0] != heads[1]:
        raise ValueError(f"The teacher has {heads[1]} labels and the student {heads[0]}.")


def check_label_loss(args: Any, model: Any, compute_loss_func: Any = None) -> None:
    """Refuse settings of a Trainer's loss that a distilled one would leave out without a word.

    Args:
        args: of the Trainer.
        model: the student.
        compute_loss_func: of the Trainer.

    Raises:
        ValueError: naming the setting, and what to set instead.
    """
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} has no place beside a teacher, whose probabilities "
            "are softer labels already. Set label_smoothing_factor=0."
        )
    loss_type = getattr(args, "loss_type", "nll")
    if loss_type != "nll":
        raise ValueError(
            f"loss_type={loss_type!r} is not what a teacher is mixed with: that is the plain loss on the labels. Set "
            "loss_type='nll', or train without a teacher."
        )
    if compute_loss_func is not None:
        raise ValueError("compute_loss_func would not be called: the loss comes from the teacher. Leave one out.")
    if getattr(find_anatomy(model).config, "output_router_logits", False):
        raise ValueError(
            "output_router_logits=True adds a loss that balances experts, which a distilled loss leaves out. Set "
            "model.config.output_router_logits=False."
        )


def layer_map(student: Any) -> dict[int, int]:
    """Return which layer of the dense parent each layer of a pruned model was, from the record in its config.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hf_cka import PruningPlan, apply_plan
        >>> model = LlamaForCausalLM(LlamaConfig(
        ...     num_hidden_layers=3, hidden_size=8, intermediate_size=16, num_attention_heads=2, vocab_size=16
        ... ))
        >>> layer_map(apply_plan(model, PruningPlan(3, "llama", removed_layers=(1,))))
        {0: 0, 1: 2}
    """
    from hf_cka.pruning.history import recorded_plan

    plan = recorded_plan(student)
    anatomy = find_anatomy(student, plan.stack or None if plan is not None else None)
    if plan is None:
        return {i: i for i in range(anatomy.num_layers)}
    kept = plan.kept_layers
    if len(kept) != anatomy.num_layers:  # records of format 1 name the sub-layers of a layer that lost both
        kept = tuple(i for i in kept if not (i in plan.removed_attention and i in plan.removed_mlp))
    return dict(enumerate(kept))


def open_cache(teacher: Any, distillation: DistillationConfig, args: Any) -> TeacherCache | None:
    """Return the cache that the settings ask for, or None.

    Raises:
        ValueError: if rows are joined before they reach the model, or the folder holds another teacher's answers.
    """
    if distillation.cache_dir is None:
        return None
    joins = [name for name in ("packing", "padding_free") if getattr(args, name, False)]
    if joins:
        raise ValueError(
            f"{joins[0]}=True joins rows differently each time, and the cache finds answers by row. Set "
            f"{joins[0]}=False, or leave cache_dir out."
        )
    temperature = distillation.temperature
    return TeacherCache(distillation.cache_dir, teacher, top_k=distillation.cache_top_k, temperature=temperature)


class DistillationMixin:
    """Mixed into a `Trainer` or `SFTTrainer` class: the training loss looks at a teacher as well.

    Evaluation does not: ``eval_loss`` is the loss on the labels, and compares with that of any other run.

    Attributes:
        teacher: the dense model, in eval mode, on the student's device.
        distillation: how much of the loss it makes; by default all of it.

    Example:
        >>> class DistillingTrainer(DistillationMixin, SFTTrainer): ...  # doctest: +SKIP
        >>> trainer = DistillingTrainer(model=pruned, ...)  # doctest: +SKIP
        >>> trainer.teacher, trainer.distillation = dense.eval(), DistillationConfig(weight=0.5)  # doctest: +SKIP
    """

    teacher: Any = None
    distillation: DistillationConfig = DistillationConfig()
    teacher_cache: TeacherCache | None = None
    accelerator: Any
    args: Any
    model: Any
    compute_loss_func: Any

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, as `Trainer.train`, after a look at the settings (see `check_label_loss`)."""
        check_label_loss(self.args, self.model, self.compute_loss_func)
        if self.teacher is None:
            raise ValueError("The trainer has no teacher: set trainer.teacher to the dense model in eval mode.")
        self.teacher_cache = open_cache(self.teacher, self.distillation, self.args)
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mixture of the loss on the labels and the divergence from the teacher; in evaluation the first."""
        if not model.training:
            return super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        settings = self.distillation
        inputs, labels = dict(inputs), inputs["labels"]
        del inputs["labels"]
        if settings.hidden_weight:
            inputs["output_hidden_states"] = True
        outputs = model(**inputs)
        student = outputs.logits
        # of a decoder, each position's logits are about the next token
        about = slice(None)
        if student.ndim == 3 and labels.ndim == 2 and find_anatomy(self.teacher).kind == "decoder":
            about = slice(-1)
            student, labels = student[:, about], labels[:, 1:]
        keep = labels != -100
        if self.teacher_cache is not None:
            divergence = self.teacher_cache.divergence(
                student, inputs, keep, lambda: self._ask(inputs).logits[:, about]
            )
        else:
            answers = self._ask(inputs)
            teacher = answers.logits.clone()[:, about]
            divergence = teacher_divergence(student, teacher, keep, settings.temperature)
        loss = settings.weight * divergence
        if settings.weight < 1:
            loss = loss + (1 - settings.weight) * F.cross_entropy(student[keep].float(), labels[keep], reduction="sum")
        count = keep.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = loss / count.to(loss.device).clamp(min=1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # the count is that of all, and DDP averages
        if settings.hidden_weight:
            mask = inputs.get("attention_mask")
            mask = torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
            theirs = tuple(hidden.clone() for hidden in answers.hidden_states)
            bare = self.accelerator.unwrap_model(model)
            bare = bare.get_base_model() if hasattr(bare, "get_base_model") else bare
            difference = hidden_difference(outputs.hidden_states, theirs, layer_map(bare), mask)
            loss = loss + settings.hidden_weight * difference
        return (loss, outputs) if return_outputs else loss

    def _ask(self, inputs: dict[str, Any]) -> Any:
        with torch.inference_mode():
            return self.teacher(**inputs)
