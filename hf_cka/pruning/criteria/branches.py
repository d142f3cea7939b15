"""How near a child model is to its parent: the rules by which a mixture chooses a branch. Higher is better, always."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F

from hf_cka.anatomy import Anatomy
from hf_cka.data import Batch
from hf_cka.pruning.criteria.base import CriterionEntry, ScoringContext
from hf_cka.pruning.criteria.leave_one_out import leave_one_out
from hf_cka.pruning.criteria.outputs import given_logits, logit_rows
from hf_cka.pruning.criteria.replay import chunks, run_model
from hf_cka.representations import evaluating, rows_of, token_mask
from hf_cka.similarity import cka

# Bytes for the hidden states and logits of one chunk of rows.
_MEMORY = 2**30

Rule = Callable[[ScoringContext, ScoringContext], float]


def by_cka(parent: ScoringContext, child: ScoringContext) -> float:
    """Return the CKA between the parent's and the child's readout (debiased from 4 samples on).

    Source: arXiv 2506.04513: of two children the one with the higher CKA to its parent is kept.
    """
    readouts = [leave_one_out(context, []).reference for context in (parent, child)]
    assert readouts[0] is not None
    return cka(*readouts, estimator="debiased" if len(readouts[0]) >= 4 else "biased")


def by_cosine(parent: ScoringContext, child: ScoringContext) -> float:
    """Return the mean cosine between the parent's and the child's last hidden states, over tokens.

    Source: MoP, arXiv 2602.06127.
    """
    total, count = 0.0, 0
    for before, after in _both(parent, child, head=False):
        a, b = (hidden.double().cpu() for hidden in (before, after))
        total += float(F.cosine_similarity(a, b, dim=-1).sum())
        count += len(a)
    return total / count


def by_kl(parent: ScoringContext, child: ScoringContext) -> float:
    """Return minus KL(parent's output || child's output), in nats per token, or per sample for a classifier.

    Source: MoP, arXiv 2602.06127.
    """
    total, count = 0.0, 0
    for before, after in _both(parent, child, head=True):
        p, q = (F.log_softmax(logits.float(), dim=-1) for logits in (before, after.to(before.device)))
        total += float(F.kl_div(q, p, log_target=True, reduction="none").sum(dim=-1).double().sum())
        count += len(p)
    return -total / count


def by_perplexity(parent: ScoringContext, child: ScoringContext) -> float:
    """Return minus the child's perplexity.

    Source: MoP, arXiv 2602.06127.
    """
    return -math.exp(leave_one_out(child, [], readouts=False, logits=True).reference_nll)


def _both(parent: ScoringContext, child: ScoringContext, head: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Run parent and child over the same rows, and give the hidden states or logits of each, padding left out."""
    with evaluating(parent.model), evaluating(child.model), torch.no_grad():
        for index, batch in enumerate(parent.batches):
            mask = token_mask(batch, index)
            for part, _ in chunks(parent.anatomy, batch, mask, 2, _MEMORY, logits=head):
                before, after = (_output(anatomy, part, head) for anatomy in (parent.anatomy, child.anatomy))
                yield before, after


def _output(anatomy: Anatomy, batch: Batch, head: bool) -> torch.Tensor:
    hidden, logits = run_model(anatomy, batch, head)
    if head:
        values, mask = logit_rows(given_logits(anatomy, logits), batch, anatomy)
    else:
        values, mask = rows_of(hidden, batch, anatomy)
    return values[mask.to(values.device)]


#: name -> rule; "random" and strings of L and G need no model
RULES: dict[str, Rule] = {"cka": by_cka, "cosine": by_cosine, "kl": by_kl, "perplexity": by_perplexity}
#: name -> what the rule needs of model and data
USES: dict[str, CriterionEntry] = {
    name: CriterionEntry(
        name,
        rule,
        (rule.__doc__ or "").splitlines()[0],
        "path",
        needs_logits=name in ("kl", "perplexity"),
        needs_next_token=name == "perplexity",
    )
    for name, rule in RULES.items()
}
