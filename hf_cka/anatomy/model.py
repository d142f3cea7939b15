"""The anatomy of one model: what was found out about its configuration, with the modules of the model itself."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hf_cka.anatomy.experiment import discover
from hf_cka.anatomy.parts import Branch, Findings, Stack, Width
from hf_cka.anatomy.twin import Twin, quiet
from hf_cka.lookup import lookup

#: role of the projection through which members reach the residual stream -> the kind of width
OUTPUTS = {"o": "heads", "down": "units"}
# Fields of a config that change nothing about what the model is made of.
_PASSING = (
    "_name_or_path", "architectures", "auto_map", "dtype", "id2label", "label2id", "pruning", "transformers_version",
    "use_cache", "torch_dtype", "_attn_implementation", "_attn_implementation_internal", "quantization_config",
)  # fmt: skip
# configuration -> what was found; and the twins of the last few, on which checkpoints are proved
_FOUND: dict[str, Findings] = {}
_TWINS: dict[str, Twin | None] = {}
_KEPT_TWINS = 4


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of one layer; 0 where it has none of a kind.

    Attributes:
        num_heads: query heads.
        num_kv_heads: what goes together: KV groups, or the heads themselves.
        head_dim: width of one head, as its output projection sees it.
        intermediate_size: units.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int


@dataclass(frozen=True)
class Anatomy:
    """One stack of one model, and the way to its others.

    Attributes:
        model: the model that was handed in, unwrapped from PEFT, DDP and `torch.compile`.
        findings: all of its stacks.
        stack: the one that this is about.
    """

    model: nn.Module
    findings: Findings
    stack: Stack

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """All stacks of the model: the one with most parameters first, those that text alone does not reach last."""
        return self.findings.stacks

    def on(self, stack: str) -> Anatomy:
        """The same model seen from another of its stacks.

        Args:
            stack: its path, or any part of it that no other stack has.

        Raises:
            ValueError: if no stack, or more than one, is called so.
        """
        return replace(self, stack=stack_named(self.findings, stack, self.model))

    @property
    def kind(self) -> str:
        """ "decoder" or "encoder"."""
        return self.stack.kind

    @property
    def model_type(self) -> str:
        """The `model_type` of the stock config of the layers."""
        return model_type_of(self.config)

    @property
    def layers_path(self) -> str:
        """Dotted path of the container of layers in `model`, e.g. "model.layers"."""
        return self.stack.path

    @property
    def layers(self) -> list[nn.Module]:
        """The layers, in the order they run."""
        return [self.model.get_submodule(layer.path) for layer in self.stack.layers]

    @property
    def num_layers(self) -> int:
        """Number of layers the stack has now."""
        return len(self.stack.layers)

    @property
    def backbone_path(self) -> str:
        """Dotted path of the module whose output is the stack's; "" is the model."""
        return self.stack.backbone

    @property
    def backbone(self) -> nn.Module:
        """The module whose output is the stack's, after its final norm."""
        return self.model.get_submodule(self.stack.backbone)

    @property
    def config(self) -> Any:
        """The config that describes the layers."""
        return getattr(self.backbone, "config", None) or self.model.config

    @property
    def linear_names(self) -> tuple[str, ...]:
        """Names of all projections of the layers, relative to the layer."""
        return tuple(dict.fromkeys(n for layer in self.stack.layers for n in layer.linears))

    def layer(self, index: int) -> nn.Module:
        """Layer `index`."""
        return self.model.get_submodule(self.stack.layers[index].path)

    def layer_name(self, index: int) -> str:
        """Dotted path of layer `index` in `model`."""
        return self.stack.layers[index].path

    def skipped(self, index: int) -> tuple[str, ...]:
        """Names of the branches that layer `index` no longer has."""
        return self.stack.layers[index].skipped

    def branch(self, index: int, name: str) -> Branch | None:
        """The branch of that name in layer `index`, or None."""
        return self.stack.layers[index].branch(name)

    def width(self, index: int, name: str) -> Width | None:
        """The width of that name in layer `index`, if its members can go; or None."""
        width = self.stack.layers[index].width(name)
        return None if width is None or width.reason else width

    def outputs(self, index: int) -> dict[str, Width]:
        """The widths of layer `index` that can be narrowed, by the role of their output: "o" (heads) or "down"."""
        return {role: w for role, kind in OUTPUTS.items() if (w := self.width(index, kind)) is not None}

    def sizes(self, index: int) -> LayerSizes:
        """Sizes of layer `index`."""
        heads, units = (self.width(index, kind) for kind in OUTPUTS.values())
        return LayerSizes(
            num_heads=heads.members * heads.heads if heads else 0,
            num_kv_heads=heads.members if heads else 0,
            head_dim=heads.output.block // heads.heads if heads else 0,
            intermediate_size=units.members if units else 0,
        )

    def alike(self) -> list[list[int]]:
        """Indices of the layers of the stack, in runs of layers that differ in nothing but their names."""
        runs: list[list[int]] = []
        for i, layer in enumerate(self.stack.layers):
            before = self.stack.layers[runs[-1][0]] if runs else None
            if before is not None and replace(before, path="") == replace(layer, path=""):
                runs[-1].append(i)
            else:
                runs.append([i])
        return runs

    def table(self, rungs: Mapping[str, str] | None = None) -> str:
        """Stacks, layers, branches and widths, what can be removed and why not where not, as text.

        Args:
            rungs: what `hf_cka.modeling.rungs_of` found, to say beside each part which classes a checkpoint without
                it needs.
        """
        lines = [
            f"{type(self.model).__name__} ({self.model_type}), tried on {', '.join(self.findings.inputs) or 'nothing'}"
        ]
        for stack in self.stacks:
            mark = "  (default)" if stack.path == self.stack.path else ""
            mark += "  (text alone does not reach it)" if stack.optional else ""
            lines.append(
                f"\n{stack.path}: {len(stack.layers)} layers, {stack.kind}, {stack.parameters:,} parameters{mark}"
            )
            lines += _rows(self.on(stack.path), rungs or {})
        lines += [f"\nnot seen: {name} (no input of the experiment reached it)" for name in self.findings.unseen]
        lines += [f"\n{note}" for note in self.findings.notes]
        return "\n".join(lines)


