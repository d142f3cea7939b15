"""Width pruning as a run: score, choose within the budget, narrow, as often as the config says."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from hf_cka.pruning.criteria import DEPTH, width_criteria
from hf_cka.pruning.criteria.base import Structure, WidthScores, check_usable, score
from hf_cka.pruning.removable import TooLittleError
from hf_cka.pruning.state import Run
from hf_cka.pruning.width import WidthChoice, sizes_plan, width_choice
from hf_cka.pruning.width_budgets import BUDGETS, STRUCTURES, share_sizes
from hf_cka.pruning.width_parameters import WidthSizes


def prune_width(run: Run) -> None:
    """Carry a run of width pruning to its end.

    Args:
        run: as far as it got; finished steps are not done again.

    Raises:
        ValueError: for an unreachable ratio (the range is named), or what the criterion raises.
    """
    assert run.config.ratio is not None
    entry = width_criteria(run.config.width.structures)[str(run.config.criterion)]
    steps = run.config.steps or 1
    check_usable(entry, run.context())
    if not run.history.steps:
        width_choice(run.anatomy, run.config.width).check_any()
    while len(run.history.steps) < steps:
        wanted = run.config.ratio * run.history.parameters * (len(run.history.steps) + 1) / steps - run.removed
        settings = run.config.width
        if run.config.budget == "importance" and settings.layer_importance is None:
            settings = replace(settings, layer_importance=_layer_importance(run))
        scores = score(entry, run.context(), None, run.config.order)
        choice = width_choice(run.anatomy, settings, scores)
        if not run.history.steps:
            choice.check_any()
            choice.warn()
        sizes = _reaching(run, choice, scores, wanted)
        run.apply(sizes_plan(run.anatomy, scores, choice.whole(sizes), choice.settings.inner))
        run.record("width", widths_in_words(run), None, {}, notes=choice.notes)


def check_width(run: Run) -> None:
    """Refuse a ratio that cannot be reached, or that is too small to remove anything, before anything is scored.

    Raises:
        ValueError: naming the reachable range.
    """
    assert run.config.ratio is not None
    settings = run.config.width
    if run.config.budget == "importance" and settings.layer_importance is None:
        settings = replace(settings, layer_importance=(1.0,) * run.anatomy.num_layers)
    choice = width_choice(run.anatomy, settings)
    choice.check_any()
    flat = WidthScores(
        tuple(torch.ones(n, dtype=torch.float64) for n in choice.sizes.kv_groups),
        tuple(torch.ones(n, dtype=torch.float64) for n in choice.sizes.units),
    )
    if _reaching(run, choice, flat, run.need) == choice.parameters.sizes:
        refuse_nothing(run)


def refuse_nothing(run: Run) -> None:
    """Refuse a ratio so small that nothing was removed.

    Raises:
        TooLittleError: saying so.
    """
    raise TooLittleError(
        f"ratio={run.config.ratio} of {run.history.parameters:,} parameters would remove nothing: it is less than goes "
        "at once, such as a KV group or a unit of every layer. Choose a larger ratio, or reach='at_least'."
    )


def widths_in_words(run: Run) -> tuple[str, ...]:
    """Return the widths of the model so far."""
    words = []
    kinds = [("KV groups", "heads"), ("units", "units")]
    if run.config.width.inner == "experts":
        kinds = [("experts", "experts")]
    for what, kind in kinds:
        there = [w.members for layer in run.anatomy.stack.layers if (w := layer.width(kind)) is not None]
        if not there:
            words.append(f"no {what} left")
        elif min(there) == max(there):
            words.append(f"{there[0]} {what} left")
        else:
            words.append(f"{min(there)}-{max(there)} {what} left")
    return tuple(words)


def _layer_importance(run: Run) -> tuple[float, ...]:
    """What the depth criterion gives each layer; those that it cannot score (they change the shape) are as the mean."""
    entry = DEPTH[run.config.layer_criterion]
    layers = [Structure("layer", i) for i in range(run.anatomy.num_layers)]
    importance = score(entry, run.context(), layers).importance
    known = [value for value in importance if math.isfinite(value)]
    mean = math.fsum(known) / len(known) if known else math.inf
    return tuple(value if math.isfinite(value) else mean for value in importance)


def _reaching(run: Run, choice: WidthChoice, scores: WidthScores, wanted: float) -> WidthSizes:
    """The sizes that end nearest to the need, or on the side of it that is asked for."""
    parameters, settings, reach = choice.parameters, choice.settings, run.config.reach
    if wanted <= 0:
        return parameters.sizes
    if run.config.budget == "uniform" and not parameters.sizes.uniform:
        return share_sizes(parameters, wanted, settings, reach)
    units = STRUCTURES[settings.structures][1]
    there = parameters.sizes.units if units else parameters.sizes.kv_groups
    smallest = sum((p.unit if units else p.group) for p, n in zip(parameters.layers, there, strict=True) if n)
    sizes = parameters.sizes
    # half a structure in every layer is how far the nearest plan can be off
    for half_steps in range(2 * settings.multiple_of + 2):
        shift = {"nearest": 0, "at_least": half_steps, "at_most": -half_steps}[reach] * smallest / 2
        if wanted + shift <= 0:
            return parameters.sizes
        budget = round((wanted + shift) / parameters.total * parameters.total)
        sizes = BUDGETS[run.config.budget](parameters, budget, scores, settings)
        removed = parameters.total - parameters.count(sizes)
        if {"nearest": True, "at_least": removed >= wanted, "at_most": removed <= wanted}[reach]:
            break
    return sizes
