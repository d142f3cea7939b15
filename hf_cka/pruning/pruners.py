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
from hf_cka.modeling.carried import adapter_configs
from hf_cka.modeling.counting import num_parameters
from hf_cka.modeling.plan import PruningPlan
from hf_cka.modeling.surgery import apply_plan
from hf_cka.pruning.config import STRUCTURES, PruningConfig
from hf_cka.pruning.criteria import DEPTH, width_criteria
from hf_cka.pruning.criteria.base import check_usable
from hf_cka.pruning.depth import check_reachable, prune_depth
from hf_cka.pruning.history import PruningHistory, PruningStep, data_digest, model_digest
from hf_cka.pruning.mixture import check_mixture, prune_mixture
from hf_cka.pruning.removable import Removable, TooLittleError, plan_for
from hf_cka.pruning.repair import repair
from hf_cka.pruning.state import Run, protected_layers, sharing_copy
from hf_cka.pruning.width import width_choice
from hf_cka.pruning.width_budgets import STRUCTURES as WIDTHS
from hf_cka.pruning.width_run import check_width, prune_width, refuse_nothing
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
            recognisable layers or the stack asked for, or a history of another run in ``output``; before anything is
            changed.

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
    history = _empty_history(anatomy, batches, config)
    if before is not None:
        before.check_same_run(history)
    stacks = stacks_of(anatomy, config)
    if len(stacks) > 1:
        if tune is not None:
            raise ValueError(f"tune is for one stack at a time, not {len(stacks)}: {', '.join(stacks)}.")
        could = could_go(anatomy, stacks, config)
        return _prune_several(model, batches, history, could, inplace, progress, output, on_step)
    anatomy = anatomy.on(stacks[0])
    history = before or history
    if tune is not None and config.pruner != "mixture":
        raise ValueError(f"tune is for methods that compare branches ('mop', 'everything'), not {config.method!r}.")
    if tune is not None and config.method == "everything" and (inplace or config.repair is not None):
        raise ValueError("method='everything' with tune goes on with tuned copies: use inplace=False and repair=None.")
    run = Run(
        config=config,
        model=sharing_copy(anatomy.model),
        batches=batches,
        history=history,
        plan=plan_for(anatomy),
        output=None if output is None else Path(output),
        writes=is_main_process(),
        progress=progress,
        on_step=on_step,
        tune=tune,
        stack=anatomy.stack.path,
    )
    # what surgery refuses (some adapters, for one), it refuses now and not after minutes of scoring
    apply_plan(sharing_copy(anatomy.model), run.plan)
    if history.steps:
        run.apply(history.steps[-1].plan)
        for step in history.steps:
            if on_step is not None:
                on_step(step)
    if config.pruner == "width" and (config.steps or 1) == 1 and not history.steps:
        _check_width(run)
    PRUNERS[config.pruner](run)
    if config.pruner == "width" and run.removed == 0:
        refuse_nothing(run)
    small = _finished(unwrap(model, keep_adapters=True), run.model, run.plan, config, batches, inplace, progress)
    return PruningResult(small, run.plan, run.history)


def _empty_history(anatomy: Anatomy, batches: list[Batch], config: PruningConfig) -> PruningHistory:
    return PruningHistory(
        config=config,
        model=model_digest(anatomy.model),
        calibration=data_digest(batches),
        parameters=num_parameters(anatomy.model),
    )


def stacks_of(anatomy: Anatomy, config: PruningConfig) -> tuple[str, ...]:
    """Return the paths of the stacks that a config is about.

    Args:
        anatomy: of the model.
        config: with the names, or parts of them.

    Raises:
        ValueError: for a stack that is not there, or named twice.
    """
    if config.stack is None:
        return (anatomy.stack.path,)
    named = (config.stack,) if isinstance(config.stack, str) else config.stack
    found = anatomy.stacks if named == ("all",) else [anatomy.on(name).stack for name in named]
    paths = tuple(stack.path for stack in found)
    if not paths or len(set(paths)) != len(paths):
        raise ValueError(f"stack={config.stack!r} must name at least one stack, and each once; it names {list(paths)}.")
    return paths


def could_go(anatomy: Anatomy, stacks: Iterable[str], config: PruningConfig) -> dict[str, int]:
    """Return how many parameters each stack could lose, the one with fewest first; without those that can lose none.

    Args:
        anatomy: of the model.
        stacks: paths.
        config: what may go.

    Raises:
        ValueError: if nothing can go from any of them.
    """
    could, reasons = {}, []
    for path in stacks:
        most, reason = _most(anatomy.on(path), config)
        if most:
            could[path] = most
        else:
            reasons.append(f"{path}: {reason}")
    if not could:
        raise ValueError("No stack can lose anything. " + " ".join(reasons))
    return dict(sorted(could.items(), key=lambda item: item[1]))


def _most(anatomy: Anatomy, config: PruningConfig) -> tuple[int, str]:
    """Parameters that a stack could lose, and why there are none."""
    if config.pruner != "width":
        removable, kinds = Removable(anatomy), STRUCTURES[config.structures]
        protected = protected_layers(anatomy, config, anatomy.num_layers)
        pool = removable.candidates(kinds, protected)
        return (removable.parameters(removable.most(pool)), "") if pool else (0, removable.why_none(kinds, protected))
    choice = width_choice(anatomy, config.width)
    try:
        choice.check_any()
    except ValueError as error:
        return 0, str(error)
    take_groups, take_units = WIDTHS[choice.settings.structures]
    sizes = choice.parameters.sizes
    most = sum(
        part.group * max(0, groups - config.width.min_groups) * take_groups
        + part.unit * max(0, units - part.least) * take_units
        for part, groups, units in zip(choice.parameters.layers, sizes.kv_groups, sizes.units, strict=True)
    )
    return most, ""


