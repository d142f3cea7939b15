"""Apply a plan to a model in memory: remove what it names, renumber the rest, and say so in the config.

Choosing what to remove, repairing and training what is left, and files never belong here.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_cka.anatomy import Anatomy, LayerSizes, find_anatomy
from hf_cka.anatomy.model import unwrap
from hf_cka.pruning.adapters import adapter_configs, check_adapters, keep_adapted, own_parameters, rename_targets
from hf_cka.pruning.plan import PruningPlan

if TYPE_CHECKING:
    from hf_cka.modeling.structure import LayerShape


def apply_plan(model: Any, plan: PruningPlan) -> Any:
    """Remove from a model, in place, what a plan names.

    Whole layers leave a stock model. Uniform widths do too where the stock config can say them. Otherwise the model
    and its config become the `Pruned...` subclass of their own class, which saves and loads like any other. The dense
    weights are freed; parameters that shrink are new objects, so make the optimizer afterwards. `config.pruning`
    holds the plan by original index, extended when a pruned model is pruned again.

    The result equals the dense model with the same parts zeroed, except for OLMo2's query and key norms, which span
    all heads: their mean square is over the heads that are left.

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
    from hf_cka.modeling import modeling_hf_cka as code
    from hf_cka.modeling.structure import reshaped_config

    anatomy = find_anatomy(model)
    given, model = unwrap(model, keep_adapters=True), anatomy.model
    shapes = plan.shapes(anatomy)
    check_adapters(anatomy, plan)
    _refuse_packed(anatomy, plan)
    new = reshaped_config(anatomy.family, anatomy.config, shapes)
    if hasattr(new, "base_model_type") and anatomy.config is not model.config:
        raise ValueError(
            f"{type(model).__name__} holds the layers in {anatomy.backbone_path!r}. Only whole layers and uniform "
            "widths can be removed there; prune the text model on its own for sub-layers and uneven widths."
        )
    record = _record(anatomy, plan)

    # From here on nothing can fail for a reason of the caller's.
    layout = anatomy.family.to_dict()
    before = {shape.source: anatomy.sizes(shape.source) for shape in shapes}
    skipped = {shape.source: anatomy.skipped(shape.source) for shape in shapes}
    layers = [anatomy.layer(shape.source) for shape in shapes]
    for position, (layer, shape) in enumerate(zip(layers, shapes, strict=True)):
        _cut(layer, layout, plan, shape, before[shape.source], skipped[shape.source])
        if hasattr(new, "base_model_type"):
            code.own_config(layer, layout, shape.num_heads, shape.num_kv_heads)
        _renumber(layer, position)
    _set_layers(anatomy, layers)
    # in place: every attention module holds this very object
    anatomy.config.__class__ = type(new)
    anatomy.config.__dict__.clear()
    anatomy.config.__dict__.update(new.__dict__)
    anatomy.config.pruning = record
    anatomy.config.pruning["parameters_after"] = _num_parameters(model)
    stock = getattr(type(model), "stock_class", type(model))
    code.become(model, code.model_class(stock) if hasattr(new, "base_model_type") else stock)
    if adapter_configs(model):
        rename_targets(given, find_anatomy(model), tuple(shape.source for shape in shapes))
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
    shapes = {shape.source: (position, shape) for position, shape in enumerate(plan.shapes(anatomy))}
    prefix = next(name for name, module in model.named_modules() if module is anatomy.layers)
    layout = anatomy.family.to_dict()
    found: dict[str, tuple[str, torch.Tensor | None]] = {}
    inside = {
        f"{prefix}.{index}.{name}": (index, name)
        for index in range(anatomy.num_layers)
        for name, _ in anatomy.layer(index).named_parameters()
    }
    places = {}
    for index, (_, shape) in shapes.items():
        touched = index in {*plan.kept_groups, *plan.kept_units, *plan.removed_attention, *plan.removed_mlp}
        if touched:  # cut a copy that holds, instead of weights, where each of them lies
            twin = copy.deepcopy(anatomy.layer(index))
            for parameter in twin.parameters():
                parameter.data = torch.arange(parameter.numel(), dtype=torch.float64).view(parameter.shape)
            _cut(twin, layout, plan, shape, anatomy.sizes(index), anatomy.skipped(index))
            places[index] = {name: parameter.detach().long() for name, parameter in twin.named_parameters()}
    for name, parameter in model.named_parameters():
        if name not in inside:
            found[name] = name, None
            continue
        index, inner = inside[name]
        if index in shapes and (index not in places or inner in places[index]):
            kept = places[index][inner] if index in places else None
            whole = kept is None or kept.shape == parameter.shape
            found[name] = f"{prefix}.{shapes[index][0]}.{inner}", None if whole else kept
    return found