def _rows(on: Anatomy, rungs: Mapping[str, str]) -> list[str]:
    """One line per run of layers that are alike."""
    lines = []
    for alike in on.alike():
        layer = on.stack.layers[alike[0]]
        names = [on.layer_name(i).rpartition(".")[2] for i in (alike[0], alike[-1])]

        def state(reason: str, key: str) -> str:
            rung = rungs.get(key, "")
            return f"stays ({reason})" if reason else "removable" + (f" [{rung}]" if rung else "")

        which = names[0] if len(alike) == 1 else "-".join(names)
        lines.append(f"  layer {which}: {state(layer.reason, layer.path)}")
        for branch in layer.branches:
            told = "is the layer" if layer.single else state(branch.reason, f"{layer.path}/{branch.name}")
            lines.append(f"    {branch.name} ({branch.label}): {told}")
            for width in layer.widths:
                if width.branch == branch.name:
                    rung = rungs.get(f"{layer.path}/{width.name}", "")
                    notes = [f"stay ({width.reason})"] if width.reason else [] if width.exact else ["a norm spans them"]
                    lines.append(
                        f"      {', '.join([f'{width.name}: {width.members}', *notes])}" + f" [{rung}]" * bool(rung)
                    )
    return lines


def find_anatomy(model: nn.Module, stack: str | None = None) -> Anatomy:
    """Find out what a model is made of, by experiments on a small random twin; the model is not run or changed.

    Args:
        model: a `PreTrainedModel` with any head, a bare backbone, or either inside PEFT, DDP or `torch.compile`.
        stack: the stack to look from, by path or part of one; by default the first of `Anatomy.stacks`.

    Raises:
        ValueError: if the model has no stack of layers, or none of that name.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     num_hidden_layers=2, hidden_size=8, intermediate_size=16, num_attention_heads=2, vocab_size=16
        ... )
        >>> anatomy = find_anatomy(LlamaForCausalLM(config))
        >>> anatomy.layers_path, anatomy.num_layers, anatomy.kind
        ('model.layers', 2, 'decoder')
        >>> [(b.name, b.module) for b in anatomy.stack.layers[0].branches]
        [('attention', 'self_attn'), ('mlp', 'mlp')]
        >>> anatomy.sizes(0)
        LayerSizes(num_heads=2, num_kv_heads=2, head_dim=4, intermediate_size=16)
    """
    model = unwrap(model)
    if getattr(model, "config", None) is None:
        raise ValueError(f"{type(model).__name__} has no config; hand in a model of transformers.")
    findings = findings_of(type(model), model.config, model)
    if not findings.stacks:
        raise ValueError(
            f"No stack of layers was found in {type(model).__name__} (model_type {model_type_of(model.config)!r}): no "
            "container of modules hands a residual stream from one to the next. " + " ".join(findings.notes)
        )
    chosen = findings.stacks[0] if stack is None else stack_named(findings, stack, model)
    return Anatomy(model, findings, chosen)


