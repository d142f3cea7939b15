"""A width criterion that knows the repair: what removing a group costs once the rest has been refitted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from hf_cka.anatomy import Anatomy
from hf_cka.data import Batch, batch_rows
from hf_cka.pruning.criteria.base import ScoringContext, WidthScores
from hf_cka.pruning.criteria.inputs import linear_outputs, tapped
from hf_cka.pruning.criteria.outputs import probabilities
from hf_cka.pruning.criteria.weights import weight_matrix
from hf_cka.pruning.criteria.width_output import group_counts, prompt_mean, width_scores
from hf_cka.representations import check_runnable, evaluating, token_mask

# Of the Gram matrix, relative to its mean diagonal: keeps it invertible, and collinear units apart.
_DAMPING = 0.01
# Part of a layer's units whose removal is tried, to learn what an error there does to the output.
_PROBED = 0.4
# Calibration tokens for that: one forward pass a layer.
_PROBE_TOKENS = 2048
# Part of the groups that is eliminated between two updates of the inverse; small layers go one by one.
_AT_ONCE = 1 / 32


def score_obs(context: ScoringContext) -> WidthScores:
    """Score a group by the rise of the output's KL divergence when it goes and the rest is refitted to its absence.

    In each projection, groups are eliminated one after the other, always the one whose loss costs least under the
    least-squares refit of all that are left: tr(B_g' P_g^-1 B_g), where B are the refitted weights and P the inverse
    Gram matrix of the inputs (optimal brain surgeon). A group scores what its elimination added. Errors are relative
    to the residual stream, and a layer's are turned into KL by trying: the cheapest 40 % of its units are replaced by
    what the others predict of them, and the change of the output is measured. So scores compare between layers, and
    the budget ``"global"`` can spend them; a KV group counts per parameter as a unit does. Only projections that are
    one matrix can be refitted: the units of experts and of convolutions are not scored.

    Args:
        context: the model and the data.

    Raises:
        ValueError: for no data, NaN or infinite activations, meta weights, a model without logits, one that does
            something between its layers, or one of which all projections are experts or convolutions.

    Source: optimal brain surgeon (Hassibi and Stork 1993) on whole columns, as in ZipLM (arXiv 2302.04089); measuring
    each layer's sensitivity under the refit is ours.

    Example:
        >>> score_obs(context).units[0].shape  # doctest: +SKIP
        torch.Size([1536])
    """
    anatomy = context.anatomy
    check_runnable(anatomy.model)
    if not any(linear_outputs(anatomy, layer) for layer in range(anatomy.num_layers)):
        raise ValueError(
            "'obs' refits projections that are one matrix, and all that can be narrowed in "
            f"{type(anatomy.model).__name__} are experts or convolutions. Use 'wanda' or 'amp'."
        )
    counts = group_counts(anatomy)
    costs: dict[tuple[int, str], torch.Tensor] = {}
    probes: dict[int, Probe] = {}
    with evaluating(anatomy.model):
        for key, gram in _gram_matrices(context):
            weights = weight_matrix(anatomy, *key).double().cpu().T
            size = len(gram) // counts[key]
            order, cost = eliminate(gram, weights, size)
            costs[key] = cost
            if key[1] == "down":
                probes[key[0]] = _probe(gram, order, cost)
        rise = _measure(context, probes)
    for (layer, role), cost in costs.items():
        # a layer without an MLP has no probe: its attention counts as that of the nearest layer with one
        nearest = min(rise, key=lambda i: (abs(i - layer), i)) if rise else layer
        scale = rise.get(nearest, 1.0)
        costs[layer, role] = cost * scale / (_price(anatomy, layer) if role == "o" else 1.0)
    return width_scores(anatomy, costs)


def eliminate(gram: torch.Tensor, weights: torch.Tensor, size: int = 1) -> tuple[list[int], torch.Tensor]:
    """Eliminate groups of input features from a linear map, the cheapest under refit first.

    Args:
        gram: ``(k, k)``, of the inputs.
        weights: ``(k, d)``.
        size: features in a group; neighbours.

    Returns:
        The groups in the order of elimination, and per group what its elimination added to the squared error,
        ``(k / size,)``; it never falls along the order, and the last group, which stays, has the most.

    Example:
        >>> x = torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 0, 3]]).double()
        >>> order, cost = eliminate(x.T @ x, torch.ones(3, 2).double())
        >>> order, [round(c) for c in cost.tolist()]
        ([0, 1, 2], [2, 8, 18])
    """
    k, groups = len(gram), len(gram) // size
    scale = gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram + _DAMPING * scale * torch.eye(k).to(gram)))
    weights, cost = weights.clone(), torch.zeros(groups, dtype=torch.float64)
    alive = torch.ones(groups, dtype=torch.bool)
    order: list[int] = []
    highest, at_once = 0.0, max(1, int(_AT_ONCE * groups))
    while len(order) < groups:
        single = _costs_alone(inverse, weights, size).masked_fill(~alive, math.inf)
        chosen = single.topk(min(at_once, groups - len(order)), largest=False).indices
        features = (chosen.unsqueeze(1) * size + torch.arange(size)).flatten()
        block = torch.linalg.inv(inverse[features][:, features])
        together = float((weights[features] * (block @ weights[features])).sum())
        # what the block costs is shared in the proportion of what each would cost alone
        alone = single[chosen]
        share = together * alone / alone.sum() if alone.sum() > 0 else torch.zeros_like(alone)
        for group, value in zip(chosen.tolist(), share.tolist(), strict=True):
            highest = max(highest, value)
            cost[group] = highest
            order.append(group)
        gain = inverse[:, features] @ block
        weights = weights - gain @ weights[features]
        inverse = inverse - gain @ inverse[features]
        inverse[features], inverse[:, features] = 0, 0
        inverse[features, features], weights[features] = 1, 0
        alive[chosen] = False
    return order, cost


@dataclass(frozen=True)
class Probe:
    """A trial removal in one layer's MLP.

    Args:
        gone: units that go.
        stay: the others.
        prediction: ``(stay, gone)``: what the others say about them.
        cost: of the removal, as the criterion counts it.
    """

    gone: torch.Tensor
    stay: torch.Tensor
    prediction: torch.Tensor
    cost: float


def _gram_matrices(context: ScoringContext) -> Iterator[tuple[tuple[int, str], torch.Tensor]]:
    """((layer, role), Gram matrix of what enters the projection), layer by layer: few are in memory at once."""
    from hf_cka.modeling.plan import PruningPlan
    from hf_cka.pruning.walk import Walk  # a repair's tool, which itself looks at criteria

    anatomy = context.anatomy
    walk = Walk(anatomy, PruningPlan(anatomy.num_layers, anatomy.model_type), context.batches)
    for layer in tqdm(range(anatomy.num_layers), desc="obs", unit="layer", disable=not context.progress, delay=2):
        grams: dict[str, torch.Tensor | float] = {}
        for seen in walk.visit(layer):
            for role, (inputs, weight) in seen.items():
                if not inputs.isfinite().all():
                    raise ValueError(
                        f"The input of {role!r} in layer {layer} holds NaN or infinite values. Load the model in "
                        "bfloat16 or float32 instead of float16, or leave such samples out."
                    )
                weighted = inputs * weight.sqrt().unsqueeze(1).to(inputs)
                grams[role] = grams.get(role, 0.0) + (weighted.T @ weighted).double().cpu()
        for role, gram in grams.items():
            yield (layer, role), torch.as_tensor(gram)


def _probe(gram: torch.Tensor, order: list[int], cost: torch.Tensor) -> Probe:
    gone = torch.tensor(sorted(order[: max(1, int(_PROBED * len(order)))]))
    stays = torch.ones(len(gram), dtype=torch.bool)
    stays[gone] = False
    stay = stays.nonzero().flatten()
    inner = gram[stay][:, stay]
    inner = inner + _DAMPING * gram.diagonal().mean() * torch.eye(len(stay)).to(gram)
    prediction = torch.cholesky_solve(gram[stay][:, gone], torch.linalg.cholesky(inner))
    return Probe(gone, stay, prediction.float(), float(cost[gone].sum()))


def _measure(context: ScoringContext, probes: Mapping[int, Probe]) -> dict[int, float]:
    """Per layer, the KL divergence that one unit of its error causes."""
    anatomy, trial = context.anatomy, -1
    totals, prompts = dict.fromkeys(probes, 0.0), 0

    def tap(layer: int, role: str, hidden: torch.Tensor) -> torch.Tensor | None:
        if (layer, role) != (trial, "down"):
            return None
        probe, changed = probes[layer], hidden.clone()
        predicted = hidden[..., probe.stay.to(hidden.device)] @ probe.prediction.to(hidden)
        changed[..., probe.gone.to(hidden.device)] = predicted
        return changed

    with tapped(anatomy, tap), torch.no_grad():
        for index, batch in enumerate(_some(context.batches)):
            token_mask(batch, index)  # refuses what is no batch
            prompts += batch_rows(batch)
            trial = -1
            intact, mask = probabilities(anatomy, batch)
            for trial in tqdm(probes, desc="probing", unit="layer", disable=not context.progress, delay=2):
                changed, _ = probabilities(anatomy, batch)
                # row by row: a whole batch of such products would double the memory
                divergence = torch.stack(
                    [(p.exp() * (p - q)).sum(dim=-1) for p, q in zip(intact, changed, strict=True)]
                )
                totals[trial] += float(prompt_mean(divergence, mask).sum())
    tiny = torch.finfo(torch.float32).eps  # a divergence below it is rounding: such a layer is cheap, not free
    return {
        layer: max(total / prompts, tiny) / probes[layer].cost
        for layer, total in totals.items()
        if probes[layer].cost > 0
    }


def _some(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Batches from the start, until they hold enough tokens."""
    tokens = 0
    for index, batch in enumerate(batches):
        yield batch
        tokens += int(token_mask(batch, index).sum())
        if tokens >= _PROBE_TOKENS:
            return


def _price(anatomy: Anatomy, layer: int) -> float:
    """Parameters of a KV group over those of a unit, in one layer."""
    from hf_cka.pruning.width_parameters import layer_parameters

    part = layer_parameters(anatomy).layers[layer]
    return part.group / part.unit if part.unit else 1.0


def _costs_alone(inverse: torch.Tensor, weights: torch.Tensor, size: int) -> torch.Tensor:
    if size == 1:
        return weights.square().sum(dim=1) / inverse.diagonal()
    parts = weights.unflatten(0, (-1, size))
    blocks = torch.stack([inverse[i : i + size, i : i + size] for i in range(0, len(inverse), size)])
    return (parts * torch.linalg.solve(blocks, parts)).sum(dim=(1, 2))
