"""``prune``: one entry to every method."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_cka.anatomy import Anatomy, find_anatomy
from hf_cka.anatomy.model import unwrap
from hf_cka.data import Batch
from hf_cka.pruning.adapters import adapter_configs
from hf_cka.pruning.config import PruningConfig
from hf_cka.pruning.criteria import DEPTH, WIDTH
from hf_cka.pruning.criteria.base import check_usable
from hf_cka.pruning.depth import check_reachable, prune_depth
from hf_cka.pruning.history import PruningHistory, PruningStep, data_digest, model_digest
from hf_cka.pruning.mixture import check_mixture, prune_mixture
from hf_cka.modeling.plan import PruningPlan
from hf_cka.pruning.removable import num_parameters
from hf_cka.pruning.repair import repair
from hf_cka.pruning.state import Run, sharing_copy
from hf_cka.modeling.surgery import apply_plan
from hf_cka.pruning.width_run import check_width, prune_width
from hf_cka.representations import distributed, is_main_process

# what carries a run to its end
PRUNERS: dict[str, Callable[[Run], None]] = {"depth": prune_depth, "width": prune_width, "mixture": prune_mixture}


@dataclass(frozen=True)
class PruningResult:
    """What :func:`prune` returns.

    Args:
        model: the pruned model, ready to use, train and save.
        plan: what was removed, by original index.
        history: every step, with its scores and parameters.
    """

    model: nn.Module
    plan: PruningPlan
    history: PruningHistory


def prune(
    model: nn.Module,
    batches: Iterable[Batch],
    config: PruningConfig,
    *,
    inplace: bool = False,
    progress: bool = True,
    output: str | Path | None = None,
    on_step: Callable[[PruningStep], None] | None = None,
    tune: Callable[[nn.Module], object] | None = None,
) -> PruningResult:
    """Remove the parts of a model that matter least.

    The search works on a copy that shares the weights, so an interrupted run leaves the model as it was.

    Args:
        model: any supported model, with LoRA adapters or without; on one device, or spread by a ``device_map``.
        batches: calibration data, model-ready dicts; read once. Criteria that need none take ``[]``. In a distributed
            run each process may pass its own part, and all of them remove the same.
        config: what to prune and how.
        inplace: change the model given when all is decided, instead of returning a smaller copy.
        progress: show bars.
        output: folder for the history, written after every step. A run that was interrupted goes on from there.
        on_step: called with every finished step, the ones of an earlier run included.
        tune: trains a model in place for a moment. A mixture tunes each branch before comparing them; ``"mop"`` then
            discards the tuned copies, ``"everything"`` goes on with the one it keeps.

    Returns:
        The pruned model, the plan and the history.

    Raises:
        ValueError: for an unreachable ratio (the range is named), data a criterion cannot use, a model without
            recognisable layers, or a history of another run in ``output``; before anything is changed.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(
        ...     num_hidden_layers=3, hidden_size=8, intermediate_size=16, num_attention_heads=2, vocab_size=16
        ... )
        >>> batches = [{"input_ids": __import__("torch").randint(0, 16, (8, 6))}]
        >>> result = prune(LlamaForCausalLM(tiny), batches, PruningConfig(num_layers=1, pooling="last"))
        >>> result.model.config.num_hidden_layers, len(result.plan.removed_layers)
        (2, 1)
    """
    anatomy = find_anatomy(model)
    before = PruningHistory.load(output) if output is not None else None
    batches = _of_all_processes(list(batches))
    history = PruningHistory(
        config=config,
        model=model_digest(anatomy.model),
        calibration=data_digest(batches),
        parameters=num_parameters(anatomy.model),
    )
    if before is not None:
        before.check_same_run(history)
        history = before
    if tune is not None and config.pruner != "mixture":
        raise ValueError(f"tune is for methods that compare branches ('mop', 'everything'), not {config.method!r}.")
    if tune is not None and config.method == "everything" and (inplace or config.repair is not None):
        raise ValueError("method='everything' with tune goes on with tuned copies: use inplace=False and repair=None.")
    run = Run(
        config=config,
        model=sharing_copy(anatomy.model),
        batches=batches,
        history=history,
        plan=PruningPlan(num_layers=anatomy.num_layers, model_type=anatomy.family.name),
        output=None if output is None else Path(output),
        writes=is_main_process(),
        progress=progress,
        on_step=on_step,
        tune=tune,
    )
    # what surgery refuses (some adapters, for one), it refuses now and not after minutes of scoring
    apply_plan(sharing_copy(anatomy.model), run.plan)
    if history.steps:
        run.apply(history.steps[-1].plan)
        for step in history.steps:
            if on_step is not None:
                on_step(step)
    PRUNERS[config.pruner](run)
    return PruningResult(_finished(unwrap(model, keep_adapters=True), run, inplace), run.plan, run.history)


def start_history(model: nn.Module, batches: Iterable[Batch], config: PruningConfig) -> PruningHistory:
    """Return the empty history of a run that will go on between other things, such as training steps.

    Args:
        model: the model as it is before anything is removed.
        batches: calibration data.
        config: what to prune and how.

    Raises:
        ValueError: for a ratio that cannot be reached (the range is named), or data that the criterion cannot use.
    """
    anatomy = find_anatomy(model)
    batches = _of_all_processes(list(batches))
    history = PruningHistory(
        config=config,
        model=model_digest(anatomy.model),
        calibration=data_digest(batches),
        parameters=num_parameters(anatomy.model),
    )
    apply_plan(sharing_copy(anatomy.model), PruningPlan(anatomy.num_layers, anatomy.family.name))
    run = Run(config, sharing_copy(anatomy.model), batches, history, history_plan(history, anatomy))
    CHECKS[config.pruner](run)
    return history


def prune_further(
    model: nn.Module, batches: Iterable[Batch], history: PruningHistory, share: float, *, progress: bool = False
) -> tuple[PruningPlan, PruningHistory]:
    """Decide what goes next from a model that was pruned before, and trained since.

    Args:
        model: the model now; it is not changed.
        batches: calibration data.
        history: of what was removed so far.
        share: of the config's ratio (or number of structures) that should be gone afterwards, up to 1.
        progress: show bars.

    Returns:
        The plan for the model now, and the history with the new steps. Processes decide alike: on the data of all.

    Raises:
        ValueError: as :func:`prune`.
    """
    anatomy = find_anatomy(model)
    config = history.config
    changes: dict[str, Any] = {}
    if config.ratio is not None:
        changes["ratio"] = config.ratio * share
    else:
        assert config.num_layers is not None
        changes["num_layers"] = max(1, round(config.num_layers * share))
    if config.pruner != "mixture" and (config.steps is not None or config.pruner == "width"):
        changes["steps"] = len(history.steps) + 1  # this is one of the steps
    plan = history_plan(history, anatomy)
    partial = replace(config, **changes)
    run = Run(partial, sharing_copy(anatomy.model), _of_all_processes(list(batches)), history, plan, progress=progress)
    # a depth run refuses a ratio below its smallest structure; here that only means that nothing is due yet
    due = config.pruner != "depth" or run.removable.affordable(run.candidates(), run.need, config.reach)
    if run.need > 0 and due:
        PRUNERS[config.pruner](run)
    return run.plan.since(plan), run.history


def history_plan(history: PruningHistory, anatomy: Anatomy) -> PruningPlan:
    """Return what a history removed, by the index of the model it began with; nothing if it has no steps."""
    return history.steps[-1].plan if history.steps else PruningPlan(anatomy.num_layers, anatomy.family.name)


def _check_width(run: Run) -> None:
    check_usable(WIDTH[str(run.config.criterion)], run.context())
    check_width(run)


def _check_depth(run: Run) -> None:
    check_reachable(run, DEPTH[str(run.config.criterion)])


def _check_mixture(run: Run) -> None:
    check_mixture(run, DEPTH[str(run.config.criterion)], WIDTH[str(run.config.width_criterion)])


# what refuses, before a run, what it could not finish
CHECKS: dict[str, Callable[[Run], None]] = {"depth": _check_depth, "width": _check_width, "mixture": _check_mixture}


def _of_all_processes(batches: list[Batch]) -> list[Batch]:
    """Every process decides on the data of all; processes that were given the same data count once."""
    if not distributed():
        return batches
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, batches)
    once = {data_digest(part): part for part in everyone}
    return [batch for part in once.values() for batch in part]


def _finished(model: nn.Module, run: Run, inplace: bool) -> nn.Module:
    """The pruned model with weights of its own, or the given one pruned."""
    if run.config.repair is None and not inplace and not adapter_configs(run.model):
        return copy.deepcopy(run.model)
    target = model if inplace else copy.deepcopy(sharing_copy(model))
    if run.config.repair is not None:
        repair(target, run.plan, run.batches, run.config.repair, progress=run.progress)
    return apply_plan(target, run.plan)
