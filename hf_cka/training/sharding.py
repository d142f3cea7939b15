"""FSDP2 in boundary mode: a model is sharded while it trains and whole while it is pruned.

PyTorch has no way back from `fully_shard`. What a module was before is remembered here, and put back with gathered
parameters; sharding itself is accelerate's. What is refused is in `checks`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hf_cka.training.optimizer import bare_optimizer

# of a module: its class, its attributes but for parameters and buffers, and what was in those that are tables
_Module = tuple[type, dict[str, Any], dict[str, dict[Any, Any]]]
Remembered = Mapping[nn.Module, _Module]
_TENSORS = ("_parameters", "_buffers")


def is_sharded(model: nn.Module) -> bool:
    """Return whether a process holds parts of the parameters only.

    Example:
        >>> is_sharded(nn.Linear(2, 2))
        False
    """
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def remember(model: nn.Module) -> Remembered:
    """Return what `make_whole` needs to know of a model before it is sharded; no tensor is kept alive.

    Args:
        model: not sharded.

    Raises:
        ValueError: if it is sharded.

    Example:
        >>> len(remember(nn.Sequential(nn.Linear(2, 2))))
        2
    """
    if is_sharded(model):
        raise ValueError(
            "The model was sharded before training began, by an evaluation perhaps. Make the trainer anew and call "
            "trainer.train() first; eval_on_start=True evaluates before the first step."
        )
    return {module: _of(module) for module in model.modules()}


@torch.no_grad()
def make_whole(model: nn.Module, optimizer: Any, remembered: Remembered) -> None:
    """Gather every parameter and every state of the optimizer, and put the modules back to what they were.

    Every process takes part, and needs the memory for the whole model and its optimizer. The modules and the optimizer
    stay the same objects; both can be sharded again.

    Args:
        model: sharded by FSDP2.
        optimizer: over its parameters.
        remembered: from `remember`, before it was sharded.
    """
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward pass may have left whole parameters in the place of the trained ones
    whole: dict[int, nn.Parameter] = {}
    for parameter in model.parameters():  # in the same order everywhere, and tied ones once
        whole[id(parameter)] = nn.Parameter(_whole(parameter), requires_grad=parameter.requires_grad)
    inner = bare_optimizer(optimizer)
    for group in inner.param_groups:
        for parameter in group["params"]:
            state = inner.state.pop(parameter, None)
            if state is not None:
                inner.state[whole[id(parameter)]] = {key: _whole(value) for key, value in state.items()}
        group["params"] = [whole[id(parameter)] for parameter in group["params"]]
    for module in list(model.modules()):
        _put_back(module, remembered[module])
        for name, old in module._parameters.items():
            module._parameters[name] = None if old is None else whole[id(old)]
        # `fully_shard` refuses a module that is listed here (torch 2.13), and nothing public takes it out
        _module_state_mapping.pop(module, None)


def _of(module: nn.Module) -> _Module:
    attributes = {name: value for name, value in vars(module).items() if name not in _TENSORS}
    tables = {name: dict(value) for name, value in attributes.items() if isinstance(value, dict)}
    return type(module), attributes, tables


def _put_back(module: nn.Module, remembered: _Module) -> None:
    kind, attributes, tables = remembered
    now = {name: vars(module)[name] for name in (*_TENSORS, "training")}
    module.__class__ = kind
    module.__dict__.clear()
    module.__dict__.update(attributes | now)
    for name, content in tables.items():  # the same dict, which the handles of hooks refer to
        attributes[name].clear()
        attributes[name].update(content)


def _whole(value: Any) -> Any:
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value
