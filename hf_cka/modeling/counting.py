"""The parameters of a model that are its own and not an adapter's, each counted once.

Shapes alone: works on models on the meta device, and builds one there where it is given a config.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from hf_cka.anatomy import find_anatomy


def own_named(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name, parameter) of all that is a model's own and not an adapter's, by the name it has without adapters.

    Args:
        module: with adapters or without. A parameter that is in several places comes once for each.

    Example:
        >>> [name for name, _ in own_named(nn.Sequential(nn.Linear(3, 2)))]
        ['0.weight', '0.bias']
    """
    yield from _own_named(module, "", ())


def _own_named(module: nn.Module, prefix: str, above: tuple[nn.Module, ...]) -> Iterator[tuple[str, nn.Parameter]]:
    for inside in ("base_layer", "original_module"):  # of a tuner layer; of a module that is saved whole
        if isinstance(getattr(module, inside, None), nn.Module):
            yield from _own_named(getattr(module, inside), prefix, above)
            return
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, parameter
    for name, child in module._modules.items():
        if child is not None and not any(child is m for m in above):
            yield from _own_named(child, f"{prefix}{name}.", (*above, module))


def own_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of a model that are its own and not an adapter's, each once.

    Args:
        model: with or without adapters, or a part of one.

    Example:
        >>> sum(p.numel() for p in own_parameters(nn.Linear(3, 2)))
        8
    """
    yield from dict.fromkeys(parameter for _, parameter in own_named(model))


def num_parameters(model: nn.Module) -> int:
    """Return the parameters of a model, embeddings included and adapters left out; tied ones count once.

    Example:
        >>> num_parameters(nn.Linear(3, 2))
        8
    """
    return sum(p.numel() for p in own_parameters(model))


class Weights:
    """Where each parameter of a model is, so that one which several parts share counts once, and goes with the last.

    Args:
        model: with adapters or without; theirs are left out.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        >>> model[1].weight = model[0].weight
        >>> weights = Weights(model)
        >>> weights.total, weights.freed(["0.weight", "0.bias"]), weights.freed(["0.weight", "1.weight"])
        (15, 3, 9)
    """

    def __init__(self, model: nn.Module) -> None:
        self.named = dict(own_named(model))
        self.places = Counter(id(p) for p in self.named.values())
        self.total = sum({id(p): p.numel() for p in self.named.values()}.values())

    def freed(self, names: Iterable[str]) -> int:
        """Return the parameters that are gone once these are; names that are not there count nothing."""
        gone = [self.named[name] for name in set(names) if name in self.named]
        places = Counter(id(p) for p in gone)
        return sum({id(p): p.numel() for p in gone if places[id(p)] == self.places[id(p)]}.values())

    def shared(self, names: Iterable[str]) -> bool:
        """Whether one of these is also somewhere else."""
        return any(self.places[id(self.named[name])] > 1 for name in names if name in self.named)


def model_of(source: Any) -> nn.Module:
    """Return a model, or one without memory for a config.

    Args:
        source: either. For a config: of its first architecture; else a causal language model if its layers are a
            decoder's and there is such a class, else the bare model.
    """
    if isinstance(source, nn.Module):
        return source
    import torch
    import transformers

    from hf_cka.anatomy.twin import quiet
    from hf_cka.modeling import modeling_hf_cka as code
    from hf_cka.modeling.register import register

    register()
    name = (getattr(source, "architectures", None) or [""])[0]
    where = code if name.startswith(code.PREFIX) else transformers
    stock = getattr(where, name, None) if name else None

    def built(make: Any) -> nn.Module:
        with quiet(), torch.device("meta"):
            return make(copy.deepcopy(source))

    if isinstance(stock, type):
        return built(stock)
    bare = built(transformers.AutoModel.from_config)
    decodes = "AutoModelForCausalLM" in code.autos_of(type(source)) and find_anatomy(bare).kind == "decoder"
    return built(transformers.AutoModelForCausalLM.from_config) if decodes else bare
