"""What pruning needs from a run of several processes: one decision, and wrappers that know the new parameters."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch.nn.parallel import DistributedDataParallel

from hf_cka.representations import distributed

T = TypeVar("T")


def first_decides(decision: T) -> T:
    """Return the first process's decision in all of them; rounding may differ between machines.

    Args:
        decision: something that can be pickled.

    Example:
        >>> first_decides("layer 3")
        'layer 3'
    """
    if not distributed():
        return decision
    box = [decision]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def rebuild_ddp(wrapped: Any) -> None:
    """Let a `DistributedDataParallel` see the parameters its module has now; anything else is left alone.

    It is initialised anew in place, because the training loop holds on to the object. Without that, its reducer waits
    for gradients of parameters that are gone. If it fails, the object is as it was, reducer included.

    Args:
        wrapped: the model as the Trainer runs it.

    Example:
        >>> rebuild_ddp(torch.nn.Linear(1, 1))
    """
    if not isinstance(wrapped, DistributedDataParallel):
        return
    ddp: Any = wrapped
    settings = {
        name: getattr(ddp, name)
        for name in (
            "device_ids",
            "output_device",
            "dim",
            "find_unused_parameters",
            "gradient_as_bucket_view",
            "process_group",
        )
    }
    if not ddp.broadcast_buffers:  # named only where it says something: newer versions of torch deprecate it
        settings["broadcast_buffers"] = False
    hooks = list(ddp._comm_hooks)  # such as a compression of gradients
    before = dict(ddp.__dict__)
    try:
        ddp.__init__(ddp.module, bucket_cap_mb=ddp.bucket_bytes_cap / 2**20, **settings)
        for hook, state in hooks:
            ddp.register_comm_hook(state, hook)
    except BaseException:
        ddp.__dict__.clear()
        ddp.__dict__.update(before)
        raise
