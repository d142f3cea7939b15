"""Train a student on what its dense parent says: the loss, and the mixin that gives it to any Trainer.

Which parameters are trained is in `recovery`; running the training in `recovery_run`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hf_cka.anatomy import find_anatomy

# Rows of logits that are turned into float32 probabilities at once.
_ROWS = 512


@dataclass(frozen=True)
class DistillationConfig:
    """How much of the loss comes from the teacher.

    Args:
        weight: of the teacher, 0 to 1; the rest is the loss on the labels.
        temperature: of both distributions; the divergence is multiplied by its square, so that gradients keep their
            size (Hinton et al., arXiv 1503.02531).
        hidden_weight: of the mean squared difference between hidden states of the layers that are left and the same
            layers of the teacher, relative to the teacher's mean square; 0 leaves it out.

    Raises:
        ValueError: for numbers out of range.

    Example:
        >>> DistillationConfig(weight=0.5).temperature
        1.0
    """

    weight: float = 1.0
    temperature: float = 1.0
    hidden_weight: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise ValueError(f"weight={self.weight} must be above 0 and at most 1; without a teacher, give none.")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be positive.")
        if self.hidden_weight < 0:
            raise ValueError(f"hidden_weight={self.hidden_weight} must not be negative.")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON data."""
        return asdict(self)


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
    sizes = [model.config.vocab_size for model in (mine, theirs)]
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


def teacher_divergence(
    student: torch.Tensor, teacher: torch.Tensor, keep: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Return the Kullback-Leibler divergence of a student from its teacher, summed over positions, in nats.

    Probabilities are made in float32 and few rows at a time, in the backward pass as well, so that memory stays at
    that of the logits.

    Args:
        student: logits, ``(..., classes)``.
        teacher: logits of the same shape.
        keep: ``(...)``, true where a position counts.
        temperature: of both.

    Source: logit distillation as in Minitron (arXiv 2407.14679).

    Example:
        >>> logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]])
        >>> float(teacher_divergence(logits, logits, torch.tensor([True, True])))
        0.0
    """

    def part(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        mine = F.log_softmax(mine.float() / temperature, dim=-1)
        theirs = F.log_softmax(theirs.float() / temperature, dim=-1)
        return F.kl_div(mine, theirs, log_target=True, reduction="sum") * temperature**2

    student, teacher = student[keep], teacher[keep]
    total = student.new_zeros((), dtype=torch.float32)
    for mine, theirs in zip(student.split(_ROWS), teacher.split(_ROWS), strict=True):
        total = total + checkpoint(part, mine, theirs, use_reentrant=False)
    return total


def hidden_difference(
    student: tuple[torch.Tensor, ...], teacher: tuple[torch.Tensor, ...], layers: Mapping[int, int], mask: torch.Tensor
) -> torch.Tensor:
    """Return the mean squared difference of hidden states, relative to the teacher's mean square, over layers.

    Args:
        student: hidden states, the embedding's first.
        teacher: likewise.
        layers: student's layer -> teacher's.
        mask: ``(batch, tokens)``, true where there is a token.
    """
    # the last entry comes after the final norm, so the last layer is left out
    pairs = [(student[i + 1][mask], teacher[j + 1][mask]) for i, j in layers.items() if i + 2 < len(student)]
    parts = [(a.float() - b.float()).square().mean() / b.float().square().mean() for a, b in pairs]
    return torch.stack(parts).mean() if parts else student[0].new_zeros(())


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
    from hf_cka.pruning.plan import PruningPlan

    anatomy = find_anatomy(student)
    record = getattr(anatomy.config, "pruning", None) or {}
    if "plan" not in record:
        return {i: i for i in range(anatomy.num_layers)}
    plan = PruningPlan.from_dict(record["plan"])
    kept = plan.kept_layers
    if len(kept) != anatomy.num_layers:  # a layer that lost both sub-layers is gone as well
        kept = tuple(i for i in kept if not (i in plan.removed_attention and i in plan.removed_mlp))
    return dict(enumerate(kept))


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
    accelerator: Any
    args: Any
    model: Any
    compute_loss_func: Any

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, as `Trainer.train`, after a look at the settings (see `check_label_loss`)."""
        check_label_loss(self.args, self.model, self.compute_loss_func)
        if self.teacher is None:
            raise ValueError("The trainer has no teacher: set trainer.teacher to the dense model in eval mode.")
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
        with torch.inference_mode():
            answers = self.teacher(**inputs)
        student, teacher = outputs.logits, answers.logits.clone()
        if student.ndim == 3 and labels.ndim == 2 and find_anatomy(self.teacher).kind == "decoder":
            student, teacher, labels = student[:, :-1], teacher[:, :-1], labels[:, 1:]
        keep = labels != -100
        count = keep.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = settings.weight * teacher_divergence(student, teacher, keep, settings.temperature)
        if settings.weight < 1:
            loss = loss + (1 - settings.weight) * F.cross_entropy(student[keep].float(), labels[keep], reduction="sum")
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
