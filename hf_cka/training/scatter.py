"""Train LoRA on the pruned model, use it on the dense one: scatter an adapter through the plan (LoRAM).

The other way, from the dense model to the pruned one, is `hf_cka.modeling.translate_adapter`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from hf_cka.anatomy import find_anatomy
from hf_cka.modeling.plan import PruningPlan
from hf_cka.modeling.surgery import parameter_map
from hf_cka.pruning.history import recorded_plan
from hf_cka.pruning.state import sharing_copy

_WEIGHTS = "adapter_model.safetensors"


def scatter_adapter(
    adapter: str | os.PathLike[str], plan: Any, dense: Any, output: str | os.PathLike[str]
) -> dict[str, list[str]]:
    """Write a copy of a LoRA adapter, trained on a pruned model, that fits the dense one.

    Layers get their original numbers back. In projections that were narrowed, the update is zero for the heads and
    units that the pruned model did not have; layers and sub-layers that it did not have get no adapter.

    Args:
        adapter: folder of the adapter.
        plan: the `PruningPlan`, or the pruned model (or its config), which holds it.
        dense: the model that was pruned; left as it was.
        output: folder to write; it must not exist.

    Returns:
        {"adapted": names of the dense model's projections with an adapter, "widened": those that were narrower}.

    Raises:
        ValueError: if the plan is of another model, or the adapter is not plain LoRA on projections of the pruned
            model; nothing is written then.
        FileExistsError: if `output` exists.

    Source: LoRAM (arXiv 2502.13533), the recovery of pruned low-rank matrices.

    Example:
        >>> scatter_adapter("adapter", pruned, dense, "dense-adapter")  # doctest: +SKIP
        >>> PeftModel.from_pretrained(dense, "dense-adapter")  # doctest: +SKIP
    """
    from peft import LoraConfig, get_peft_model
    from peft.utils.other import get_pattern_key
    from safetensors.torch import load_file

    source, target = Path(adapter), Path(output)
    if target.exists():
        raise FileExistsError(f"{str(target)!r} exists. Choose a new folder.")
    plan = _plan_of(plan)
    model: Any = find_anatomy(dense).model
    tensors = load_file(source / _WEIGHTS)
    config = json.loads((source / "adapter_config.json").read_text())
    _check_plain(config, tensors)
    now = {new.removesuffix(".weight"): old for old, (new, _) in parameter_map(model, plan).items()}
    names = sorted({_module(name) for name in tensors})
    unknown = [name for name in names if name not in now]
    if unknown:
        raise ValueError(
            f"The adapter in {str(source)!r} changes {unknown[0]!r}, which the plan does not leave. Was it trained on "
            "the model that this plan pruned?"
        )
    old = {name: now[name].removesuffix(".weight") for name in names}
    patterns: dict[str, dict[str, Any]] = {"rank_pattern": {}, "alpha_pattern": {}}
    for field, default in (("rank_pattern", config["r"]), ("alpha_pattern", config["lora_alpha"])):
        given = config.get(field) or {}
        for name in names:
            value = given.get(get_pattern_key(list(given), name), default)
            if value != default:
                patterns[field]["^" + old[name].replace(".", r"\.")] = value
    more: dict[str, Any] = {**patterns}
    more |= {
        key: config[key] for key in ("r", "lora_alpha", "lora_dropout", "use_rslora", "task_type") if key in config
    }
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        twin = get_peft_model(sharing_copy(model), LoraConfig(target_modules=list(old.values()), **more))
        places = parameter_map(twin, plan)
        widened = _fill(twin, places, tensors)
        target.parent.mkdir(parents=True, exist_ok=True)
        twin.save_pretrained(str(target))
    finally:
        for parameter, before in trainable:  # PEFT freezes the weights, and the copy shares them
            parameter.requires_grad_(before)
    return {"adapted": sorted(old.values()), "widened": sorted(widened)}


def _plan_of(given: Any) -> PruningPlan:
    if isinstance(given, PruningPlan):
        return given
    plan = recorded_plan(given)
    if plan is None:
        raise ValueError(f"{type(given).__name__} has no pruning record. Pass the PruningPlan itself.")
    return plan


def _check_plain(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("bias", "none") != "none":
        raise ValueError(
            f"Only plain LoRA can be scattered; this adapter has peft_type={config.get('peft_type')!r}, "
            f"use_dora={config.get('use_dora')}, bias={config.get('bias')!r}. Merge it into the pruned model instead."
        )
    other = sorted(name for name in tensors if not name.endswith((".lora_A.weight", ".lora_B.weight")))
    if other:
        raise ValueError(f"The adapter holds {other[0]!r}, which is no LoRA matrix. Train without modules_to_save.")


def _module(name: str) -> str:
    return name.removeprefix("base_model.model.").rpartition(".lora_")[0]


@torch.no_grad()
def _fill(twin: Any, places: dict[str, Any], tensors: dict[str, torch.Tensor]) -> set[str]:
    """Put each tensor where the plan took it from, zeros elsewhere; returns the modules where there is an elsewhere."""
    widened = set()
    for name, parameter in twin.named_parameters():
        if ".lora_" not in name:
            continue
        new, kept = places[name]
        value = tensors[new.replace(".default.", ".")].to(parameter)
        if kept is None:
            parameter.copy_(value)
        else:
            parameter.zero_()
            parameter.view(-1)[kept.flatten()] = value.flatten()
            widened.add(_module(name))
    return widened
