"""What a model costs before and after a plan, and who can load the result: told before anything is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_cka.anatomy import Anatomy, Family, LayerSizes, find_anatomy
from hf_cka.pruning.adapters import own_parameters
from hf_cka.modeling.plan import PruningPlan, family_and_config

if TYPE_CHECKING:
    from hf_cka.modeling.structure import LayerShape, Rung


@dataclass(frozen=True)
class Cost:
    """What one model costs.

    Attributes:
        parameters: all of them; tied ones count once.
        non_embedding_parameters: without embeddings and the output projection to the vocabulary.
        kv_cache_bytes_per_token: keys and values of one token, in the dtype of the model; 0 for encoders.
        prefill_flops: to read `length` tokens and give the logits of the last one (of all, for encoders); one
            multiply-add is two.
        decode_flops: to generate one token after `length`; 0 for encoders.
    """

    parameters: int
    non_embedding_parameters: int
    kv_cache_bytes_per_token: int
    prefill_flops: int
    decode_flops: int


@dataclass(frozen=True)
class Price:
    """What a plan changes.

    Attributes:
        before: the model as it is.
        after: the model after the plan.
        length: tokens of context that the FLOPs are for.
    """

    before: Cost
    after: Cost
    length: int

    @property
    def ratio(self) -> float:
        """Removed parameters over all parameters, embeddings included."""
        return 1 - self.after.parameters / self.before.parameters

    @property
    def non_embedding_ratio(self) -> float:
        """The same without embeddings."""
        return 1 - self.after.non_embedding_parameters / self.before.non_embedding_parameters

    def __str__(self) -> str:
        rows = []
        for name in Cost.__dataclass_fields__:
            before, after = getattr(self.before, name), getattr(self.after, name)
            share = f"{after / before:7.1%}" if before else "      -"
            rows.append(f"{name.replace('_', ' '):28}{before:>18,}{after:>18,}{share}")
        return "\n".join([f"{f'at {self.length} tokens':28}{'before':>18}{'after':>18}  ratio", *rows])


@dataclass(frozen=True)
class _LayerCost:
    """Parameters of one layer, as they grow with its groups and units."""

    per_group: int
    attention_rest: int
    per_unit: int
    mlp_rest: int
    other: int
    group_matmul: int  # weights that multiply every token, per group
    unit_matmul: int


class CostTable:
    """The costs of one model, from which any number of plans is priced without building anything.

    Args:
        model: a model, its `Anatomy`, or its config (a model is then built on the meta device).

    Raises:
        ValueError: if the family is not known.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(num_hidden_layers=4, hidden_size=8, intermediate_size=16, num_attention_heads=2,
        ...                      vocab_size=16)
        >>> price = CostTable(config).price(PruningPlan(num_layers=4, model_type="llama", removed_layers=(1, 2)))
        >>> round(price.non_embedding_ratio, 2)
        0.5
    """

    def __init__(self, model: Any) -> None:
        anatomy = model if isinstance(model, Anatomy) else None
        if anatomy is None and hasattr(model, "named_modules"):
            anatomy = find_anatomy(model)
        if anatomy is None or any(not p.is_floating_point() for p in anatomy.model.parameters()):
            anatomy = _on_meta(anatomy.model.config if anatomy else model)
        self.anatomy = anatomy
        whole: Any = anatomy.model
        sizes = [anatomy.sizes(i) for i in range(anatomy.num_layers)]
        self.layers = [_layer_cost(layer, anatomy, sizes[i], i) for i, layer in enumerate(anatomy.layers)]
        self.total = sum(p.numel() for p in own_parameters(whole))
        head = whole.get_output_embeddings() if hasattr(whole, "get_output_embeddings") else None
        self.head = 0 if head is None else head.weight.numel()
        embeddings = {
            id(p): p.numel() for m in whole.modules() if isinstance(m, nn.Embedding) for p in own_parameters(m)
        }
        if head is not None:
            embeddings |= {id(p): p.numel() for p in own_parameters(head)}
        self.embeddings = sum(embeddings.values())
        dtype = getattr(anatomy.config, "dtype", None) or next(whole.parameters()).dtype
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        self.bytes = torch.finfo(dtype).bits // 8

    def price(self, plan: PruningPlan, length: int = 1024) -> Price:
        """Return what a plan changes.

        Args:
            plan: for this model.
            length: tokens of context for the FLOPs.

        Raises:
            ValueError: if the plan does not fit the model.
        """
        from hf_cka.modeling.structure import layer_shapes

        family, config = self.anatomy.family, self.anatomy.config
        before = self._cost(layer_shapes(family, config), length)
        return Price(before, self._cost(plan.shapes(self.anatomy), length), length)

    def _cost(self, shapes: list[LayerShape], length: int) -> Cost:
        decoder = self.anatomy.kind == "decoder"
        parameters = self.total - sum(self._parameters(i, shape) for i, shape in self._all())
        cache = prefill = decode = 0
        for shape in shapes:
            parameters += self._parameters(shape.source, shape)
            layer, sizes = self.layers[shape.source], self.anatomy.sizes(shape.source)
            span = self._span(shape.source)
            matmul = layer.group_matmul * shape.num_kv_heads + layer.unit_matmul * shape.intermediate_size
            width = shape.num_heads * sizes.head_dim
            cache += 2 * shape.num_kv_heads * sizes.head_dim * self.bytes
            pairs = _pairs(length, span, decoder)
            prefill += 2 * matmul * length + 4 * width * pairs
            decode += 2 * matmul + 4 * width * min(length, span or length)
        return Cost(
            parameters=parameters,
            non_embedding_parameters=parameters - self.embeddings,
            kv_cache_bytes_per_token=cache if decoder else 0,
            prefill_flops=prefill + 2 * self.head * (1 if decoder else length),
            decode_flops=decode + 2 * self.head if decoder else 0,
        )

    def _all(self) -> list[tuple[int, LayerShape]]:
        from hf_cka.modeling.structure import layer_shapes

        return list(enumerate(layer_shapes(self.anatomy.family, self.anatomy.config)))

    def _parameters(self, index: int, shape: LayerShape) -> int:
        layer = self.layers[index]
        count = layer.other
        if "attention" not in shape.skip:
            count += layer.attention_rest + layer.per_group * shape.num_kv_heads
        if "mlp" not in shape.skip:
            count += layer.mlp_rest + layer.per_unit * shape.intermediate_size
        return count

    def _span(self, index: int) -> int | None:
        """How many tokens a token of this layer sees at most; None for all."""
        config = self.anatomy.config
        window = getattr(config, "sliding_window", None)
        types = getattr(config, "layer_types", None)
        if window is None or (types is not None and types[index] != "sliding_attention"):
            return None
        return window if self.anatomy.kind == "decoder" else 2 * window + 1


def _pairs(length: int, span: int | None, causal: bool) -> int:
    """Pairs of tokens that see each other."""
    reach = length if span is None else min(span, length)
    if not causal:
        return length * reach
    return reach * (reach + 1) // 2 + (length - reach) * reach


def _layer_cost(layer: nn.Module, anatomy: Anatomy, sizes: LayerSizes, index: int) -> _LayerCost:
    family = anatomy.family
    roles = anatomy.projections(index)
    attention = _parameters_under(layer, _attention_paths(family)) if "o" in roles else {}
    mlp_paths = ((family.mlp,) if family.mlp else ()) + family.mlp_norms
    mlp_paths += tuple(family.projections[r] for r in ("gate", "up", "gate_up", "down") if r in family.projections)
    mlp = _parameters_under(layer, mlp_paths) if "down" in roles else {}
    per_group = group_matmul = per_unit = unit_matmul = 0
    for role, path in roles.items():
        projection: Any = layer.get_submodule(path)
        weight = projection.weight.numel()
        bias = projection.bias.numel() if getattr(projection, "bias", None) is not None else 0
        if role in ("q", "k", "v", "qkv", "o"):
            per_group += (weight + (bias if role != "o" else 0)) // sizes.num_kv_heads
            group_matmul += weight // sizes.num_kv_heads
        else:
            per_unit += (weight + (bias if role != "down" else 0)) // sizes.intermediate_size
            unit_matmul += weight // sizes.intermediate_size
    if "o" in roles:
        extra = family.position_projections + (family.query_key_norms if family.norm_scope == "all" else ())
        per_group += sum(_parameters_under(layer, extra).values()) // sizes.num_kv_heads
    total = sum(p.numel() for p in own_parameters(layer))
    own, units = sum(attention.values()), sum(mlp.values())
    return _LayerCost(
        per_group=per_group,
        attention_rest=own - per_group * sizes.num_kv_heads,
        per_unit=per_unit,
        mlp_rest=units - per_unit * sizes.intermediate_size,
        other=total - own - units,
        group_matmul=group_matmul,
        unit_matmul=unit_matmul,
    )


def _attention_paths(family: Family) -> tuple[str, ...]:
    return (family.attention_core, family.projections["o"], *family.attention_norms)


def _parameters_under(layer: nn.Module, paths: tuple[str, ...]) -> dict[int, int]:
    """Parameters of the modules at these paths, each once."""
    from hf_cka.modeling.modeling_hf_cka import part

    modules = [module for path in paths if (module := part(layer, path)) is not None]
    return {id(p): p.numel() for module in modules for p in own_parameters(module)}


def _on_meta(config: Any) -> Anatomy:
    """A model of this config without memory."""
    import transformers

    from hf_cka.modeling.register import register

    register()
    name = (getattr(config, "architectures", None) or [""])[0]
    family, _ = family_and_config(config)
    with torch.device("meta"):
        if isinstance(getattr(transformers, name, None), type):
            return find_anatomy(getattr(transformers, name)(config))
        auto = transformers.AutoModelForCausalLM if family.kind == "decoder" else transformers.AutoModel
        return find_anatomy(auto.from_config(config))


def price(plan: PruningPlan, model: Any, length: int = 1024) -> Price:
    """Return what a plan changes; for many plans of one model, keep a `CostTable`.

    Args:
        plan: the plan.
        model: a model, its `Anatomy`, or its config.
        length: tokens of context for the FLOPs.
    """
    return CostTable(model).price(plan, length)


@dataclass(frozen=True)
class Explanation:
    """Who can load a pruned checkpoint.

    Attributes:
        rung: of the ladder.
        loaders: program -> what it takes.
    """

    rung: Rung
    loaders: Mapping[str, str]

    def __str__(self) -> str:
        head = f"rung {self.rung.name!r}, model_type {self.rung.model_type!r}"
        head += f" ({self.rung.reason})" if self.rung.reason else ""
        return "\n".join([head, *(f"  {program}: {text}" for program, text in self.loaders.items())])


def explain(plan: PruningPlan, model: Any) -> Explanation:
    """Say which rung of the ladder a pruned checkpoint needs, and who can load it.

    Args:
        plan: the plan.
        model: a model, its `Anatomy`, or its config.

    Raises:
        ValueError: if the plan does not fit the model.

    Example:
        >>> from transformers import LlamaConfig
        >>> plan = PruningPlan(num_layers=32, model_type="llama", removed_attention=(5,))
        >>> plan.explain(LlamaConfig()).rung.name
        'hf_cka'
    """
    from hf_cka.modeling.structure import reshaped_config, rung_of

    family, config = family_and_config(model)
    shapes = plan.shapes(model)
    rung = rung_of(family, reshaped_config(family, config, shapes))
    if rung.name != "hf_cka":
        as_what = "as the dense model" if rung.name == "stock" else "as any Mistral"
        loaders = {"transformers": as_what, "vLLM": as_what, "llama.cpp": as_what}
    else:
        skips = any("attention" in shape.skip for shape in shapes)
        loaders = {
            "transformers": "after `import hf_cka`, or with trust_remote_code=True",
            "vLLM": "no: its transformers backend refuses layers without attention"
            if skips
            else "through its transformers backend, with trust_remote_code",
            "llama.cpp": "no",
        }
    return Explanation(rung, loaders)
