"""Adapters that a model carries (PEFT's LoRA) follow its surgery: checked before, cut with it, renamed after.

PEFT wraps a projection in a module that holds it as ``base_layer``, with ``lora_A`` (rank, in) and ``lora_B`` (out,
rank) beside it. Where the projection loses inputs, so does A; where it loses outputs, so does B. Adapter files on disk
never belong here (see `hf_cka.modeling.adapters`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from hf_cka.anatomy import Anatomy
from hf_cka.modeling import modeling_hf_cka as code
from hf_cka.modeling.plan import PruningPlan


def adapter_configs(model: Any) -> Mapping[str, Any]:
    """Return the PEFT config of each adapter that a model carries, by name; empty for a model without.

    Args:
        model: the model itself, as `Anatomy.model` is, or a `PeftModel`.

    Example:
        >>> dict(adapter_configs(torch.nn.Linear(2, 2)))
        {}
    """
    configs = getattr(model, "peft_config", None)
    return configs if isinstance(configs, Mapping) else {}


def added_weight(module: Any) -> torch.Tensor | None:
    """Return what the active LoRA adapters add to the weight of a projection, in its layout; None without any.

    The model computes with weight plus this, so a criterion that reads weights reads the sum. Adapters that were
    merged are in the weight already; variants that also rescale it (DoRA) count as plain LoRA.

    Args:
        module: a projection, with or without adapters.

    Example:
        >>> added_weight(torch.nn.Linear(2, 2)) is None
        True
    """
    deltas = [module.get_delta_weight(name) for name in active_adapters(module)]
    return torch.stack(deltas).sum(dim=0).detach() if deltas else None


def active_adapters(module: Any) -> list[str]:
    """Return the LoRA adapters that a projection adds now, merged ones left out.

    Args:
        module: a projection, with or without adapters.
    """
    if not hasattr(module, "lora_A") or module.disable_adapters or module.merged:
        return []
    return [name for name in module.active_adapters if name in module.lora_A]


def check_adapters(anatomy: Anatomy, plan: PruningPlan) -> None:
    """Refuse adapters that would not follow a plan, before anything is changed.

    Args:
        anatomy: of the model.
        plan: what will be removed.

    Raises:
        ValueError: for another tuner than LoRA, settings that name layers in ways that cannot be rewritten, a variant
            (DoRA) on a projection that is narrowed, or a plan that removes everything an adapter adapts.
    """
    configs = adapter_configs(anatomy.model)
    merge = "Merge the adapters first (`model = peft_model.merge_and_unload()`) or drop them (`peft_model.unload()`)."
    for name, config in configs.items():
        if config.peft_type != "LORA":
            raise ValueError(
                f"Adapter {name!r} is of type {getattr(config.peft_type, 'value', config.peft_type)}; only LoRA "
                f"adapters follow the surgery. {merge}"
            )
        for field in ("layer_replication", "target_parameters"):
            if getattr(config, field, None):
                raise ValueError(
                    f"Adapter {name!r} sets {field}={getattr(config, field)!r}, which cannot be cut. {merge}"
                )
        whole = [m for m in config.modules_to_save or () if re.search(r"\d", m)]
        if whole:
            raise ValueError(f"Adapter {name!r} names modules_to_save by number ({whole}). {merge}")
    for path in _narrowed(anatomy, plan):
        module: Any = code.part(anatomy.model, path)
        if hasattr(module, "base_layer") and (getattr(module, "lora_variant", None) or not _is_plain(module)):
            kinds = {type(v).__name__ for v in (getattr(module, "lora_variant", None) or {}).values()}
            raise ValueError(
                f"{path} carries {', '.join(sorted(kinds)) or type(module).__name__}, whose update is not the same "
                f"after some of its rows or columns go (only plain LoRA's is). {merge}"
            )
        if hasattr(module, "original_module"):
            raise ValueError(f"{path} is in modules_to_save and would be narrowed. {merge}")
    for name in configs:
        before = [path for path, module in _adapted(anatomy.model, name)]
        if before and all(_goes(anatomy, plan, path) for path in before):
            raise ValueError(f"The plan removes all {len(before)} modules that adapter {name!r} adapts. {merge}")


def take_adapted(module: Any, name: str, axis: int, index: torch.Tensor) -> None:
    """Keep the given indices of one axis of a parameter, and of the adapters on it.

    Args:
        module: which holds the parameter, with adapters or without; changed in place.
        name: of the parameter.
        axis: along which.
        index: what stays, ascending.
    """
    if not hasattr(module, "base_layer"):
        code.take(module, name, axis, index)
        return
    take_adapted(module.base_layer, name, axis, index)
    if name != "weight":
        return
    # adapters never store the transpose, which Conv1D does
    outputs = (axis == 0) != bool(getattr(module, "fan_in_fan_out", False))
    for factor in (module.lora_B if outputs else module.lora_A).values():
        code.take(factor, "weight", 0 if outputs else 1, index)
    setattr(module, "out_features" if outputs else "in_features", len(index))


def rename_targets(given: Any, anatomy: Anatomy, kept_layers: tuple[int, ...]) -> None:
    """Let the configs of the adapters name the modules that carry them now.

    Fields that still name exactly these modules stay as they are; otherwise the modules are named in full.

    Args:
        given: the model as it was handed in; if it is a `PeftModel`, its list of targets is written too.
        anatomy: of the pruned model.
        kept_layers: former index of each layer.
    """
    from peft import LoraConfig

    configs: Any = adapter_configs(anatomy.model)
    every: list[str] = []
    for name, old in list(configs.items()):
        adapted = list(_adapted(anatomy.model, name))
        paths = [path for path, _ in adapted]
        every += [path for path in paths if path not in every]
        # a config that chooses its layers (CKALoraConfig) has chosen; its record counts the layers of before
        config: Any = old if type(old) is LoraConfig else LoraConfig(**old.to_dict())
        layers = config.layers_to_transform
        if layers is not None:
            layers = [layers] if isinstance(layers, int) else layers
            config.layers_to_transform = [new for new, before in enumerate(kept_layers) if before in layers]
        if not _names_exactly(anatomy.model, config, paths):
            config.target_modules = set(paths)
            config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
        for field, attribute, default in (
            ("rank_pattern", "r", config.r),
            ("alpha_pattern", "lora_alpha", config.lora_alpha),
        ):
            if any(re.search(r"\d", pattern) for pattern in getattr(config, field) or {}):
                sizes = {path: getattr(module, attribute)[name] for path, module in adapted}
                setattr(config, field, {f"^{re.escape(p)}": size for p, size in sizes.items() if size != default})
        configs[name] = config
    tuner: Any = getattr(given, "base_model", None)
    if hasattr(tuner, "targeted_module_names"):
        tuner.targeted_module_names = every


def _is_plain(module: Any) -> bool:
    from peft.tuners.lora import Linear

    return type(module) is Linear


def _adapted(model: Any, adapter: str) -> Iterator[tuple[str, Any]]:
    """Path and module of everything in the model that carries an adapter."""
    for path, module in model.named_modules():
        if hasattr(module, "base_layer") and adapter in {*module.lora_A, *module.lora_embedding_A}:
            yield path, module


def _names_exactly(model: Any, config: Any, paths: list[str]) -> bool:
    """Whether PEFT, given the config and the model without adapters, would adapt just these modules."""
    from peft.tuners.tuners_utils import check_target_module_exists

    without = {path.replace(".base_layer", "") for path, _ in model.named_modules() if ".lora_" not in path}
    return {path for path in without if check_target_module_exists(config, path)} == set(paths)


def _narrowed(anatomy: Anatomy, plan: PruningPlan) -> list[str]:
    """Modules that the plan narrows, by dotted name in the model."""
    found: dict[str, None] = {}
    for part in plan.by_stack:
        on = part.seen_in(anatomy)
        for name, table in part.kept.items():
            for index in table:
                width = on.stack.layers[index].width(name)
                for s in width.slices if width else ():
                    found[f"{on.layer_name(index)}.{s.module}"] = None
    return list(found)


def _goes(anatomy: Anatomy, plan: PruningPlan, path: str) -> bool:
    """Whether a module goes with a layer or branch that the plan removes."""
    for part in plan.by_stack:
        on = part.seen_in(anatomy)
        gone = [on.layer_name(i) for i in part.removed_layers]
        for name, layers in part.removed_branches.items():
            for i in layers:
                branch = on.branch(i, name)
                gone += [f"{on.layer_name(i)}.{m}" for m, _ in branch.modules] if branch else []
        if any(f"{path}.".startswith(f"{g}.") for g in gone):
            return True
    return False
