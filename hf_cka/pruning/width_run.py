"""Width pruning: score KV groups and MLP units, and remove the share that a budget over layers says."""

from __future__ import annotations

from dataclasses import replace

import torch

from hf_cka.pruning.criteria import DEPTH, WIDTH
from hf_cka.pruning.criteria.base import Structure, WidthScores, check_usable, score
from hf_cka.modeling.plan import PruningPlan
from hf_cka.pruning.state import Run
from hf_cka.pruning.width import layer_parameters, width_plan
from hf_cka.pruning.width_budgets import STRUCTURES, WidthSettings


def prune_width(run: Run) -> None:
    """Carry a run of width pruning to its end.

    Args:
        run: as far as it got; finished steps are not done again.

    Raises:
        ValueError: for an unreachable ratio (the range is named), or what the criterion raises.
    """
    assert run.config.ratio is not None
    entry, steps = WIDTH[str(run.config.criterion)], run.config.steps or 1
    check_usable(entry, run.context())
    while len(run.history.steps) < steps:
        wanted = run.config.ratio * run.history.parameters * (len(run.history.steps) + 1) / steps - run.removed
        settings = run.config.width
        if run.config.budget == "importance" and settings.layer_importance is None:
            settings = replace(settings, layer_importance=_layer_importance(run))
        scores = score(entry, run.context(), None, run.config.order)
        plan = _reaching(run, scores, wanted, settings)
        run.apply(plan)
        run.record("width", widths_in_words(run), None, {})


def check_width(run: Run) -> None:
    """Refuse a ratio that cannot be reached, before anything is scored.

    Raises:
        ValueError: naming the reachable range.
    """
    assert run.config.ratio is not None
    sizes, settings = layer_parameters(run.anatomy).sizes, run.config.width
    flat = WidthScores(
        tuple(torch.ones(n, dtype=torch.float64) for n in sizes.kv_groups),
        tuple(torch.ones(n, dtype=torch.float64) for n in sizes.units),
    )
    if run.config.budget == "importance" and settings.layer_importance is None:
        settings = replace(settings, layer_importance=(1.0,) * run.anatomy.num_layers)
    _reaching(run, flat, run.need, settings)


def widths_in_words(run: Run) -> tuple[str, ...]:
    """Return the widths of the model so far."""
    sizes = layer_parameters(run.anatomy).sizes
    words = []
    for what, values in (("KV groups", sizes.kv_groups), ("units", sizes.units)):
        there = [n for n in values if n]
        if not there:
            words.append(f"no {what} left")
        elif min(there) == max(there):
            words.append(f"{there[0]} {what} left")
        else:
            words.append(f"{min(there)}-{max(there)} {what} left")
    return tuple(words)


def _layer_importance(run: Run) -> tuple[float, ...]:
    """What the depth criterion gives each layer."""
    entry = DEPTH[run.config.layer_criterion]
    layers = [Structure("layer", i) for i in range(run.anatomy.num_layers)]
    return score(entry, run.context(), layers).importance


def _reaching(run: Run, scores: WidthScores, wanted: float, settings: WidthSettings) -> PruningPlan:
    """The plan that ends nearest to the need, or on the side of it that is asked for."""
    parameters = layer_parameters(run.anatomy)
    units = STRUCTURES[settings.structures][1]
    smallest = sum((p.unit if units else p.group) for p in parameters.layers)
    # half a structure in every layer is how far the nearest plan can be off
    for half_steps in range(2 * settings.multiple_of + 2):
        shift = {"nearest": 0, "at_least": half_steps, "at_most": -half_steps}[run.config.reach] * smallest / 2
        plan = width_plan(
            run.anatomy, scores, (wanted + shift) / parameters.total, budget=run.config.budget, settings=settings
        )
        removed = plan.price(run.anatomy).before.parameters - plan.price(run.anatomy).after.parameters
        if {"nearest": True, "at_least": removed >= wanted, "at_most": removed <= wanted}[run.config.reach]:
            break
    return plan
