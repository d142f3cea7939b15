"""Let an optimizer follow the parameters of a model whose structure changes. No plan is made or applied here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

# old name -> (new name, places in the flattened old one, or None where nothing was cut)
Survivors = Mapping[str, tuple[str, torch.Tensor | None]]


def bare_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer itself, out of the wrappers that accelerate puts around it.

    Example:
        >>> inner = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
        >>> bare_optimizer(inner) is inner
        True
    """
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def check_followable(optimizer: Any, names: Mapping[int, str], survivors: Survivors) -> None:
    """Refuse what `follow` could not do.

    Args:
        optimizer: with its states.
        names: id of a parameter -> its name.
        survivors: what becomes of each, by name.

    Raises:
        ValueError: for a parameter that the model does not hold, or a narrowed one whose state does not have its shape
            (factored or blockwise states).
    """
    inner = bare_optimizer(optimizer)
    for group in inner.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise ValueError(
                    f"The optimizer ({type(inner).__name__}) holds a parameter of shape {tuple(parameter.shape)} that "
                    "the model does not name, so it cannot follow the pruning. Use an optimizer over the model's own "
                    "parameters."
                )
            name = names[id(parameter)]
            if survivors.get(name, ("", None))[1] is None:
                continue
            for key, value in inner.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor) and value.numel() > 1 and value.shape != parameter.shape:
                    raise ValueError(
                        f"{type(inner).__name__} keeps {key!r} of {name!r} in the shape {tuple(value.shape)}, which "
                        "cannot be cut with the parameter. Prune whole layers, or use an optimizer whose state has the "
                        "parameters' shape (AdamW, SGD)."
                    )


def follow(optimizer: Any, names: Mapping[int, str], after: Mapping[str, nn.Parameter], survivors: Survivors) -> None:
    """Drop dead parameters and their state, and go on with the state of the ones that live, cut where they were cut.

    The groups stay, with their learning rates, so a schedule goes on.

    Args:
        optimizer: changed in place.
        names: id of an old parameter -> its old name.
        after: new name -> parameter.
        survivors: old name -> what became of it.

    Example:
        >>> old, new = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.AdamW([old])
        >>> old.grad = torch.tensor([1.0, 2.0, 3.0])
        >>> optimizer.step()
        >>> follow(optimizer, {id(old): "w"}, {"w": new}, {"w": ("w", torch.tensor([0, 2]))})
        >>> [round(x, 2) for x in optimizer.state[new]["exp_avg"].tolist()], old in optimizer.state
        ([0.1, 0.3], False)
    """
    inner = bare_optimizer(optimizer)
    for group in inner.param_groups:
        kept = []
        for parameter in group["params"]:
            fate = survivors.get(names[id(parameter)])
            state = inner.state.pop(parameter, None)
            if fate is None:
                continue
            name, places = fate
            now = after[name]
            kept.append(now)
            if state is not None:
                inner.state[now] = state if places is None else _cut(state, parameter, places)
        group["params"] = kept


def _cut(state: Mapping[str, Any], parameter: nn.Parameter, places: torch.Tensor) -> dict[str, Any]:
    return {
        key: value.flatten()[places.to(value.device)]
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.ndim > 0
        else value
        for key, value in state.items()
    }