def _cut(
    layer: nn.Module, layout: dict[str, Any], plan: PruningPlan, shape: LayerShape, sizes: LayerSizes, skipped: Any
) -> None:
    """Remove from one layer what a plan names."""
    from hf_cka.modeling import modeling_hf_cka as code

    for which in shape.skip:
        if which not in skipped:
            code.skip_sublayer(layer, layout, which)
    if shape.source in plan.kept_groups and "attention" not in shape.skip:
        code.keep_groups(
            layer, layout, plan.kept_groups[shape.source], sizes.num_heads, sizes.num_kv_heads, keep_adapted
        )
    if shape.source in plan.kept_units and "mlp" not in shape.skip:
        code.keep_units(layer, layout, plan.kept_units[shape.source], keep_adapted)


def _renumber(layer: nn.Module, index: int) -> None:
    """Caches find a layer by this number; a stale one raises in `generate`, or reads another layer's cache."""
    for module in layer.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            module.layer_idx = index  # type: ignore[assignment]


def _set_layers(anatomy: Anatomy, layers: list[nn.Module]) -> None:
    parent, _, name = anatomy.family.layers.rpartition(".")
    holder = anatomy.backbone.get_submodule(parent)
    setattr(holder, name, nn.ModuleList(layers))
    if isinstance(getattr(holder, "n_layers", None), int):
        holder.n_layers = len(layers)  # type: ignore[assignment]


def _num_parameters(model: nn.Module) -> int:
    """Parameters of the model, its adapters left out; tied ones count once."""
    return sum(p.numel() for p in own_parameters(model))


def _record(anatomy: Anatomy, plan: PruningPlan) -> dict[str, Any]:
    """What `config.pruning` will say: the plan by original index, and what it did to the widths."""
    from hf_cka import __version__
    from hf_cka.modeling.structure import layer_shapes

    old = getattr(anatomy.config, "pruning", None) or {}
    whole = PruningPlan.from_dict(old["plan"]).then(plan) if "plan" in old else plan
    widths = old.get("widths_before") or {
        "num_key_value_heads": [s.num_kv_heads for s in layer_shapes(anatomy.family, anatomy.config)],
        "intermediate_size": [s.intermediate_size for s in layer_shapes(anatomy.family, anatomy.config)],
    }
    return {
        **old,
        "format_version": 1,
        "hf_cka_version": __version__,
        "plan": whole.to_dict(),
        "widths_before": widths,
        "parameters_before": old.get("parameters_before", _num_parameters(anatomy.model)),
    }


def _refuse_packed(anatomy: Anatomy, plan: PruningPlan) -> None:
    """Quantized weights do not show their shape, and their rows cannot be picked."""
    for index in sorted({*plan.kept_groups, *plan.kept_units}):
        for role, path in anatomy.projections(index).items():
            module = anatomy.layer(index).get_submodule(path)
            weight = getattr(module, "weight", None)
            if weight is None or not weight.is_floating_point() or weight.ndim != 2:
                raise ValueError(
                    f"Layer {index}'s {role} projection ({type(module).__name__}) has a packed weight that cannot be "
                    "cut. Load the model without quantization, prune it, and quantize the result; whole layers and "
                    "sub-layers can be removed from a quantized model."
                )
