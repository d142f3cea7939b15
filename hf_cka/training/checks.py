"""What pruning during training refuses, before the first step, because it would go wrong without a word."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments
from transformers.trainer_callback import CallbackHandler

from hf_cka.representations import distributed
from hf_cka.training.sharding import is_sharded

if TYPE_CHECKING:
    from hf_cka.training.callback import PruningCallback

# optimizers that hold projections or hooks for the parameters they were made with
_BOUND_OPTIMIZERS = ("galore", "lomo", "apollo", "layerwise")


def check_run(callback: PruningCallback, args: TrainingArguments, model: Any, optimizer: Any) -> None:
    """Refuse what a structural change would silently break.

    Args:
        callback: with the settings.
        args: of the Trainer.
        model: without wrappers.
        optimizer: of the Trainer.

    Raises:
        ValueError: naming the setting, and what to do.
    """
    if args.load_best_model_at_end:
        raise ValueError(
            "load_best_model_at_end=True would load a checkpoint of another structure into the pruned model, layers "
            "into the wrong places. Set it to False and load the checkpoint you want with from_pretrained."
        )
    # `accelerate launch` sets these behind the arguments' back
    trainer = callback.trainer
    if args.deepspeed or getattr(trainer, "is_deepspeed_enabled", False):
        raise ValueError(
            "DeepSpeed partitions parameters and optimizer states, which cannot change during training. Prune first "
            "(`hf-cka prune`), then train the pruned model with DeepSpeed."
        )
    if args.fsdp or getattr(trainer, "is_fsdp_enabled", False):
        _check_fsdp(callback, args)
    elif is_sharded(model):
        raise ValueError(
            "The parameters are sharded (DTensor), and cannot be cut in place. Let accelerate shard the model with "
            "FSDP2 and use TrainerPlugin(mode='boundary'), or prune first (`hf-cka prune`)."
        )
    name = str(getattr(args.optim, "value", args.optim)).lower()
    if any(part in name for part in _BOUND_OPTIMIZERS):
        raise ValueError(
            f"optim={name!r} holds hooks or projections of the parameters it began with. Use optim='adamw_torch'."
        )
    if args.auto_find_batch_size:
        raise ValueError("auto_find_batch_size=True starts training again in a model that may be pruned. Turn it off.")
    if callback.boundary and args.save_only_model:
        raise ValueError(
            "mode='boundary' goes on from a checkpoint, and with save_only_model=True that holds neither optimizer nor "
            "learning rate: both would start again. Set save_only_model=False, or use mode='inplace'."
        )
    if callback.boundary and args.ignore_data_skip:
        raise ValueError(
            "mode='boundary' goes on from a checkpoint, and with ignore_data_skip=True that would begin the data "
            "again. Set ignore_data_skip=False, or use mode='inplace'."
        )
    if args.restore_callback_states_from_checkpoint and callback.trainer is not None:
        raise ValueError("The plugin restores its own state; set restore_callback_states_from_checkpoint=False.")
    if callback.metric is not None and not (args.eval_on_start and str(args.eval_strategy) != "no"):
        raise ValueError(
            f"metric={callback.metric!r} is compared with its value before pruning and during training: set "
            "eval_on_start=True and eval_strategy='steps' or 'epoch'."
        )
    if callback.config.repair is not None and hasattr(model, "peft_config") and not callback.recovers_from:
        raise ValueError(
            f"repair={callback.config.repair!r} changes the base weights, and checkpoints of adapters do not hold "
            "those. Use repair=None, or prune before the adapters are added."
        )
    if distributed() and callback.trainer is None:
        raise ValueError(
            "In several processes the wrapper of the model has to be told as well, which a callback cannot see: use "
            "TrainerPlugin(...).attach(trainer) instead of callbacks=[PruningCallback(...)]."
        )
    averaging = [name for name in map(_type_name, _neighbours(callback)) if "EMA" in name]
    if averaging:
        raise ValueError(
            f"{averaging[0]} averages the weights of one structure by name. Average after pruning, in a second run."
        )
    if callback.trainer is not None:
        _check_trainer(callback)


def _check_trainer(callback: PruningCallback) -> None:
    trainer = callback.trainer
    if trainer.model_init is not None:
        raise ValueError("model_init makes a new, dense model for every run; pass model= instead.")
    wrapped = trainer.model_wrapped
    if callback.boundary or not isinstance(wrapped, DistributedDataParallel):
        return
    if wrapped.static_graph:
        raise ValueError(
            "DDP with static_graph=True cannot see a new structure; set it to False, or use mode='boundary'."
        )
    if wrapped.mixed_precision is not None:
        raise ValueError(
            "DDP with mixed_precision holds copies of the parameters it began with. Use TrainingArguments(bf16=True) "
            "instead, or mode='boundary'."
        )


def _check_fsdp(callback: PruningCallback, args: TrainingArguments) -> None:
    """Let FSDP2 pass where the model is made whole before it is pruned, in the settings that the tests know."""
    accelerator = getattr(callback.trainer, "accelerator", None)
    plugin = getattr(getattr(accelerator, "state", None), "fsdp_plugin", None)
    if plugin is None or plugin.fsdp_version != 2 or not callback.boundary:
        raise ValueError(
            "FSDP has flattened or sharded the parameters, which cannot be cut in place. Use fsdp_version=2 with "
            "TrainerPlugin(mode='boundary'), which prunes the whole model between two runs of the loop; or prune first "
            "(`hf-cka prune`), then train the pruned model with FSDP."
        )
    refused = {
        "cpu_offload": type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy",
        "cpu_ram_efficient_loading": plugin.cpu_ram_efficient_loading,
        "activation_checkpointing of fsdp_config": plugin.activation_checkpointing,
        "torch_compile": args.torch_compile,
        "parallelism_config": getattr(accelerator, "parallelism_config", None) is not None,
    }
    for setting, used in refused.items():
        if used:
            raise ValueError(
                f"{setting} is not supported by pruning under FSDP2. Leave it out, or prune first (`hf-cka prune`)."
            )
    recovery = getattr(callback.trainer, "recovery", None)
    if recovery is not None and recovery.method == "norms" and "SHARDED" in str(plugin.state_dict_type):
        raise ValueError(
            "A sharded checkpoint loses the settings of a parameter group without parameters (accelerate 1.15), and "
            "with recovery='norms' one has none. Set state_dict_type='FULL_STATE_DICT' in fsdp_config."
        )


def _neighbours(callback: PruningCallback) -> list[Any]:
    """The callbacks of the same Trainer. A callback is not told of them, so its handler is looked up in memory."""
    handlers = [found for found in gc.get_objects() if issubclass(type(found), CallbackHandler)]
    return [other for found in handlers if callback in found.callbacks for other in found.callbacks]


def _type_name(value: Any) -> str:
    return type(value).__name__