def stack_named(findings: Findings, name: str, model: nn.Module) -> Stack:
    """Return the stack whose path is, or alone contains, a name.

    Raises:
        ValueError: if there is none, or more than one; with the names there are.
    """
    exact = [s for s in findings.stacks if s.path == name]
    fitting = exact or [s for s in findings.stacks if name in s.path]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise ValueError(f"stack={name!r} could be {', '.join(repr(s.path) for s in fitting)}; give more of the name.")
    paths = {s.path: s for s in findings.stacks}
    unseen = [n for n in findings.unseen if name in n]
    if unseen:
        raise ValueError(
            f"Nothing is known about {unseen[0]!r} of {type(model).__name__}: no input of the experiment reached it."
        )
    return lookup(paths, name, "stack")


def findings_of(cls: type, config: Any, model: nn.Module | None = None) -> Findings:
    """Return what is known about a class and a configuration; found out the first time it is asked for.

    Args:
        cls: of the model, stock or pruned.
        config: of the model.
        model: looked at where the class cannot be built from the config.
    """
    key = _key(cls, config)
    if key not in _FOUND:
        structure = config.__dict__.get("hf_cka")
        stock = getattr(cls, "stock_class", cls)
        if structure:
            _FOUND[key] = findings_of(stock, dense_config(config)).without(structure)
        else:
            remember(cls, config, *discover(_reference(stock, config, model)))
    return _FOUND[key]


def twin_of(cls: type, config: Any) -> Twin | None:
    """Return the twin of a stock class and configuration, or None where none could be run."""
    key = _key(cls, config)
    if key not in _TWINS:
        _FOUND.pop(key, None)
        findings_of(cls, config)
    return _TWINS.get(key)


def remember(cls: type, config: Any, findings: Findings, twin: Twin | None = None) -> None:
    """Keep what is known about a class and a configuration, so that it need not be found out."""
    key = _key(cls, config)
    _FOUND[key] = findings
    if twin is not None:
        _TWINS[key] = twin
        while len(_TWINS) > _KEPT_TWINS:
            _TWINS.pop(next(iter(_TWINS)))


def _reference(stock: Any, config: Any, model: nn.Module | None) -> nn.Module:
    """The shapes of the dense model, without its weights."""
    try:
        with quiet(), torch.device("meta"):
            return stock._from_config(copy.deepcopy(config))
    except Exception:
        if model is None:
            raise
        return model


def dense_config(config: Any) -> Any:
    """The stock config that a pruned one was made from.

    Args:
        config: of a pruned model; others are returned as they are.
    """
    stock = getattr(type(config), "stock_class", None)
    if stock is None:
        return config
    dense = copy.deepcopy(config)
    dense.__class__ = stock
    for name in ("hf_cka", "base_model_type", "auto_map"):
        dense.__dict__.pop(name, None)
    if dense.__dict__.get("model_type") == type(config).model_type:  # a config that was read holds what its file said
        del dense.__dict__["model_type"]
    return dense


def _key(cls: type, config: Any) -> str:
    fields = {k: v for k, v in config.to_dict().items() if k not in _PASSING}
    return f"{cls.__name__}{json.dumps(fields, sort_keys=True, default=str)}"


def model_type_of(config: Any) -> str:
    """The `model_type`, or that of the stock model a pruned one was made from."""
    return str(getattr(config, "base_model_type", None) or getattr(config, "model_type", ""))


def unwrap(model: nn.Module, keep_adapters: bool = False) -> nn.Module:
    """Return the model inside `torch.compile`, DDP and PEFT; told by what they have, so that none needs importing.

    Args:
        model: wrapped or not.
        keep_adapters: stop at a `PeftModel` instead of returning what is in it.

    Example:
        >>> from torch import nn
        >>> linear = nn.Linear(2, 2)
        >>> unwrap(linear) is linear
        True
    """
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            if keep_adapters:
                return model
            model = model.get_base_model()  # type: ignore[operator]
        elif hasattr(model, "module") and hasattr(model, "device_ids"):
            model = model.module  # type: ignore[assignment]
        else:
            return model
