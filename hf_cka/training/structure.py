"""Change the structure of a model that is being trained: model and optimizer together, or neither.

What goes is decided in `hf_cka.pruning`; when, in the callback.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hf_cka.anatomy import find_anatomy
from hf_cka.data import Batch
from hf_cka.modeling.plan import PruningPlan
from hf_cka.modeling.surgery import apply_plan, parameter_map
from hf_cka.pruning.criteria.inputs import output_projections
from hf_cka.pruning.repair import repair
from hf_cka.training.distributed import rebuild_ddp
from hf_cka.training.optimizer import check_followable, follow


def change_structure(
    model: nn.Module,
    plan: PruningPlan,
    *,
    optimizer: Any = None,
    method: str | None = None,
    batches: Sequence[Batch] = (),
    wrapped: Any = None,
) -> None:
    """Apply a plan to a model in place, with a repair, and let its wrapper and the optimizer follow.

    Args:
        model: changed in place.
        plan: what goes, by current index.
        optimizer: over its parameters, if there is one already.
        method: the repair, by name.
        batches: calibration data of the repair.
        wrapped: the model as it is run, if that is a `DistributedDataParallel`.

    Raises:
        ValueError: as `apply_plan`, `repair` and `check_followable`.
        Exception: whatever else comes (out of memory, an interruption); all three are as before then.
    """
    survivors = parameter_map(model, plan)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    if optimizer is not None:
        check_followable(optimizer, names, survivors)
    with _all_or_nothing(model, repaired=method is not None):
        if method is not None:
            repair(model, plan, batches, method, progress=False)
        apply_plan(model, plan)
        rebuild_ddp(wrapped)
    # only references move from here on
    if optimizer is not None:
        follow(optimizer, names, dict(model.named_parameters()), survivors)


@contextmanager
def _all_or_nothing(model: nn.Module, repaired: bool) -> Iterator[None]:
    """Put every module back as it was, its tables, hooks and configs included, if the block does not end well."""
    own = ("_parameters", "_buffers", "_modules")
    modules = [
        (module, type(module), {k: dict(v) if k in own else v for k, v in module.__dict__.items()})
        for module in model.modules()
    ]
    # whoever registered a hook removes it from this very table
    hooks = [
        (table, dict(table))
        for module in model.modules()
        for name, table in module.__dict__.items()
        if name.startswith("_") and "hooks" in name and isinstance(table, dict)
    ]
    configs = [(config, type(config), dict(vars(config))) for config in _configs(model)]
    values = []
    if repaired:  # a repair writes into these
        anatomy = find_anatomy(model)
        outputs = [m for stack in anatomy.stacks for _, _, m in output_projections(anatomy.on(stack.path))]
        for module in outputs:
            values += [(tensor, tensor.detach().clone()) for tensor in module.parameters(recurse=False)]
    try:
        yield
    except BaseException:
        for module, kind, table in modules:
            module.__class__ = kind
            module.__dict__.clear()
            module.__dict__.update(table)
        for table, before in hooks:
            table.clear()
            table.update(before)
        for config, kind, settings in configs:
            config.__class__ = kind
            config.__dict__.clear()
            config.__dict__.update(settings)
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
        raise


def _configs(model: nn.Module) -> list[Any]:
    """Every config that a part of the model holds, and the configs in those, each once."""
    found: dict[int, Any] = {}
    waiting = [module.__dict__.get("config") for module in model.modules()]
    while waiting:
        config = waiting.pop()
        if hasattr(config, "to_dict") and hasattr(config, "__dict__") and id(config) not in found:
            found[id(config)] = config
            waiting += list(vars(config).values())
    return list(found.values())