def _prune_several(
    model: nn.Module,
    batches: list[Batch],
    history: PruningHistory,
    could: dict[str, int],
    inplace: bool,
    progress: bool,
    output: str | Path | None,
    on_step: Callable[[PruningStep], None] | None,
) -> PruningResult:
    """One stack after the other, each by its share and what the ones before left; the history tells of all of them."""
    config, plan, due = history.config, None, 0
    small = sharing_copy(find_anatomy(model).model)

    def add(step: PruningStep) -> None:
        nonlocal history
        whole = step.plan if plan is None else plan.then(step.plan)
        ratio = 1 - step.parameters / history.parameters
        history = history.with_step(replace(step, step=len(history.steps) + 1, plan=whole, ratio=ratio))
        if output is not None and is_main_process():
            history.save(output)
        if on_step is not None:
            on_step(history.steps[-1])

    for path, most in could.items():
        due += most
        share, left = due / sum(could.values()), num_parameters(small)
        changes: dict[str, Any] = {"stack": path, "repair": None}
        if config.ratio is not None:
            need = min(most, config.ratio * history.parameters * share - (history.parameters - left))
            changes["ratio"] = need / left
        else:
            assert config.num_layers is not None
            need = round(config.num_layers * share) - sum(len(step.removed) for step in history.steps)
            changes["num_layers"] = need
        if need <= 0:
            continue
        folder = None if output is None else Path(output) / path
        try:
            part = prune(small, batches, replace(config, **changes), progress=progress, output=folder, on_step=add)
        except TooLittleError:
            continue  # the next stack takes it
        small, plan = part.model, part.plan if plan is None else plan.then(part.plan)
    if plan is None:
        raise TooLittleError(f"ratio={config.ratio} is less than the smallest thing that any of the stacks can lose.")
    small = _finished(unwrap(model, keep_adapters=True), small, plan, config, batches, inplace, progress)
    return PruningResult(small, plan, history)


def start_history(model: nn.Module, batches: Iterable[Batch], config: PruningConfig) -> PruningHistory:
    """Return the empty history of a run that will go on between other things, such as training steps.

    Args:
        model: the model as it is before anything is removed.
        batches: calibration data.
        config: what to prune and how.

    Raises:
        ValueError: for a ratio that cannot be reached (the range is named), data that the criterion cannot use, or
            several stacks.
    """
    anatomy = _only_stack(find_anatomy(model), config)
    batches = _of_all_processes(list(batches))
    history = _empty_history(anatomy, batches, config)
    apply_plan(sharing_copy(anatomy.model), plan_for(anatomy))
    plan = history_plan(history, anatomy)
    run = Run(config, sharing_copy(anatomy.model), batches, history, plan, stack=anatomy.stack.path)
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
    config = history.config
    anatomy = _only_stack(find_anatomy(model), config)
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
    batches = _of_all_processes(list(batches))
    twin = sharing_copy(anatomy.model)
    run = Run(partial, twin, batches, history, plan, progress=progress, stack=anatomy.stack.path)
    # a depth run refuses a ratio below its smallest structure; here that only means that nothing is due yet
    due = config.pruner != "depth" or run.removable.affordable(run.candidates(), run.need, config.reach)
    if run.need > 0 and due:
        PRUNERS[config.pruner](run)
    return run.plan.since(plan), run.history


def history_plan(history: PruningHistory, anatomy: Anatomy) -> PruningPlan:
    """Return what a history removed, by the index of the model it began with; nothing if it has no steps."""
    return history.steps[-1].plan if history.steps else plan_for(anatomy)


def _only_stack(anatomy: Anatomy, config: PruningConfig) -> Anatomy:
    stacks = stacks_of(anatomy, config)
    if len(stacks) > 1:
        raise ValueError(
            f"stack={config.stack!r} names {len(stacks)} stacks; a model that trains is pruned in one of them. Name it."
        )
    return anatomy.on(stacks[0])


def _check_width(run: Run) -> None:
    check_usable(width_criteria(run.config.width.structures)[str(run.config.criterion)], run.context())
    check_width(run)


def _check_depth(run: Run) -> None:
    check_reachable(run, DEPTH[str(run.config.criterion)])


def _check_mixture(run: Run) -> None:
    width = width_criteria(run.config.width.structures)[str(run.config.width_criterion)]
    check_mixture(run, DEPTH[str(run.config.criterion)], width)


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


def _finished(
    model: nn.Module,
    small: nn.Module,
    plan: PruningPlan,
    config: PruningConfig,
    batches: list[Batch],
    inplace: bool,
    progress: bool,
) -> nn.Module:
    """The pruned model with weights of its own, or the given one pruned."""
    if config.repair is None and not inplace and not adapter_configs(small):
        return copy.deepcopy(small)
    target = model if inplace else copy.deepcopy(sharing_copy(model))
    if config.repair is not None:
        repair(target, plan, batches, config.repair, progress=progress)
    return apply_plan(target, plan)
