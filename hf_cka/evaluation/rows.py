"""Quality on prompt/completion rows: loss on the completion, and exact match of what is generated.

Rows are as TRL's SFTTrainer takes them: ``{"prompt": str, "completion": str}``, or lists of chat messages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from tqdm.auto import tqdm

from hf_cka.data import pad
from hf_cka.evaluation.running import check_causal, context_limit, filler_id, input_device, measuring

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = Mapping[str, Any]


@dataclass(frozen=True)
class CompletionLoss:
    """Loss on completions.

    Args:
        value: mean negative log-likelihood of a completion token, in nats, every token weighing the same.
        tokens: completion tokens scored, end token included.
        rows: how many rows they came from.
    """

    value: float
    tokens: int
    rows: int


@dataclass(frozen=True)
class Example:
    """One generated answer beside the expected one."""

    prompt: str
    expected: str
    produced: str
    correct: bool


@dataclass(frozen=True)
class ExactMatch:
    """Share of rows whose generated completion is exactly the expected one.

    Args:
        value: in [0, 1].
        n: rows.
        examples: all of them, in the order of the rows.
    """

    value: float
    n: int
    examples: tuple[Example, ...]

    @property
    def standard_error(self) -> float:
        """Of the share, as a binomial proportion: ``sqrt(p (1 - p) / n)``."""
        return math.sqrt(self.value * (1 - self.value) / self.n)


def completion_loss(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> CompletionLoss:
    """Measure the loss on the completion tokens of rows, as TRL's SFTTrainer trains them.

    Args:
        model: a causal language model; its training mode is put back afterwards.
        tokenizer: of the model; with a chat template if the rows are conversational.
        rows: prompt/completion rows, plain or conversational.
        batch_size: rows a forward pass; the result does not depend on it.
        progress: show a bar if it takes longer than two seconds.

    Raises:
        ValueError: if there are no rows, a row lacks a column or an own completion, a row is longer than the model's
            context, or the model is not causal.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a"))
        >>> words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=3, hidden_size=8, intermediate_size=8,
        ...     num_hidden_layers=1, num_attention_heads=2, eos_token_id=2))
        >>> completion_loss(model, tokenizer, [{"prompt": "a b ", "completion": "b a "}]).tokens
        3
    """
    check_causal(model, "completion_loss")
    _check_rows(rows, batch_size)
    encoded = [_encode(tokenizer, row, index, context_limit(model)) for index, row in enumerate(rows)]
    device = input_device(model)
    total, scored = 0.0, 0
    bar = tqdm(total=len(rows), desc="completion loss", unit="row", disable=not progress, delay=2)
    with measuring(model), bar:
        for at in range(0, len(encoded), batch_size):
            batch = encoded[at : at + batch_size]
            ids, mask = pad([full for full, _ in batch], filler_id(tokenizer), "right")
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
            for row, (full, start) in enumerate(batch):
                predicted = logits[row, start - 1 : len(full) - 1].float()
                labels = torch.tensor(full[start:], device=predicted.device)
                total += functional.cross_entropy(predicted, labels, reduction="none").double().sum().item()
                scored += len(labels)
            bar.update(len(batch))
    return CompletionLoss(total / scored, scored, len(rows))


def exact_match(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    progress: bool = True,
) -> ExactMatch:
    """Generate greedily and count the completions that are exactly the expected ones.

    Prompts are padded on the left. An answer ends at the first end token; white space around it does not count.

    Args:
        model: a causal language model; its training mode is put back afterwards.
        tokenizer: of the model; with a chat template if the rows are conversational.
        rows: prompt/completion rows, plain or conversational.
        max_new_tokens: longest answer, in tokens; an expected completion that is longer can never be matched.
        batch_size: rows generated together.
        progress: show a bar if it takes longer than two seconds.

    Raises:
        ValueError: if there are no rows, a row lacks a column, or the model cannot generate.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a"))
        >>> words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=3, hidden_size=8, intermediate_size=8,
        ...     num_hidden_layers=1, num_attention_heads=2, eos_token_id=2))
        >>> result = exact_match(model, tokenizer, [{"prompt": "a b ", "completion": "b a"}], max_new_tokens=2)
        >>> result.n, result.examples[0].expected
        (1, 'b a')
    """
    check_causal(model, "exact_match")
    _check_rows(rows, batch_size)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    prompts = [_prompt_ids(tokenizer, row["prompt"]) for row in rows]
    device, pad_id, ends = input_device(model), filler_id(tokenizer), _end_ids(model, tokenizer)
    examples: list[Example] = []
    bar = tqdm(total=len(rows), desc="exact match", unit="row", disable=not progress, delay=2)
    with measuring(model), bar:
        for at in range(0, len(rows), batch_size):
            batch = rows[at : at + batch_size]
            ids, mask = pad(prompts[at : at + batch_size], pad_id, "left")
            output = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=pad_id,
                eos_token_id=sorted(ends) or None,
            )
            for row, generated in zip(batch, output[:, ids.shape[1] :].tolist(), strict=True):
                length = next((i for i, token in enumerate(generated) if token in ends), len(generated))
                produced = str(tokenizer.decode(generated[:length], skip_special_tokens=True)).strip()
                expected = _text(row["completion"]).strip()
                examples.append(Example(_text(row["prompt"]), expected, produced, produced == expected))
            bar.update(len(batch))
    return ExactMatch(sum(example.correct for example in examples) / len(examples), len(examples), tuple(examples))


def _check_rows(rows: Sequence[Row], batch_size: int) -> None:
    if not rows:
        raise ValueError("There are no rows to measure on; give at least one {'prompt': ..., 'completion': ...}.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    for index, row in enumerate(rows):
        missing = {"prompt", "completion"} - set(row)
        if missing:
            raise ValueError(
                f"Row {index} has no column {sorted(missing)[0]!r}; its columns are {sorted(row)}. "
                "Rows must have 'prompt' and 'completion'."
            )


def _encode(tokenizer: Any, row: Row, index: int, limit: int | None) -> tuple[list[int], int]:
    """Return the ids of prompt and completion together, and where the completion starts."""
    prompt = _prompt_ids(tokenizer, row["prompt"])
    if isinstance(row["prompt"], str):
        completion = row["completion"]
        end = tokenizer.eos_token or ""
        full = tokenizer(row["prompt"] + completion + ("" if end and completion.endswith(end) else end))["input_ids"]
    else:
        messages = [*row["prompt"], *row["completion"]]
        full = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    # Prompt and completion are tokenized together, as in training, so the last token of the prompt may have merged.
    start = next((i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), min(len(prompt), len(full)))
    if start < 1 or start >= len(full):
        raise ValueError(f"Row {index} has no completion tokens of its own after its prompt; check both columns.")
    if limit is not None and len(full) > limit:
        raise ValueError(f"Row {index} has {len(full)} tokens, more than the model's {limit} positions; shorten it.")
    return full, start


def _prompt_ids(tokenizer: Any, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    encoded = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
    return encoded["input_ids"]


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "\n".join(message["content"] for message in content)


def _end_ids(model: Any, tokenizer: Any) -> set[int]:
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = ends if isinstance(ends, list) else [ends]
    return {token for token in [*listed, tokenizer.eos_token_id] if token is not None}
