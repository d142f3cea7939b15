"""One pass of a model over batches, with hooks that pool what enters and leaves each layer.

The model is only looked at: its mode is put back and every hook removed, whatever happens.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_cka.anatomy import Anatomy
from hf_cka.anatomy.twin import tensors_of
from hf_cka.data import Batch, CalibrationInfo, batch_digests, batch_rows
from hf_cka.modeling.modeling_hf_cka import main_input
from hf_cka.representations.masks import rows_of
from hf_cka.representations.pooling import Pooling, pool


class Consumer(Protocol):
    """Takes the pooled readouts of one batch: one ``(rows, hidden_size)`` tensor per distinct point."""

    def __call__(self, points: Sequence[torch.Tensor], pairs: Sequence[tuple[int, int]]) -> None: ...


@dataclass
class Counted:
    """Counts samples and tokens as they pass, and the digest of what they were."""

    num_samples: int = 0
    num_tokens: int = 0
    digests: list[str] = field(default_factory=list)

    def add(self, batch: Batch, mask: torch.Tensor) -> None:
        self.num_samples += len(mask)
        self.num_tokens += int(mask.sum())
        self.digests += batch_digests(batch, mask)

    @classmethod
    def merged(cls, parts: Sequence[Counted]) -> Counted:
        """Return the sum of the counts of several processes."""
        return cls(
            sum(part.num_samples for part in parts),
            sum(part.num_tokens for part in parts),
            [digest for part in parts for digest in part.digests],
        )

    def info(self, batches: Any) -> CalibrationInfo:
        digest = hashlib.sha256("".join(sorted(self.digests)).encode()).hexdigest()[:16]
        origin = {key: getattr(batches, key, None) for key in ("source", "seed", "max_length")}
        return CalibrationInfo(self.num_samples, self.num_tokens, digest, **origin)


def run(
    anatomy: Anatomy,
    batches: Iterable[Batch],
    pooling: Pooling,
    consumer: Consumer,
    *,
    progress: bool = True,
    description: str = "calibration",
) -> Counted:
    """Run the model over the batches and hand every batch's pooled readouts to a consumer.

    Args:
        anatomy: of the model.
        batches: model-ready dicts.
        pooling: how tokens become rows.
        consumer: called once a batch with the distinct points and each layer's (input, output) indices.
        progress: show a bar.
        description: its label.

    Returns:
        What was counted.

    Raises:
        ValueError, RuntimeError: as :func:`collect`.
    """
    check_runnable(anatomy.model)
    counted = Counted()
    tap = _Tap(anatomy, pooling)
    with evaluating(anatomy.model), tap.attached(), torch.no_grad():
        for index, batch in enumerate(tqdm(batches, desc=description, unit="batch", disable=not progress, delay=2)):
            mask = token_mask(batch, index)
            tap.start(batch)
            forward(anatomy, batch)
            points, pairs = tap.finish()
            _check_finite(points, pairs, index)
            consumer(points, pairs)
            counted.add(batch, mask)
    if not counted.num_samples and not distributed():
        raise ValueError("Calibration is empty: no batch came out of it. An iterator can be read only once.")
    return counted


def check_runnable(model: nn.Module) -> None:
    """Refuse a model that cannot do a forward pass here.

    Raises:
        ValueError: if weights are on the meta device and nothing (``device_map`` offloading) brings them back.
        RuntimeError: under DeepSpeed ZeRO-3.
    """
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        raise RuntimeError(
            "DeepSpeed ZeRO-3 has split the weights, and no forward pass is possible before training starts. "
            "Select first, without DeepSpeed: `hf-cka select --model ... --output cka.yaml`, then pass its modules."
        )
    if getattr(model, "hf_device_map", None) is None:
        for name, parameter in model.named_parameters():
            if parameter.is_meta:
                raise ValueError(
                    f"The weights are on the meta device (first: {name}), so there is nothing to measure. Load them "
                    "with from_pretrained, or select on a loaded copy of the model."
                )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode, and each back into its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def token_mask(batch: Batch, index: int = 0) -> torch.Tensor:
    """Return which positions of a batch hold tokens, ``(batch, tokens)``, on the CPU.

    Args:
        batch: a model-ready dict; without ``attention_mask`` every position counts. A sample of pictures or sound is
            one position: see :func:`hf_cka.representations.rows_of` for where a hidden state has more.
        index: of the batch, for the message.

    Raises:
        ValueError: if it is no dict of tensors, the mask is not 2-D, or a row is all padding.
    """
    if not hasattr(batch, "keys"):
        raise ValueError(f"Batch {index} is a {type(batch).__name__}; a dict with input_ids is needed.")
    given = batch.get("input_ids", batch.get("inputs_embeds"))
    if not isinstance(given, torch.Tensor):
        if not any(isinstance(value, torch.Tensor) for value in batch.values()):
            raise ValueError(
                f"Batch {index} needs input_ids (batch, tokens), pixel_values, input_features or another tensor that "
                f"the model reads; its keys are: {', '.join(batch)}."
            )
        return torch.ones(batch_rows(batch), 1, dtype=torch.bool)  # pictures and sound: one whole a sample
    if given.ndim < 2:
        raise ValueError(f"input_ids of batch {index} has shape {tuple(given.shape)}; (batch, tokens) is needed.")
    mask = batch.get("attention_mask")
    if mask is None:
        return torch.ones(given.shape[:2], dtype=torch.bool)
    if mask.ndim != 2:
        raise ValueError(f"attention_mask of batch {index} has shape {tuple(mask.shape)}; (batch, tokens) is needed.")
    mask = mask.cpu() != 0
    empty = (~mask.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"Batch {index} has rows that are all padding: {empty}. Leave empty texts out.")
    return mask


def forward(anatomy: Anatomy, batch: Batch, *, head: bool = False) -> Any:
    """Run one batch, without cache and labels.

    Args:
        anatomy: of the model.
        batch: a model-ready dict.
        head: run the head as well. Otherwise the model without its head is run where it takes all the batch holds: the
            logits of a language model would cost more memory than everything that is measured.
    """
    model: Any = anatomy.model
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "label", "use_cache")}
    module: Any = model
    if getattr(model.config, "is_encoder_decoder", False):
        inputs = _with_target(model, inputs, batch)
    elif not head and _takes(model.base_model, inputs) and anatomy.stack.path.startswith(_base_prefix(model)):
        module = model.base_model
    first = next(p for p in model.parameters() if p.is_floating_point())
    # offloaded: the hooks of the device map bring inputs where they belong
    device = torch.device("cpu") if first.device.type == "meta" else first.device
    inputs = {
        key: value.to(device, first.dtype if value.is_floating_point() else None)
        if isinstance(value, torch.Tensor)
        else value
        for key, value in inputs.items()
    }
    parameters = inspect.signature(module.forward).parameters
    passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and model.can_generate()
    if "use_cache" in parameters or passes_on:
        inputs["use_cache"] = False
    return module(**inputs)


def _takes(module: Any, inputs: dict[str, Any]) -> bool:
    return inputs.keys() <= set(inspect.signature(module.forward).parameters)


def _base_prefix(model: Any) -> str:
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def _with_target(model: Any, inputs: dict[str, Any], batch: Batch) -> dict[str, Any]:
    """An encoder-decoder needs something to decode: the batch's own, what its labels say, or a first token."""
    if "decoder_input_ids" in inputs or "decoder_inputs_embeds" in inputs:
        return inputs
    if "decoder_input_ids" not in inspect.signature(model.forward).parameters:
        return inputs
    config = model.config
    start = getattr(config, "decoder_start_token_id", None)
    start = getattr(config, "pad_token_id", None) if start is None else start
    labels = batch.get("labels")
    if (
        isinstance(labels, torch.Tensor)
        and labels.ndim == 2
        and hasattr(model, "prepare_decoder_input_ids_from_labels")
    ):
        return {**inputs, "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=labels)}
    if "input_ids" in inputs and not hasattr(model, "generate"):
        return inputs  # a classifier shifts its own input
    return {**inputs, "decoder_input_ids": torch.full((batch_rows(batch), 1), start or 0)}


class _Tap:
    """Hooks that pool each layer's input and output during one forward pass."""

    def __init__(self, anatomy: Anatomy, pooling: Pooling) -> None:
        self.anatomy = anatomy
        self.pooling = pooling
        self.batch: Batch = {}
        self.points: list[torch.Tensor] = []
        self.seen: dict[int, tuple[int, int]] = {}
        self.entered = -1
        self.last: tuple[torch.Tensor, int] | None = None  # what left the layer before, unpooled, and its index

    @contextmanager
    def attached(self) -> Iterator[None]:
        handles = []
        try:
            for index, layer in enumerate(self.anatomy.layers):
                handles.append(layer.register_forward_pre_hook(self._before, with_kwargs=True))
                handles.append(layer.register_forward_hook(partial(self._after, index)))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.last = None

    def start(self, batch: Batch) -> None:
        self.batch = batch
        self.points, self.seen, self.last = [], {}, None

    def finish(self) -> tuple[list[torch.Tensor], list[tuple[int, int]]]:
        self.last = None
        if len(self.seen) != self.anatomy.num_layers:
            tower = self.anatomy.backbone_path or type(self.anatomy.model).__name__
            raise RuntimeError(
                f"{len(self.seen)} of {self.anatomy.num_layers} layers of {tower!r} ran in the forward pass on "
                f"{', '.join(self.batch)}. A tower that the batch never reaches needs its own input (pixel_values, "
                "input_features); layers that are skipped at random (layerdrop) or compiled away cannot be read."
            )
        return self.points, [self.seen[i] for i in range(self.anatomy.num_layers)]

    def _add(self, hidden: torch.Tensor) -> int:
        rows, mask = rows_of(hidden, self.batch, self.anatomy)
        self.points.append(pool(rows, mask.to(rows.device), self.pooling))
        return len(self.points) - 1

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = main_input(args, kwargs)
        self.entered = self.last[1] if self.last is not None and hidden is self.last[0] else self._add(hidden)

    def _after(self, index: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hidden = tensors_of(output)[0]
        left = self._add(hidden)
        # a layer that runs several times: what first entered and what last left it
        self.seen[index] = (self.seen[index][0] if index in self.seen else self.entered, left)
        self.last = (hidden, left)


def distributed() -> bool:
    """Say whether this process is one of several."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_main_process() -> bool:
    """Say whether this process is the one that writes files: the first of several, or the only one."""
    return not distributed() or torch.distributed.get_rank() == 0


def _check_finite(points: Sequence[torch.Tensor], pairs: Sequence[tuple[int, int]], index: int) -> None:
    # One flag per point is read at once: a sync per point would stall an accelerator.
    finite = torch.stack([point.isfinite().all().to(points[0].device) for point in points]).tolist()
    if all(finite):
        return
    for layer, (entered, left) in enumerate(pairs):
        for where, point in (("input", entered), ("output", left)):
            if not finite[point]:
                rows = (~points[point].isfinite().all(dim=1)).nonzero().flatten().tolist()
                raise ValueError(
                    f"The {where} of layer {layer} holds NaN or infinite values (batch {index}, rows {rows[:8]}). "
                    "Load the model in bfloat16 or float32 instead of float16, or leave those samples out."
                )
