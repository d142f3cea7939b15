"""Where two language models disagree: the samples, and in each the place, at which their next tokens differ most."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from tqdm.auto import tqdm

from hf_cka.data import Batch
from hf_cka.evaluation.blocks import Excerpt, Excerpts
from hf_cka.evaluation.running import check_causal, input_device, measuring
from hf_cka.representations.running import token_mask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BEFORE = 40  # tokens of a sample shown before the place of the largest difference


@dataclass(frozen=True)
class Disagreement:
    """One sample.

    Args:
        kl: KL(base || other) of the next-token distributions, in nats, mean over the sample's tokens.
        loss_change: the other's loss on the sample minus the base's, in nats a token.
        worst: KL at the place where it is largest.
        before: text up to that place.
        base_says: the token that the base thinks most likely there.
        other_says: the token that the other model thinks most likely there.
        really: the token that follows.
    """

    kl: float
    loss_change: float
    worst: float
    before: str
    base_says: str
    other_says: str
    really: str


@dataclass(frozen=True)
class Disagreements:
    """All samples together, and those with the largest difference.

    Args:
        kl: mean over the samples, in nats a token.
        standard_error: of that mean, over the samples; None for a single one.
        same_top: share of all tokens at which both think the same token most likely.
        num_samples: how many there were.
        most: the samples with the largest mean KL, largest first.
    """

    kl: float
    standard_error: float | None
    same_top: float
    num_samples: int
    most: tuple[Disagreement, ...]

    def excerpts(self, base: str = "dense", other: str = "pruned") -> Excerpts:
        """Return the samples as a block of a report.

        Args:
            base: name of the base.
            other: name of the other model.
        """
        return Excerpts(
            f"Where {base} and {other} disagree most",
            tuple(
                Excerpt(
                    f"{'…' if len(item.before) > 3 else ''}{item.before.lstrip()} ▸",
                    {
                        f"{base} says": repr(item.base_says),
                        f"{other} says": repr(item.other_says),
                        "the text": repr(item.really),
                        "KL here": item.worst,
                        "KL, mean": item.kl,
                        "loss": f"{item.loss_change:+.3f}",
                    },
                )
                for item in self.most
            ),
            note=f"The samples with the largest mean KL({base} || {other}) of the next-token distributions, in nats a "
            "token, each cut at the place where it is largest (▸).",
        )


def disagreements(
    base: Any,
    other: Any,
    tokenizer: PreTrainedTokenizerBase,
    batches: Iterable[Batch],
    *,
    top: int = 5,
    progress: bool = True,
) -> Disagreements:
    """Measure the KL divergence between the next-token distributions of two models, sample by sample.

    Args:
        base: the model whose distribution is the reference.
        other: the model that is compared with it; of the same vocabulary.
        tokenizer: of both.
        batches: model-ready dicts, read once.
        top: samples to return with their text.
        progress: show a bar if it takes longer than two seconds.

    Raises:
        ValueError: if a model is not causal, vocabularies differ, or no sample has two tokens.

    Example:
        >>> found = disagreements(dense, pruned, tokenizer, batches, top=3)  # doctest: +SKIP
        >>> found.most[0].base_says, found.most[0].other_says  # doctest: +SKIP
        (' Python', ' the')
    """
    for model in (base, other):
        check_causal(model, "disagreements")
    sizes = [model.get_output_embeddings().weight.shape[0] for model in (base, other)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"The models have vocabularies of {sizes[0]} and {sizes[1]} tokens: their distributions cannot be compared."
        )
    samples: list[Disagreement] = []
    same, tokens = 0, 0
    with measuring(base), measuring(other):
        for index, batch in enumerate(tqdm(batches, desc="disagreement", unit="batch", disable=not progress, delay=2)):
            mask = token_mask(batch, index)
            both = [_logits(model, batch) for model in (base, other)]
            for row in range(len(mask)):
                kept = mask[row].nonzero().flatten()
                if len(kept) < 2:
                    continue
                ids = batch["input_ids"][row].cpu()[kept]
                # kept is one run: padding stands on one side
                first, second = (
                    logits[row, kept.to(logits.device)][:-1].float().log_softmax(-1).cpu() for logits in both
                )
                agree = first.argmax(-1) == second.argmax(-1)
                same, tokens = same + int(agree.sum()), tokens + len(agree)
                samples.append(_one(first, second, ids, tokenizer))
    if not samples:
        raise ValueError("No sample has two tokens, so there is no next token to compare; pass longer texts.")
    values = torch.tensor([sample.kl for sample in samples], dtype=torch.float64)
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None
    most = sorted(range(len(samples)), key=lambda i: (-samples[i].kl, i))[:top]
    return Disagreements(float(values.mean()), error, same / tokens, len(samples), tuple(samples[i] for i in most))


def _logits(model: Any, batch: Batch) -> torch.Tensor:
    device = input_device(model)
    names = ("input_ids", "attention_mask")
    inputs = {name: batch[name].to(device) for name in names if name in batch}
    return model(**inputs, use_cache=False).logits


def _one(first: torch.Tensor, second: torch.Tensor, ids: torch.Tensor, tokenizer: Any) -> Disagreement:
    """Compare log-probabilities ``(tokens - 1, vocabulary)`` of one sample."""
    kl = functional.kl_div(second, first, reduction="none", log_target=True).sum(-1).double()
    place = int(kl.argmax())
    labels = ids[1:].unsqueeze(1)
    change = (first.gather(1, labels) - second.gather(1, labels)).double().mean()

    def text(tokens: Any) -> str:
        return str(tokenizer.decode(tokens))

    return Disagreement(
        kl=float(kl.mean()),
        loss_change=float(change),
        worst=float(kl[place]),
        before=text(ids[max(place + 1 - _BEFORE, 0) : place + 1]),
        base_says=text([int(first[place].argmax())]),
        other_says=text([int(second[place].argmax())]),
        really=text([int(ids[place + 1])]),
    )
