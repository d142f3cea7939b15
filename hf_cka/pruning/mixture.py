"""Mixtures of depth and width: at each step a layer goes, or as many parameters of width; a path chooses."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch import nn

from hf_cka.modeling.plan import PruningPlan
from hf_cka.modeling.surgery import apply_plan
from hf_cka.pruning.criteria import DEPTH, width_criteria
from hf_cka.pruning.criteria.base import CriterionEntry, DepthScores, WidthScores, check_usable, score
from hf_cka.pruning.criteria.branches import RULES, USES
from hf_cka.pruning.depth import counted, details_of, named, notes_of, score_structures
from hf_cka.pruning.state import Run, sharing_copy
from hf_cka.pruning.width import WidthChoice, layer_parameters, sizes_plan, width_choice, width_step
from hf_cka.pruning.width_budgets import STRUCTURES, WidthSettings, WidthStep
from hf_cka.pruning.width_parameters import ModelParameters
from hf_cka.pruning.width_run import widths_in_words

WEIGHTS = "tuned_weights.pt"


@dataclass(frozen=True)
class Branch:
    """One way to go on.

    Args:
        name: ``"depth"`` or ``"width"``.
        plan: of the model so far.
        carry: what the attention owes afterwards.
        scores: of depth, for the history.
        decisive: the importance of what goes, of depth.
        words: what goes.
        notes: what was asked for and is done otherwise.
    """

    name: str
    plan: PruningPlan
    carry: Fraction
    words: tuple[str, ...] = ()
    scores: DepthScores | None = None
    decisive: float | None = None
    notes: tuple[str, ...] = ()


def follow_path(parameters: ModelParameters, path: str, settings: WidthSettings) -> list[ModelParameters]:
    """Return what a mixture weighs after every step of a string, from shapes alone.

    Args:
        parameters: of the dense model.
        path: L removes a layer, G as many parameters as a layer has from the width of all.
        settings: of width.

    Raises:
        ValueError: if a step cannot be done.

    Source: MoP, arXiv 2602.06127, and its released strings.

    Example:
        >>> from transformers import LlamaConfig
        >>> sizes = dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, vocab_size=32000)
        >>> llama2 = layer_parameters(LlamaConfig(num_hidden_layers=32, **sizes))  # LLaMA-2-7B
        >>> follow_path(llama2, "LGGLLLGGLLGLGLL", WidthSettings(rule="proportional", min_groups=2))[-1].total
        4017090560
    """
    steps, carry = [parameters], Fraction(0)
    for letter in path:
        following, carry = _weigh(steps[-1], letter, carry, settings)
        steps.append(following)
    return steps[1:]


def _weigh(
    parameters: ModelParameters, letter: str, carry: Fraction, settings: WidthSettings
) -> tuple[ModelParameters, Fraction]:
    if letter == "L":
        return parameters.without_layers((len(parameters.layers) - 1,)), carry
    step = _width_step(parameters, parameters.usual_layer, carry, settings)
    return parameters.resized(step.sizes), step.carry


def prune_mixture(run: Run) -> None:
    """Carry a run of MoP, or of Pruning Everything, to its end.

    Args:
        run: as far as it got; finished steps are not done again.

    Raises:
        ValueError: for an unreachable ratio, a string that is too short, or what the criteria raise.
    """
    depth = DEPTH[str(run.config.criterion)]
    width = width_criteria(run.config.width.structures)[str(run.config.width_criterion)]
    if run.history.steps:
        _load_weights(run)
    else:
        check_mixture(run, depth, width)
    while True:
        steps = len(run.history.steps)
        if run.config.num_layers is not None:
            if steps >= run.config.num_layers:
                return
        elif run.need <= 0:
            return
        cost = layer_parameters(run.anatomy).usual_layer
        if run.config.ratio is not None and run.config.reach != "at_least" and run.need < cost:
            _remainder(run, width)
            return
        _step(run, depth, width, cost)


def check_mixture(run: Run, depth: CriterionEntry, width: CriterionEntry) -> None:
    """Refuse what cannot be reached or scored, before anything is done.

    Raises:
        ValueError: naming the reachable range, or what is missing.
    """
    context, config = run.context(), run.config
    choice = width_choice(run.anatomy, config.width)
    parameters = choice.parameters
    assert config.path is not None
    needs_depth, needs_width = ("L" in config.path, "G" in config.path) if _is_string(config.path) else (True, True)
    if needs_depth:
        pool = run.candidates()
        if not pool:
            raise ValueError(run.removable.why_none(run.kinds, run.protected()))
        check_usable(depth, context, pool)
    if needs_width:
        if not needs_depth:
            choice.check_any()
        check_usable(width, context)
        choice.warn()
    if config.path in USES:
        check_usable(USES[config.path], context)
    if _is_string(config.path):
        _check_letters(run, choice, config.path)
    elif config.ratio is not None:
        inside = parameters.total - parameters.other
        sizes = zip(parameters.layers, parameters.sizes.kv_groups, parameters.sizes.units, strict=True)
        least = min(p.fixed + min(g, config.width.min_groups) * p.group + min(u, 1) * p.unit for p, g, u in sizes)
        largest = inside - least
        if run.need > largest:
            raise ValueError(
                f"ratio={config.ratio} cannot be reached: from 0 to {largest / parameters.total:.4f} of "
                f"{parameters.total:,} parameters can go before one layer of the smallest width is left. Choose a "
                "ratio in that range."
            )


def _check_letters(run: Run, choice: WidthChoice, path: str) -> None:
    config, carry = run.config, Fraction(0)
    parameters = weights = choice.parameters
    for done in range(len(path) + 1):
        need = weights.total - (parameters.total - run.need)
        if config.num_layers is not None:
            enough = done == config.num_layers
        else:  # what is less than a layer needs no letter, unless all steps are whole ones
            enough = need <= (0 if config.reach == "at_least" else weights.usual_layer)
        if enough:
            return
        if done < len(path):
            weights, carry = _weigh(weights, path[done], carry, choice.settings)
    raise ValueError(
        f"path={path!r} has {len(path)} letters and removes {1 - weights.total / parameters.total:.4f} of the "
        f"parameters, too few for {f'ratio={config.ratio}' if config.ratio else f'num_layers={config.num_layers}'}. "
        "Give a longer string, or a rule."
    )


def _step(run: Run, depth: CriterionEntry, width: CriterionEntry, cost: int) -> None:
    letter = _letter(run)
    branches = []
    if letter != "G":
        branches.append(_depth_branch(run, depth))
    if letter != "L":
        branches.append(_width_branch(run, width, cost))
    possible = [branch for branch in branches if isinstance(branch, Branch)]
    if not possible:
        raise ValueError(f"No step is possible after {len(run.history.steps)} steps: {'; '.join(map(str, branches))}")
    notes = [str(branch) for branch in branches if not isinstance(branch, Branch)]
    children = {branch.name: _child(run, branch) for branch in possible}
    values = {branch.name: _compare(run, children[branch.name]) for branch in possible} if letter is None else {}
    # ties go to depth, which comes first
    chosen = max(possible, key=lambda branch: values.get(branch.name, 0.0))
    model = children[chosen.name]
    if run.tune is not None and run.config.method != "everything":
        model = apply_plan(sharing_copy(run.model), chosen.plan)  # the tuned copy was for comparing only
    _record(run, chosen, model, values, notes)


def _record(run: Run, chosen: Branch, model: nn.Module, values: dict[str, float], notes: Sequence[str] = ()) -> None:
    table = named(run, chosen.scores) if chosen.scores else {}
    details = details_of(run, chosen.scores) if chosen.scores else {}
    calls = counted(run, chosen.scores) if chosen.scores else (0, 0)
    notes = [*notes, *chosen.notes, *(notes_of(run, chosen.scores) if chosen.scores else [])]
    run.adopt(model, chosen.plan)
    words = chosen.words or widths_in_words(run)
    value = values.get(chosen.name, chosen.decisive)
    _save_weights(run)
    run.record(
        chosen.name,
        words,
        value,
        table,
        values,
        layer_calls=calls,
        notes=notes,
        carry=chosen.carry,
        details=details,
    )


def _depth_branch(run: Run, entry: CriterionEntry) -> Branch | str:
    """Remove one layer; or say why that is not possible."""
    pool = run.candidates()
    if not pool:
        return f"depth: {run.removable.why_none(run.kinds, run.protected())}"
    scores = score_structures(run, entry, pool)
    weakest = scores.weakest()
    if math.isinf(scores.of(weakest)):
        return f"depth: {entry.name!r} keeps every layer that is left"
    plan = run.removable.plan([weakest])
    return Branch("depth", plan, _carry(run), run.in_words([weakest]), scores, scores.of(weakest))


def _width_branch(run: Run, entry: CriterionEntry, budget: int) -> Branch | str:
    """Remove as many parameters from the width of all layers; or say why that is not possible."""
    scores: WidthScores | None = None
    for scored in (False, True):  # what is out of reach is known before anything is scored
        if scored:
            scores = score(entry, run.context(), None, run.config.order)
        choice = width_choice(run.anatomy, run.config.width, scores)
        try:
            choice.check_any()
            step = _width_step(choice.parameters, budget, _carry(run), choice.settings)
        except ValueError as error:
            return f"width: {error}"
    assert scores is not None
    plan = sizes_plan(run.anatomy, scores, choice.whole(step.sizes), choice.settings.inner)
    return Branch("width", plan, step.carry, notes=choice.notes)


def _remainder(run: Run, entry: CriterionEntry) -> None:
    """Remove what is less than a layer from the width, so that the ratio is met."""
    choice = width_choice(run.anatomy, run.config.width)
    units = STRUCTURES[choice.settings.structures][1]
    there = choice.parameters.sizes.units if units else choice.parameters.sizes.kv_groups
    each = [p.unit if units else p.group for p, n in zip(choice.parameters.layers, there, strict=True) if n]
    smallest = sum(each) * run.config.width.multiple_of
    need = run.need - smallest / 2 if run.config.reach == "at_most" else run.need
    if need < smallest / 2:
        return
    branch = _width_branch(run, entry, round(need))
    if isinstance(branch, str):
        raise ValueError(f"{run.need:,.0f} parameters short of ratio={run.config.ratio}, {branch}")
    _record(run, branch, apply_plan(sharing_copy(run.model), branch.plan), {})


def _child(run: Run, branch: Branch) -> nn.Module:
    child = apply_plan(sharing_copy(run.model), branch.plan)
    if run.tune is not None:
        child = copy.deepcopy(child)  # training must not reach the tensors that it shares
        run.tune(child)
    return child


def _compare(run: Run, child: nn.Module) -> float:
    value = RULES[str(run.config.path)](run.context(), run.context(child))
    if value != value:
        raise ValueError(f"path={run.config.path!r} gave NaN: the pruned model's outputs are not finite.")
    return value


def _letter(run: Run) -> str | None:
    """L or G where the path says it without looking at the branches."""
    path, done = str(run.config.path), len(run.history.steps)
    if path == "random":
        return random.Random(f"{run.config.seed}-{done}").choice("LG")
    return path[done] if _is_string(path) else None


def _is_string(path: str) -> bool:
    return set(path) <= {"L", "G"}


def _carry(run: Run) -> Fraction:
    return Fraction(run.history.steps[-1].carry) if run.history.steps else Fraction(0)


def _width_step(parameters: ModelParameters, budget: int, carry: Fraction, settings: WidthSettings) -> WidthStep:
    return width_step(
        parameters,
        budget,
        structures=settings.structures,
        rule=settings.rule,
        carry=carry,
        min_groups=settings.min_groups,
        multiple_of=settings.multiple_of,
    )


def _save_weights(run: Run) -> None:
    """Tuning that is kept cannot be repeated from the plan."""
    if run.output is not None and run.writes and run.tune is not None and run.config.method == "everything":
        run.output.mkdir(parents=True, exist_ok=True)
        scratch = run.output / f"{WEIGHTS}.tmp"
        torch.save(run.model.state_dict(), scratch)
        scratch.replace(run.output / WEIGHTS)


def _load_weights(run: Run) -> None:
    if run.tune is None or run.config.method != "everything":
        return
    file = Path(run.output or "") / WEIGHTS
    if not file.is_file():
        raise ValueError(f"{file} is missing, which holds the tuned weights of the steps that were done. Start afresh.")
    run.adopt_weights(torch.load(file, weights_only=True))
