"""Width criteria: what each KV group and each MLP unit is worth.

What is said of heads and KV groups holds for whatever a mixer of tokens has many of, and what is said of MLP units for
those of experts and convolutions; tokens are the patches of a picture and the frames of sound as well.

All but ``magnitude`` and ``random`` look at what flows into the output projections. A KV group is scored as a whole,
because grouped attention can only lose whole groups. The criteria that need more than a plain forward pass are in
``width_output.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from hf_cka.anatomy import Anatomy
from hf_cka.pruning.criteria import loraprune
from hf_cka.pruning.criteria.base import CriterionEntry, ScoringContext, WidthScores
from hf_cka.pruning.criteria.groups import group_sums
from hf_cka.pruning.criteria.inputs import Tokens, stream_inputs
from hf_cka.pruning.criteria.weights import values_of, weight_matrix
from hf_cka.pruning.criteria.width_output import score_kl, score_taylor
from hf_cka.pruning.criteria.width_refit import score_obs

# (layer, role) -> one value per feature, head or group
Statistics = dict[tuple[int, str], torch.Tensor]


def score_amp(context: ScoringContext) -> WidthScores:
    """Score a head by what it adds to the residual stream, and a unit by its mean absolute activation.

    A query head counts the mean over tokens of the L1 norm of its output times its slice of the output projection, in
    float32; a KV group the mean of its query heads. A unit counts the mean of |input of the down projection|. Prompts
    weigh equally; padding is left out.

    Args:
        context: the model and the data.

    Raises:
        ValueError: as :func:`~hf_cka.pruning.criteria.inputs.stream_inputs`.

    Source: AMP (arXiv 2504.21174), equations for heads and MLP units.

    Example:
        >>> score_amp(context).units[0].shape  # doctest: +SKIP
        torch.Size([1536])
    """
    anatomy = context.anatomy
    matrices = {i: _head_matrices(anatomy, i) for i in range(anatomy.num_layers) if "o" in anatomy.outputs(i)}

    def statistic(layer: int, role: str, tokens: Tokens) -> torch.Tensor:
        if role == "down":
            return tokens.sum(tokens.values.abs())
        matrix = matrices[layer]
        heads = tokens.values.unflatten(1, (matrix.shape[1], -1))
        if heads.shape[2] == 1:  # channels: the norm of a multiple of one column
            return tokens.sum(tokens.values.abs() * matrix[:, :, 0].abs().sum(dim=0).to(heads))
        # one head at a time: all at once would hold heads times the residual stream
        added = [(heads[:, n] @ matrix[:, n].T.to(heads)).abs().sum(dim=1) for n in range(heads.shape[1])]
        return tokens.sum(torch.stack(added, dim=1))

    return _scores(anatomy, _mean(context, statistic))


def score_activation_norm(context: ScoringContext) -> WidthScores:
    """Score by the size of the activation: mean over tokens, then root mean square over prompts.

    A head's activation is the L2 norm of its output; a unit's the absolute input of the down projection.

    Args:
        context: the model and the data.

    Raises:
        ValueError: as :func:`~hf_cka.pruning.criteria.inputs.stream_inputs`.

    Source: Minitron (arXiv 2407.14679), aggregation "mean" over the sequence and "L2" over the batch; the sum over
    the batch is a mean here, so that scores do not grow with the data.

    Example:
        >>> score_activation_norm(context).kv_groups[0].shape  # doctest: +SKIP
        torch.Size([3])
    """
    anatomy = context.anatomy

    def statistic(layer: int, role: str, tokens: Tokens) -> torch.Tensor:
        size = tokens.values.abs()
        if role == "o":
            size = tokens.values.unflatten(1, (anatomy.sizes(layer).num_heads, -1)).norm(dim=2)
        return tokens.prompt_means(size).square().sum(dim=0)

    means = _mean(context, statistic)
    return _scores(anatomy, {key: value.sqrt() for key, value in means.items()})


def score_wanda(context: ScoringContext) -> WidthScores:
    """Score a feature by the size of its output weights times the size of its activation: sum_i |W_ij| ||X_j||_2.

    A KV group counts the mean over the features of its heads.

    Args:
        context: the model and the data.

    Raises:
        ValueError: as :func:`~hf_cka.pruning.criteria.inputs.stream_inputs`.

    Source: Wanda (arXiv 2306.11695) with scores summed over the outputs; the norm is a root mean square over tokens.

    Example:
        >>> score_wanda(context).units[0].min()  # doctest: +SKIP
        tensor(0.0312, dtype=torch.float64)
    """
    squares = _mean(context, lambda layer, role, tokens: tokens.sum(tokens.values.square()))
    sums = {key: weight_matrix(context.anatomy, *key).abs().sum(dim=0).double().cpu() for key in squares}
    return _scores(context.anatomy, {key: value.sqrt() * sums[key] for key, value in squares.items()})


def score_variance(context: ScoringContext) -> WidthScores:
    """Score a feature by the variance of its activation over tokens.

    Args:
        context: the model and the data.

    Raises:
        ValueError: as :func:`~hf_cka.pruning.criteria.inputs.stream_inputs`.

    Source: variance-based pruning (arXiv 2507.12988); a constant unit can be replaced by a bias.

    Example:
        >>> score_variance(context).units[0].shape  # doctest: +SKIP
        torch.Size([1536])
    """
    return _scores(context.anatomy, _variances(context))


def score_flap(context: ScoringContext) -> WidthScores:
    """Score a feature by its fluctuation Var(X_j) ||W_:j||^2, standardised within each projection.

    The standard scores of all layers are comparable, so they suit a global threshold. A KV group counts the mean over
    the features of its heads.

    Args:
        context: the model and the data.

    Raises:
        ValueError: as :func:`~hf_cka.pruning.criteria.inputs.stream_inputs`.

    Source: FLAP (arXiv 2312.11983), metric "WIFV" with standardisation "AL-AM".

    Example:
        >>> score_flap(context).units[0].mean()  # doctest: +SKIP
        tensor(0., dtype=torch.float64)
    """
    fluctuation = _variances(context)
    for key, variance in fluctuation.items():
        raw = variance * weight_matrix(context.anatomy, *key).square().sum(dim=0).double().cpu()
        spread = raw.std()
        # equal scores (or a single feature) say nothing: neutral, instead of 0 / 0
        fluctuation[key] = (raw - raw.mean()) / spread if spread > 0 else torch.zeros_like(raw)
    return _scores(context.anatomy, fluctuation)


def score_magnitude(context: ScoringContext) -> WidthScores:
    """Score a group by the L2 norm of all weights that go with it: rows of q, k, v, gate, up, columns of o, down.

    Every parameter of two axes or more that has a slice per group counts; biases and norms do not.

    Args:
        context: the model; no data is read.

    Source: group magnitude, the usual control (DepGraph, arXiv 2301.12900).

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hf_cka.anatomy import find_anatomy
        >>> from hf_cka.representations import Pooling
        >>> sizes = dict(hidden_size=8, intermediate_size=16, num_attention_heads=2, vocab_size=16)
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> scores = score_magnitude(ScoringContext(model, find_anatomy(model), [], Pooling("last")))
        >>> scores.kv_groups[0].shape, scores.units[0].shape
        (torch.Size([2]), torch.Size([16]))
    """
    anatomy = context.anatomy

    def squares(layer: int, name: str) -> torch.Tensor:
        return values_of(anatomy, layer, name).double().square()

    groups, units = group_sums(anatomy, squares)
    return WidthScores(tuple(group.sqrt() for group in groups), tuple(unit.sqrt() for unit in units))


def score_random(context: ScoringContext) -> WidthScores:
    """Score at random, the same for the same seed.

    Args:
        context: the model and the seed; no data is read.

    Example:
        >>> score_random(context).units[0].shape  # doctest: +SKIP
        torch.Size([1536])
    """
    generator = torch.Generator().manual_seed(context.seed)
    sizes = [context.anatomy.sizes(layer) for layer in range(context.anatomy.num_layers)]

    def draw(count: int) -> torch.Tensor:
        return torch.rand(count, generator=generator, dtype=torch.float64)

    return WidthScores(tuple(draw(s.num_kv_heads) for s in sizes), tuple(draw(s.intermediate_size) for s in sizes))


class Moments:
    """Mean and variance of every feature over weighted tokens, merged batch by batch (Chan et al. 1979).

    A sum of squares minus a squared sum would lose the variance of a feature whose mean is large.
    """

    def __init__(self) -> None:
        self.weight = 0.0
        self.mean: torch.Tensor | float = 0.0
        self.squares: torch.Tensor | float = 0.0

    def update(self, tokens: Tokens) -> None:
        """Add one batch."""
        weight = float(tokens.weight.sum())
        mean = tokens.sum(tokens.values) / weight
        squares = tokens.sum((tokens.values.double() - mean).square())
        total = self.weight + weight
        shift = mean - self.mean
        self.squares = self.squares + squares + shift.square() * (self.weight * weight / total)
        self.mean = self.mean + shift * (weight / total)
        self.weight = total

    @property
    def variance(self) -> torch.Tensor:
        """Per feature, float64."""
        return torch.as_tensor(self.squares) / self.weight


def _mean(context: ScoringContext, statistic: Callable[[int, str, Tokens], torch.Tensor]) -> Statistics:
    """The mean over prompts of a statistic that returns its sum over the prompts of one batch.

    A layer that a forward pass runs several times counts the mean of its runs.
    """
    totals: Statistics = {}

    def consume(layer: int, role: str, tokens: Tokens) -> None:
        value = statistic(layer, role, tokens).cpu()
        totals[layer, role] = totals[layer, role] + value if (layer, role) in totals else value

    prompts = stream_inputs(context.anatomy, context.batches, consume, progress=context.progress)
    visits = [layer.visits for layer in context.anatomy.stack.layers]
    return {key: value / (prompts * visits[key[0]]) for key, value in totals.items()}


def _variances(context: ScoringContext) -> Statistics:
    moments: dict[tuple[int, str], Moments] = {}

    def consume(layer: int, role: str, tokens: Tokens) -> None:
        moments.setdefault((layer, role), Moments()).update(tokens)

    stream_inputs(context.anatomy, context.batches, consume, progress=context.progress)
    return {key: value.variance.cpu() for key, value in moments.items()}


def _scores(anatomy: Anatomy, values: Statistics) -> WidthScores:
    """One score per unit as it is; one per KV group, the mean over its query heads or their features.

    What no token ever reached (an expert that was never chosen) scores nothing.
    """
    found: dict[str, list[torch.Tensor]] = {"o": [], "down": []}
    for layer in range(anatomy.num_layers):
        outputs = anatomy.outputs(layer)
        for role, scores in found.items():
            members = outputs[role].members if role in outputs else 0
            value = values.get((layer, role), torch.zeros(members, dtype=torch.float64))
            scores.append(value.unflatten(0, (members, -1)).mean(dim=1) if members else value)
    return WidthScores(tuple(found["o"]), tuple(found["down"]))


def _head_matrices(anatomy: Anatomy, layer: int) -> torch.Tensor:
    """The output projection as (out_features, heads, head_dim)."""
    return weight_matrix(anatomy, layer, "o").unflatten(1, (anatomy.sizes(layer).num_heads, -1))


_ENTRIES = (
    CriterionEntry(
        "amp",
        score_amp,
        "a head's L1 contribution to the residual stream; a unit's mean activation",
        "arXiv 2504.21174",
    ),
    CriterionEntry("activation_norm", score_activation_norm, "size of the activation (Minitron)", "arXiv 2407.14679"),
    CriterionEntry(
        "magnitude", score_magnitude, "L2 norm of all weights of the group", "arXiv 2301.12900", needs_data=False
    ),
    CriterionEntry(
        "taylor",
        score_taylor,
        "first-order change of the loss when the group is removed",
        "Molchanov et al. 2019 (arXiv 1906.10771)",
        needs_logits=True,
        needs_gradients=True,
    ),
    CriterionEntry("wanda", score_wanda, "output weights times activation, summed", "arXiv 2306.11695"),
    CriterionEntry("flap", score_flap, "fluctuation, standardised within each projection", "arXiv 2312.11983"),
    CriterionEntry("variance", score_variance, "variance of the activation", "arXiv 2507.12988"),
    CriterionEntry(
        "kl",
        score_kl,
        "KL of the output without the group to the intact one (slow: one forward pass per group and batch)",
        "arXiv 2506.04513",
        needs_logits=True,
    ),
    CriterionEntry(
        "obs",
        score_obs,
        "rise of the output's KL when the group goes and the rest is refitted",
        "arXiv 2302.04089",
        needs_logits=True,
    ),
    CriterionEntry(
        "loraprune",
        loraprune.score_width,
        "squared weight times its gradient, estimated from the gradients of the LoRA adapters on it",
        "arXiv 2305.18403",
        needs_logits=True,
        needs_adapters=True,
    ),
    CriterionEntry("random", score_random, "a seeded draw, the control", "", needs_data=False),
)

#: name -> width criterion
WIDTH: Mapping[str, CriterionEntry] = MappingProxyType({entry.name: entry for entry in _ENTRIES})
