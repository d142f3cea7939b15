"""Closed-form repairs: correct what is left of a model for what a plan removes, without training.

A repair changes the dense model's weights in place, before surgery: ``repair(model, plan, batches)``, then
``apply_plan(model, plan)``. It works with any criterion, and reads the calibration data only. Output projections that
are one matrix are repaired; experts and convolutions stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_cka.anatomy import Anatomy, find_anatomy
from hf_cka.data import Batch
from hf_cka.lookup import lookup
from hf_cka.modeling.plan import PruningPlan
from hf_cka.pruning.criteria.inputs import Tokens, linear_outputs, stream_inputs
from hf_cka.pruning.criteria.weights import holder_of, stored, weight_matrix
from hf_cka.pruning.normal_equations import Fit, NormalEquations
from hf_cka.pruning.walk import Walk, is_held_out, kept_features
from hf_cka.representations import evaluating


@dataclass(frozen=True)
class Repaired:
    """One projection that was repaired.

    Args:
        layer: its layer, in the dense model.
        role: ``"o"`` or ``"down"``.
        before: mean squared error on the calibration data, weighted as the repair weighs tokens.
        after: the same with the repair.
        damping: of the fit; None where there was none to damp.
    """

    layer: int
    role: str
    before: float
    after: float
    damping: float | None = None


@dataclass(frozen=True)
class RepairReport:
    """What a repair did.

    Args:
        method: its name.
        repaired: every projection that was changed, in order.
    """

    method: str
    repaired: tuple[Repaired, ...]


def repair(
    model: Any,
    plan: PruningPlan,
    batches: Iterable[Batch],
    method: str = "least_squares",
    *,
    progress: bool = True,
    **settings: Any,
) -> RepairReport:
    """Correct a model, in place, for what a plan will remove. Call it on the dense model, before ``apply_plan``.

    Args:
        model: the dense model the plan was made for.
        plan: what will be removed.
        batches: calibration batches, model-ready dicts.
        method: ``"least_squares"``, ``"mean_shift"`` or ``"linear_map"``.
        progress: show a bar.
        settings: of the method.

    Returns:
        What was repaired, with the calibration error before and after.

    Raises:
        ValueError: for an unknown method, a plan for another model, an architecture or plan the method cannot take
            (all that stays leaves through experts or convolutions), quantized or offloaded weights, or no data. The
            weights are as before then.

    Example:
        >>> report = repair(model, plan, batches)  # doctest: +SKIP
        >>> apply_plan(model, plan)  # doctest: +SKIP
    """
    fix = lookup(REPAIRS, method, "repair")
    anatomy = find_anatomy(model)
    plan.validate(anatomy)
    parts = [(part.seen_in(anatomy), part) for part in plan.by_stack]
    parts = [(on, part) for on, part in parts if any(linear_outputs(on, layer) for layer in part.kept_layers)]
    if not parts:
        raise ValueError(
            f"Nothing that stays of {type(anatomy.model).__name__} can be repaired: whatever can be narrowed there "
            "leaves through experts or convolutions, and only single matrices are refitted."
        )
    data = batches if len(parts) == 1 else list(batches)
    done: list[Repaired] = []
    with ExitStack() as stack:
        stack.enter_context(evaluating(anatomy.model))
        for on, part in parts:
            stack.enter_context(_all_or_nothing(on, part))
        for on, part in parts:
            done += fix(on, part, data, progress=progress, **settings)
        if not done and not plan.removes_nothing:
            raise ValueError(
                f"{method!r} can repair nothing of what this plan removes ({plan}): experts and convolutions stay as "
                "they are. Leave the repair out."
            )
    return RepairReport(method, tuple(done))


def least_squares(
    anatomy: Anatomy,
    plan: PruningPlan,
    batches: Iterable[Batch],
    *,
    damping: float | None = None,
    every: bool | None = None,
    sequential: bool = True,
    progress: bool = False,
) -> list[Repaired]:
    """Refit the output projections of attention and MLP to what the dense model gives, on the units that stay.

    W += (X'X + damping * mean(diag X'X) I)^-1 X'R, where X are the kept inputs and R is what the output lacks. With
    ``sequential``, X and R are those of the model whose earlier layers are pruned and repaired, so each layer also
    corrects what the ones before, and removed layers right behind it, leave undone (see :meth:`Walk.see`). Otherwise
    X is the dense model's, and R what the removed units gave. Bias terms are refitted where there are any.

    Args:
        anatomy: of the dense model.
        plan: what will be removed.
        batches: calibration batches; a few times as many tokens as units.
        damping: of the correction, relative to the mean squared input. None chooses it for each projection on tokens
            that are held out of the fit: a fixed weak one fits the calibration text and loses half of the gain on
            other text.
        every: refit every projection that stays, not only those that lose inputs. None does so where the plan removes
            layers or sub-layers; where only widths go it changes little and doubles the time. Needs ``sequential``.
        sequential: walk through the pruned model.
        progress: show a bar.

    Raises:
        ValueError: for a damping that is not positive, or ``sequential=False`` with removed layers.

    Source: LIAR (least squares on the kept units); the pruned inputs with the dense targets are those of
    GPTAQ-style calibration; the reference to the stream and its weights are ours.

    Example:
        >>> least_squares(anatomy, plan, batches)[0].after  # doctest: +SKIP
        0.0031
    """
    _check_damping(damping)
    if not sequential:
        return list(_dense_least_squares(anatomy, plan, batches, damping, progress))
    if every is None:
        every = bool(plan.removed_layers or plan.removed_branches)
    done = []
    walk = Walk(anatomy, plan, batches)
    for layer in tqdm(plan.kept_layers, desc="least squares", unit="layer", disable=not progress, delay=2):
        walk.enter(layer)
        for role in walk.present(layer):
            kept = walk.kept(layer, role)
            if every or kept is not None:
                equations = NormalEquations(intercept=_bias(anatomy, layer, role) is not None)
                for seen in walk.see(layer, role):
                    equations.add(seen.inputs, seen.missing, seen.weight, seen.held_out)
                done.append(_refit(anatomy, layer, role, kept, equations, damping))
        walk.leave(layer)
    return done


def mean_shift(
    anatomy: Anatomy, plan: PruningPlan, batches: Iterable[Batch], *, progress: bool = False
) -> list[Repaired]:
    """Add what the removed heads and units give on average to the bias of the output projection.

    Args:
        anatomy: of the dense model.
        plan: widths to be removed.
        batches: calibration batches.
        progress: show a bar.

    Raises:
        ValueError: if the plan cuts no projection that has a bias (Llama has none).

    Source: FLAP (arXiv 2312.11983), bias compensation.

    Example:
        >>> mean_shift(anatomy, plan, batches)  # doctest: +SKIP
    """
    gone = {key: index for key, index in _removed_inputs(anatomy, plan).items() if _bias(anatomy, *key) is not None}
    if not gone:
        raise ValueError(
            f"mean_shift needs a bias in a projection that the plan cuts, and {anatomy.model_type!r} has none there. "
            "Use 'least_squares'."
        )
    matrices = {key: weight_matrix(anatomy, *key)[:, index].double().cpu() for key, index in gone.items()}
    statistics: dict[tuple[int, str], list[Any]] = {key: [0.0, 0.0, 0.0] for key in gone}

    def consume(layer: int, role: str, tokens: Tokens) -> None:
        if (layer, role) in gone:
            lost = tokens.values[:, gone[layer, role].to(tokens.values.device)].cpu()
            given = lost.double() @ matrices[layer, role].T
            total = statistics[layer, role]
            total[0] += tokens.sum(given)
            total[1] += float(tokens.sum(given.square()).sum())
            total[2] += float(tokens.weight.sum())

    stream_inputs(anatomy, batches, consume, progress=progress, description="mean shift")
    done = []
    for (layer, role), (total, squares, weight) in statistics.items():
        bias, shift = _bias(anatomy, layer, role), total / weight
        with torch.no_grad():
            bias += shift.to(bias)
        done.append(Repaired(layer, role, squares / weight, squares / weight - float(shift.square().sum())))
    return done


def linear_map(
    anatomy: Anatomy,
    plan: PruningPlan,
    batches: Iterable[Batch],
    *,
    damping: float | None = None,
    progress: bool = False,
) -> list[Repaired]:
    """Replace each run of removed layers by one linear map, folded into the down projection in front of it.

    W <- (I + T)' W with T = (M'M + damping * mean(diag M'M) I)^-1 M'R, where M is the output of that projection and R
    what the stream lacks behind the run. The damping shrinks towards no repair.

    Args:
        anatomy: of the dense model.
        plan: with removed layers.
        batches: calibration batches.
        damping: of the map; None chooses it on tokens that are held out of the fit.
        progress: show a bar.

    Raises:
        ValueError: for a damping that is not positive, if no run has a layer with an MLP in front of it, or the MLP's
            output is not simply added to the residual stream.

    Source: ReplaceMe (arXiv 2505.02819), least-squares form.

    Example:
        >>> linear_map(anatomy, plan, batches)[0].layer  # doctest: +SKIP
        17
    """
    _check_damping(damping)
    walk = Walk(anatomy, plan, batches)
    if walk.gain["down"] is None:
        raise ValueError(
            f"linear_map folds a map into the MLP's output, and {anatomy.model_type!r} normalises that before it is "
            "added to the residual stream. Use 'least_squares'."
        )
    front = [i for i in plan.kept_layers if walk.runs_ahead(i) and "down" in walk.present(i)]
    if not front:
        raise ValueError(
            f"linear_map needs a run of removed layers behind a layer with an MLP; removed: {plan.removed_layers}."
        )
    done = []
    for layer in tqdm(plan.kept_layers, desc="linear map", unit="layer", disable=not progress, delay=2):
        walk.enter(layer)
        if layer in front:
            equations = NormalEquations(intercept=False)
            for seen in walk.see(layer, "down"):
                equations.add(seen.output, seen.missing, seen.weight, seen.held_out)
            fit = equations.solve(damping)
            correction = fit.correction
            weight = _columns(anatomy, layer, "down")
            bias = _bias(anatomy, layer, "down")
            with torch.no_grad():
                given = weight_matrix(anatomy, layer, "down").double()
                weight += (correction.T.to(weight.device) @ given).to(weight)
                if bias is not None:
                    bias += (bias.double() @ correction.to(bias.device)).to(bias)
            done.append(_repaired(layer, "down", fit))
        walk.leave(layer)
    return done


def _dense_least_squares(
    anatomy: Anatomy, plan: PruningPlan, batches: Iterable[Batch], damping: float | None, progress: bool
) -> Iterator[Repaired]:
    """All projections at once, on the dense model's activations: one pass, but all Gram matrices in memory."""
    if plan.removed_layers:
        raise ValueError("sequential=False cannot repair removed layers; use sequential=True, or 'linear_map'.")
    gone = _removed_inputs(anatomy, plan)
    kept = {key: kept_features(anatomy, plan, *key) for key in gone}
    equations = {key: NormalEquations(intercept=_bias(anatomy, *key) is not None) for key in gone}
    rows = dict.fromkeys(gone, 0)  # seen so far

    def consume(layer: int, role: str, tokens: Tokens) -> None:
        key, device = (layer, role), tokens.values.device
        if key in gone:
            lost = weight_matrix(anatomy, *key)[:, gone[key].to(device)].to(tokens.values)
            given = tokens.values[:, gone[key].to(device)] @ lost.T
            stays = kept[key]
            assert stays is not None
            held_out = is_held_out(rows[key] + tokens.prompt)
            equations[key].add(tokens.values[:, stays.to(device)], given, tokens.weight.to(device), held_out)
            rows[key] += tokens.num_prompts

    stream_inputs(anatomy, batches, consume, progress=progress, description="least squares")
    for key in gone:
        yield _refit(anatomy, *key, kept[key], equations[key], damping)


def _refit(
    anatomy: Anatomy,
    layer: int,
    role: str,
    kept: torch.Tensor | None,
    equations: NormalEquations,
    damping: float | None,
) -> Repaired:
    fit = equations.solve(damping)
    weight, bias = _columns(anatomy, layer, role), _bias(anatomy, layer, role)
    with torch.no_grad():
        change = fit.correction.T.to(weight)
        if kept is None:
            weight += change
        else:
            weight.index_add_(1, kept.to(weight.device), change)
        if bias is not None and fit.shift is not None:
            bias += fit.shift.to(bias)
    return _repaired(layer, role, fit)


def _repaired(layer: int, role: str, fit: Fit) -> Repaired:
    return Repaired(layer, role, fit.before, fit.after, fit.damping)


def _check_damping(damping: float | None) -> None:
    if damping is not None and not damping > 0:
        raise ValueError(f"damping must be positive, got {damping}: kept units can be collinear.")


def _removed_inputs(anatomy: Anatomy, plan: PruningPlan) -> dict[tuple[int, str], torch.Tensor]:
    """(layer, role) -> input features of an output projection that the plan cuts."""
    found = {}
    for layer in plan.kept_layers:
        for role in linear_outputs(anatomy, layer):
            kept = kept_features(anatomy, plan, layer, role)
            if kept is not None:
                stay = torch.zeros(_columns(anatomy, layer, role).shape[1], dtype=torch.bool)
                stay[kept] = True
                found[layer, role] = (~stay).nonzero().flatten()
    return dict(sorted(found.items()))


def _module(anatomy: Anatomy, layer: int, role: str) -> nn.Module:
    return holder_of(anatomy.layer(layer), anatomy.outputs(layer)[role].output.parameter)


def _columns(anatomy: Anatomy, layer: int, role: str) -> torch.Tensor:
    """The weight itself as (out_features, in_features), to be changed in place."""
    weight: Any = _module(anatomy, layer, role).weight
    return weight.detach().T if anatomy.outputs(layer)[role].output.axis == 0 else weight.detach()


def _bias(anatomy: Anatomy, layer: int, role: str) -> torch.Tensor | None:
    bias: Any = getattr(_module(anatomy, layer, role), "bias", None)
    return None if bias is None else bias.detach()


@contextmanager
def _all_or_nothing(anatomy: Anatomy, plan: PruningPlan) -> Iterator[None]:
    """Check that the weights can be changed; put them back if the repair does not end well, Ctrl-C included."""
    before = []
    for layer in plan.kept_layers:
        for role, width in linear_outputs(anatomy, layer).items():
            if stored(anatomy.layer(layer), width.output.parameter) is None:
                module = _module(anatomy, layer, role)
                raise ValueError(
                    f"The {role!r} projection of layer {layer} ({type(module).__name__}) has no plain weight in memory "
                    "to repair. Load the model unquantized and without offloading."
                )
            weight: Any = _module(anatomy, layer, role).weight
            before += [
                (tensor, tensor.clone())
                for tensor in (weight.detach(), _bias(anatomy, layer, role))
                if tensor is not None
            ]
    try:
        yield
    except BaseException:
        for tensor, saved in before:
            tensor.copy_(saved)
        raise


Repair = Callable[..., Iterable[Repaired]]

#: name -> repair
REPAIRS: Mapping[str, Repair] = MappingProxyType(
    {"least_squares": least_squares, "mean_shift": mean_shift, "linear_map": linear_map}
)
