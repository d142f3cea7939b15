"""Leave-one-out criteria that compare readouts or outputs: CKA, shape distances, their consensus, KL, perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from scipy.stats import rankdata

from hf_cka.pruning.criteria.base import DepthScores, ScoringContext, Structure
from hf_cka.pruning.criteria.leave_one_out import LeftOut, leave_one_out
from hf_cka.pruning.criteria.shapes import DISSIMILARITIES, by_class
from hf_cka.similarity import pairwise_similarity


def score_cka(context: ScoringContext, structures: Sequence[Structure], estimator: str = "debiased") -> DepthScores:
    """Return 1 - CKA between the model's readout and the readout without each structure.

    Args:
        context: the model, the data, and the pooling of the readout.
        structures: what to leave out, one at a time.
        estimator: ``"debiased"``, or ``"biased"`` as the paper does.

    Raises:
        ValueError: for too few samples, or a readout of the whole model that is the same for every sample.

    Source: arXiv 2405.17081, section 3: the structure whose removal leaves the readout most alike goes first.
    """
    return cka_of(leave_one_out(context, structures), context, estimator)


def cka_of(left: LeftOut, context: ScoringContext, estimator: str = "debiased") -> DepthScores:
    """Return the CKA scores of readouts that were collected already; see :func:`score_cka`."""
    assert left.reference is not None
    if estimator == "debiased" and len(left.reference) < 4:
        count = len(left.reference)
        raise ValueError(f"{count} samples: the debiased estimator needs at least 4. Use more, or 'cka_biased'.")
    result = pairwise_similarity(
        [left.reference, *left.readouts],
        pairs=[(0, k + 1) for k in range(len(left.structures))],
        estimator=estimator,
        standard_error=estimator == "debiased",
    )
    if result.status[0] not in ("ok", "outlier_dominated"):
        raise ValueError(
            f"The readout of the whole model is {result.status[0].replace('_', ' ')} over the {result.n} samples, so "
            f"nothing can be compared with it. Read another token: pooling is {context.pooling.kind!r}; try 'mean'."
        )
    notes = {
        structure: f"CKA is undefined: without it the readout is {status.replace('_', ' ')}"
        for structure, status, value in zip(left.structures, result.status[1:], result.values, strict=True)
        if math.isnan(value)
    }
    return DepthScores(
        left.structures,
        tuple(math.inf if math.isnan(value) else 1 - float(value) for value in result.values),
        details={
            "cka": tuple(map(float, result.debiased)),
            "cka_biased": tuple(map(float, result.biased)),
            "standard_error": tuple(map(float, result.standard_error)),
        },
        notes=notes,
        layer_calls=left.layer_calls,
        chunks=left.chunks,
    )


def score_one(name: str) -> Callable[[ScoringContext, Sequence[Structure]], DepthScores]:
    """Return the criterion that listens to one voice of the consensus alone.

    Args:
        name: one of ``DISSIMILARITIES``.
    """

    def score(context: ScoringContext, structures: Sequence[Structure]) -> DepthScores:
        left = leave_one_out(context, structures)
        values = dissimilarities(left, None, (name,))[name]
        notes = {s: f"{name} is undefined here" for s, v in zip(structures, values, strict=True) if math.isnan(v)}
        if len(notes) == len(structures):
            raise ValueError(
                f"{name!r} is undefined for every structure: {len(left.readouts[0])} samples are too few for a readout "
                f"{left.readouts[0].shape[1]} wide, or the readout is the same for all samples. Use more samples, or "
                "'procrustes'."
            )
        importance = tuple(math.inf if math.isnan(v) else v for v in values)
        return DepthScores(tuple(structures), importance, {name: values}, notes, left.layer_calls, left.chunks)

    return score


def score_consensus(context: ScoringContext, structures: Sequence[Structure], labelled: bool = False) -> DepthScores:
    """Rank the structures by each of eight dissimilarities, and sum the ranks.

    A dissimilarity that is undefined for every structure (CCA with fewer samples than the readout is wide) does not
    vote, and a note says so. ``details`` holds every dissimilarity and, as ``rank of ...``, every rank.

    Args:
        context: the model, the data, and the pooling of the readout.
        structures: what to leave out, one at a time.
        labelled: compare Gaussians within each class of ``labels``, instead of one Gaussian for all samples.

    Source: arXiv 2411.14345: the structure with the lowest sum of ranks (Borda count) goes first.
    """
    left = leave_one_out(context, structures)
    labels = torch.cat([torch.as_tensor(batch["labels"]).cpu() for batch in context.batches]) if labelled else None
    values = dissimilarities(left, labels, tuple(DISSIMILARITIES))
    details: dict[str, tuple[float, ...]] = dict(values)
    notes: dict[Structure | str, str] = {}
    total = [0.0] * len(structures)
    for name, distances in values.items():
        if all(map(math.isnan, distances)):
            notes[name] = "undefined for every structure, so it does not vote: too few samples for the readout's width"
            continue
        # equal distances share the mean of their ranks; an undefined one comes last
        ranks = rankdata([math.inf if math.isnan(d) else d for d in distances])
        details[f"rank of {name}"] = tuple(map(float, ranks))
        total = [sum_ + float(rank) for sum_, rank in zip(total, ranks, strict=True)]
    return DepthScores(tuple(structures), tuple(total), details, notes, left.layer_calls, left.chunks)


def dissimilarities(left: LeftOut, labels: torch.Tensor | None, names: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Return each dissimilarity between the readout of the whole model and that without each structure.

    Args:
        left: the readouts.
        labels: classes of the samples, to compare Gaussians within them; ``(n_samples,)``.
        names: which dissimilarities.
    """
    assert left.reference is not None
    reference = left.reference.double()
    found: dict[str, list[float]] = {name: [] for name in names}
    for readouts in left.readouts:
        for name in names:
            distance = DISSIMILARITIES[name].distance
            if labels is not None and name.startswith("gaussian"):
                found[name].append(by_class(distance, reference, readouts.double(), labels))
            else:
                found[name].append(distance(reference, readouts.double()))
    return {name: tuple(values) for name, values in found.items()}


def score_kl(context: ScoringContext, structures: Sequence[Structure]) -> DepthScores:
    """Return KL(output of the model || output without the structure), in nats per token.

    Source: arXiv 2506.04513; FinerCut (arXiv 2405.18218) for sub-layers.
    """
    left = leave_one_out(context, structures, readouts=False, logits=True)
    details = {"perplexity": tuple(map(math.exp, left.nll))} if left.nll else {}
    return DepthScores(
        tuple(structures), left.kl, {"kl": left.kl, **details}, layer_calls=left.layer_calls, chunks=left.chunks
    )


def score_perplexity(context: ScoringContext, structures: Sequence[Structure]) -> DepthScores:
    """Return the negative log-likelihood of the next token without the structure, in nats.

    Source: Shortened LLaMA (arXiv 2402.02834), SLEB (arXiv 2402.09025).
    """
    left = leave_one_out(context, structures, readouts=False, logits=True)
    details = {"perplexity": tuple(map(math.exp, left.nll)), "kl": left.kl}
    return DepthScores(tuple(structures), left.nll, details, layer_calls=left.layer_calls, chunks=left.chunks)
