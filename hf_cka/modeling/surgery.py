"""Apply a plan to a model in memory: remove what it names, renumber the rest, and say so in the config.

Choosing what to remove, repairing and training what is left, and files never belong here.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_cka.anatomy import Anatomy, find_anatomy
from hf_cka.anatomy.model import remember, unwrap
from hf_cka.anatomy.parts import Findings
from hf_cka.modeling import modeling_hf_cka as code
from hf_cka.modeling.carried import adapter_configs, check_adapters, rename_targets, take_adapted
from hf_cka.modeling.counting import num_parameters
from hf_cka.modeling.plan import PruningPlan
from hf_cka.modeling.structure import Target, configs_of, target_of

# Names under which modules keep the number of their layer, and containers that of their layers.
_INDEX = re.compile(r"layer_(idx|id|index|number)")
_DEPTH = re.compile(r"(n|num)_(hidden_)?layers?|depth|n_layer")


def apply_plan(model: Any, plan: PruningPlan) -> Any:
    """Remove from a model, in place, what a plan names.

    Whole layers leave a stock model where the stock class, built with fewer, computes the same; so do uniform widths
    where the stock config can say them. Otherwise the model and its config become the `Pruned...` subclass of their own
    class, which saves and loads like any other; layers that then keep their places are replaced by a module that hands
    its input on. The dense weights are freed; parameters that shrink are new objects, so make the optimizer afterwards.
    `config.pruning` holds the plan by original index, extended when a pruned model is pruned again.

    The result equals the dense model with the same parts zeroed, except where a norm's statistics span the members
    (OLMo 2's query and key norms): they are over the members that are left.

    LoRA adapters that the model carries are pruned with it, the same rows and columns, and their configs name the new
    layers: `save_pretrained` of the `PeftModel` writes an adapter for the pruned model, which `peft_model.unload()`
    gives, for `save_pruned`.

    Args:
        model: a `PreTrainedModel` with any head, with or without LoRA adapters, or the `PeftModel` around it.
        plan: what to remove.

    Returns:
        The same model, with its adapters, without DDP and `torch.compile`.

    Raises:
        ValueError: if the plan does not fit, or the model holds adapters that cannot follow, or has quantized
            projections that would have to be cut; before anything is changed.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     num_hidden_layers=3, hidden_size=8, intermediate_size=16, num_attention_heads=2, vocab_size=16
        ... )
        >>> model = apply_plan(
        ...     LlamaForCausalLM(config), PruningPlan(num_layers=3, model_type="llama", removed_layers=(1,))
        ... )
        >>> type(model).__name__, model.config.num_hidden_layers
        ('LlamaForCausalLM', 2)
    """
    anatomy = find_anatomy(model)
    given, model = unwrap(model, keep_adapters=True), anatomy.model
    plan.validate(anatomy)
    plan = plan.folded(anatomy)
    check_adapters(anatomy, plan)
    _refuse_packed(anatomy, plan)
    target = target_of(anatomy, plan)
    record = _record(anatomy, plan)
    left = _left(anatomy, plan, target)

    # From here on nothing can fail for a reason of the caller's.
    for part in plan.by_stack:
        _cut(part.seen_in(anatomy), part)
    for part in plan.by_stack:
        on = part.seen_in(anatomy)
        stay = target.shortened.get(on.stack.path)
        if stay is not None:
            _shorten(model, on.stack.path, stay)
        else:
            for i in part.removed_layers:
                code.replace(model, on.layer_name(i), "layer", on.stack.layers[i].returns)
    _adopt(model, target.config)
    model.config.pruning = record
    model.config.pruning["parameters_after"] = num_parameters(model)
    stock = getattr(type(model), "stock_class", type(model))
    code.become(model, code.model_class(stock, type(model.config).stock_class) if target.structure else stock)
    for entry in target.structure.get("removed") or ():
        code.part(model, entry["module"]).cache = entry.get("cache")
    code.settle(model, target.structure)
    remember(type(model), model.config, left)
    if adapter_configs(model):
        first = plan.by_stack[0]
        rename_targets(given, find_anatomy(model), first.kept_layers)
    return given


def parameter_map(model: Any, plan: PruningPlan) -> dict[str, tuple[str, torch.Tensor | None]]:
    """Return what becomes of every parameter that outlives a plan, for whoever holds something per parameter.

    Args:
        model: the model before `apply_plan`, which is not changed; of a `PeftModel` the adapters' parameters too.
        plan: what will be removed.

    Returns:
        Old name -> (new name, None where the parameter stays as it is, else for every element of the new one its
        place in the flattened old one). Parameters that go are not named.

    Raises:
        ValueError: if the plan does not fit.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     num_hidden_layers=2, hidden_size=4, intermediate_size=8, num_attention_heads=2, vocab_size=16
        ... )
        >>> plan = PruningPlan(num_layers=2, model_type="llama", removed_layers=(0,), kept_units={1: [2, 5]})
        >>> new, places = parameter_map(LlamaForCausalLM(config), plan)["model.layers.1.mlp.up_proj.weight"]
        >>> new, places.tolist()
        ('model.layers.0.mlp.up_proj.weight', [[8, 9, 10, 11], [20, 21, 22, 23]])
    """
    anatomy = find_anatomy(model)
    plan.validate(anatomy)
    plan = plan.folded(anatomy)
    target = target_of(anatomy, plan)
    gone: list[str] = []
    places: dict[str, torch.Tensor] = {}
    renamed: dict[str, str] = {}
    for part in plan.by_stack:
        on = part.seen_in(anatomy)
        gone += [on.layer_name(i) for i in part.removed_layers]
        for name, layers in part.removed_branches.items():
            for i in layers:
                branch = on.branch(i, name)
                gone += [f"{on.layer_name(i)}.{m}" for m, _ in branch.modules] if branch else []
        for i in {layer for table in part.kept.values() for layer in table}:
            path, layer = on.layer_name(i), on.layer(i)
            twin = copy.deepcopy(layer)  # cut a copy that holds, instead of weights, where each of them lies
            for parameter in twin.parameters():
                parameter.data = torch.arange(parameter.numel(), dtype=torch.float64).view(parameter.shape)
            for name, table in part.kept.items():
                if i in table:
                    code.narrow(twin, on.stack.layers[i].width(name).data(), table[i], take_adapted)  # type: ignore[union-attr]
            for name, parameter in twin.named_parameters():
                places[f"{path}.{name}"] = parameter.detach().long()
        for new, old in enumerate(target.shortened.get(on.stack.path, ())):
            children = list(dict(model_of(anatomy, on.stack.path).named_children()))
            renamed[f"{on.stack.path}.{children[old]}."] = f"{on.stack.path}.{new}."
    prefix = next(n for n, m in model.named_modules() if m is anatomy.model)
    found: dict[str, tuple[str, torch.Tensor | None]] = {}
    for full, parameter in model.named_parameters():
        name = full[len(prefix) + 1 :] if prefix else full
        if any(f"{name}.".startswith(f"{g}.") for g in gone):
            continue
        start = next((old for old in renamed if name.startswith(old)), "")
        new = f"{prefix}." * bool(prefix) + renamed.get(start, "") + name[len(start) :]
        kept = places.get(name)
        found[full] = new, None if kept is None or kept.shape == parameter.shape else kept
    return found


def model_of(anatomy: Anatomy, path: str) -> nn.Module:
    """A module of the model by its dotted name."""
    return anatomy.model.get_submodule(path)


def _cut(on: Anatomy, plan: PruningPlan) -> None:
    """Narrow the widths of one stack, and take its branches out."""
    for name, table in plan.kept.items():
        for i, kept in table.items():
            width = on.stack.layers[i].width(name)
            assert width is not None
            code.narrow(on.layer(i), width.data(), kept, take_adapted)
    for name, layers in plan.removed_branches.items():
        for i in layers:
            branch = on.branch(i, name)
            assert branch is not None
            for module, returns in branch.modules:
                code.replace(on.model, f"{on.layer_name(i)}.{module}", "branch", returns)


def _shorten(model: nn.Module, path: str, stay: Sequence[int]) -> None:
    """Keep some modules of a container, under new numbers; caches find a layer by the number it knows."""
    parent, _, name = path.rpartition(".")
    old = model.get_submodule(path)
    before = len(list(old.children()))
    layers = [layer for i, layer in enumerate(old.children()) if i in set(stay)]
    setattr(
        model.get_submodule(parent),
        name,
        type(old)(*layers) if isinstance(old, nn.Sequential) else nn.ModuleList(layers),
    )
    for index, layer in enumerate(layers):
        for module in layer.modules():
            for attribute, value in list(vars(module).items()):
                if type(value) is int and _INDEX.fullmatch(attribute):
                    setattr(module, attribute, index)
    holder = parent
    while True:
        module = model.get_submodule(holder)
        for attribute, value in list(vars(module).items()):
            if type(value) is int and value == before and _DEPTH.fullmatch(attribute):
                setattr(module, attribute, len(layers))
        if not holder:
            return
        holder = holder.rpartition(".")[0]


def _adopt(model: Any, config: Any) -> None:
    """Give a model another config in place: its modules hold these very objects."""
    after = dict(configs_of(config))
    for path, own in list(configs_of(model.config)):
        if path in after:
            inner = {k: v for k, v in vars(own).items() if hasattr(v, "to_dict") and hasattr(v, "model_type")}
            own.__class__ = type(after[path])
            own.__dict__.clear()
            own.__dict__.update({**vars(after[path]), **inner})


def _left(anatomy: Anatomy, plan: PruningPlan, target: Target) -> Findings:
    """What is known about the model once the plan is applied."""
    from hf_cka.modeling.structure import structure_of

    found = anatomy.findings.without(structure_of(anatomy, plan))
    stacks = []
    for stack in found.stacks:
        stay = target.shortened.get(stack.path)
        if stay is None:
            stacks.append(stack)
            continue
        children = [n for n, _ in anatomy.model.get_submodule(stack.path).named_children()]
        new = {f"{stack.path}.{children[old]}": f"{stack.path}.{i}" for i, old in enumerate(stay)}
        layers = tuple(replace(layer, path=new[layer.path]) for layer in stack.layers if layer.path in new)
        stacks.append(replace(stack, layers=layers))
    return replace(found, stacks=tuple(stacks))


def _record(anatomy: Anatomy, plan: PruningPlan) -> dict[str, Any]:
    """What `config.pruning` will say: the plan by original index, and what it did to the widths."""
    from hf_cka import __version__

    old = getattr(anatomy.model.config, "pruning", None) or {}
    whole = PruningPlan.from_dict(old["plan"]).then(plan) if "plan" in old else plan
    return {
        **old,
        "format_version": 2,
        "hf_cka_version": __version__,
        "plan": whole.to_dict(),
        "widths_before": old.get("widths_before") or widths_of(anatomy),
        "parameters_before": old.get("parameters_before", num_parameters(anatomy.model)),
    }


def widths_of(anatomy: Anatomy) -> dict[str, list[int]]:
    """Heads (or KV groups) and units of every layer, and the experts where there are any, for the record."""
    sizes = [anatomy.sizes(i) for i in range(anatomy.num_layers)]
    widths = [anatomy.width(i, "experts") for i in range(anatomy.num_layers)]
    experts = [w.members * w.output.block if w else 0 for w in widths]
    found = {
        "num_key_value_heads": [s.num_kv_heads for s in sizes],
        "intermediate_size": [s.intermediate_size for s in sizes],
    }
    return found | ({"num_experts": experts} if any(experts) else {})


def _refuse_packed(anatomy: Anatomy, plan: PruningPlan) -> None:
    """Quantized weights do not show their shape, and their rows cannot be picked."""
    for part in plan.by_stack:
        on = part.seen_in(anatomy)
        for name, table in part.kept.items():
            for index in table:
                for s in on.stack.layers[index].width(name).slices:  # type: ignore[union-attr]
                    module = code.part(on.layer(index), s.module)
                    held = getattr(getattr(module, "base_layer", module), s.parameter.rpartition(".")[2], None)
                    if not isinstance(held, torch.Tensor) or not held.is_floating_point() or held.ndim <= s.axis:
                        raise ValueError(
                            f"Layer {index}'s {s.module} ({type(module).__name__}) has a packed weight that cannot be "
                            "cut. Load the model without quantization, prune it, and quantize the result; whole layers "
                            "and sub-layers can be removed from a quantized model."
                        )
