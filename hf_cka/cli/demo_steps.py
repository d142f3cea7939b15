"""The steps of the demo: each measures one thing on the real model and returns plain data.

What is printed and where it is written is in ``demo``.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from hf_cka.data import Batch
from hf_cka.evaluation import completion_loss, count_parameters, decode_speed, exact_match, peak_memory, perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_cka.pruning.pruners import PruningResult
    from hf_cka.selection import LayerSelection


@dataclass(frozen=True)
class Budget:
    """How much of everything the demo does; the default fits five minutes on two cores."""

    calibration_samples: int = 96
    calibration_tokens: int = 96
    train_rows: int = 400
    steps: int = 20
    batch_size: int = 8
    heldout_rows: int = 40
    pruned_layers: int = 3
    pruning_samples: int = 48
    pruning_tokens: int = 32
    perplexity_tokens: int = 2048
    new_tokens: int = 32


# enough to see that every step runs; the numbers mean nothing
QUICK = Budget(
    calibration_samples=16,
    calibration_tokens=24,
    train_rows=16,
    steps=2,
    batch_size=2,
    heldout_rows=3,
    pruned_layers=1,
    pruning_samples=8,
    pruning_tokens=16,
    perplexity_tokens=64,
    new_tokens=4,
)


@dataclass(frozen=True)
class Adapted:
    """One LoRA run.

    Args:
        name: which layers.
        layers: how many; 0 is the untuned model.
        trainable: trainable parameters.
        loss: held-out loss on the completion's tokens, in nats.
        exact: share of held-out rows answered exactly, 0 to 1.
        seconds_per_step: of training; None where there was none.
        peak_mib: peak of the process's memory while training, in MiB; None likewise.
    """

    name: str
    layers: int
    trainable: int
    loss: float
    exact: float
    seconds_per_step: float | None = None
    peak_mib: float | None = None


@dataclass(frozen=True)
class Pruned:
    """One state of the model in the pruning step: perplexity on held-out text, parameters, and decoding speed."""

    name: str
    removed: tuple[int, ...]
    parameters: int
    perplexity: float
    tokens_per_second: float


def measure_untuned(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Any]) -> Adapted:
    """Measure the model on the task as it is."""
    loss, exact = _quality(model, tokenizer, rows)
    return Adapted("untuned", 0, 0, loss, exact)


def adapt(
    name: str,
    selection: LayerSelection,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Sequence[Any],
    heldout_rows: Sequence[Any],
    budget: Budget,
    *,
    seed: int = 0,
) -> Adapted:
    """Train LoRA in the chosen layers through TRL's SFTTrainer, measure it, and give the model back untouched.

    Args:
        name: of the row.
        selection: the layers.
        model: the base model; adapters are removed again.
        tokenizer: its tokenizer.
        train_rows: prompt/completion rows.
        heldout_rows: the same, not trained on.
        budget: steps and batch size.
        seed: of the data order and the adapter's initial weights.
    """
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    with TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=scratch,
                max_steps=budget.steps,
                per_device_train_batch_size=budget.batch_size,
                learning_rate=2e-3,
                lr_scheduler_type="cosine",
                warmup_steps=4,
                gradient_checkpointing=False,
                seed=seed,
                report_to="none",
                save_strategy="no",
                logging_steps=budget.steps,
                dataloader_pin_memory=False,
                use_cpu=not torch.accelerator.is_available(),
                bf16=False,
            ),
            train_dataset=Dataset.from_list(list(train_rows)),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", **selection.lora_kwargs()),
        )
        start = time.perf_counter()
        with peak_memory() as memory:
            trainer.train()
        seconds = (time.perf_counter() - start) / budget.steps
    adapted: Any = trainer.model
    adapted.eval()
    loss, exact = _quality(adapted, tokenizer, heldout_rows)
    trainable = count_parameters(adapted).trainable
    adapted.unload()
    del trainer
    gc.collect()
    return Adapted(name, len(selection.layers), trainable, loss, exact, seconds, memory.peak_bytes / 2**20)


def prune_layers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Sequence[Batch],
    heldout_text: str,
    budget: Budget,
    *,
    say: Callable[[str], None],
) -> tuple[PruningResult, list[Pruned]]:
    """Remove layers by leave-one-out CKA, and the same number at random as a control; measure before and after.

    Returns:
        The result of the CKA run, and one row each for dense, CKA and random.
    """
    from hf_cka.pruning.config import PruningConfig
    from hf_cka.pruning.pruners import prune

    def row(name: str, pruned: Any, removed: tuple[int, ...]) -> Pruned:
        say(f"measuring {name}")
        quality = perplexity(pruned, tokenizer, heldout_text, context=512, max_tokens=budget.perplexity_tokens)
        speed = decode_speed(pruned, prompt_tokens=16, new_tokens=budget.new_tokens, repeats=3)
        return Pruned(name, removed, count_parameters(pruned).total, quality.value, speed.tokens_per_second)

    rows = [row("dense", model, ())]
    results = {}
    for criterion in ("cka", "random"):
        config = PruningConfig(method="depth", criterion=criterion, num_layers=budget.pruned_layers)
        results[criterion] = prune(model, batches, config)
        rows.append(row(f"pruned by {criterion}", results[criterion].model, results[criterion].plan.removed_layers))
    return results["cka"], rows


def save_and_check(
    result: PruningResult, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> tuple[Any, list[tuple[str, bool]]]:
    """Save the pruned model, reload it with stock transformers, and compare.

    Returns:
        What was saved, and one (check, passed) pair for each thing compared.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from hf_cka.modeling import save_pruned

    config = result.history.config
    saved = save_pruned(
        result.model,
        folder,
        tokenizer=tokenizer,
        record={"method": config.method, "settings": config.to_dict()},
        overwrite=True,
    )
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = tokenizer("The list type in Python", return_tensors="pt")
    with torch.inference_mode():
        same = torch.equal(again(**inputs).logits, result.model(**inputs).logits)
    greedy: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    cached = again.generate(**inputs, use_cache=True, **greedy)
    uncached = again.generate(**inputs, use_cache=False, **greedy)
    checks = [
        (f"AutoModelForCausalLM.from_pretrained gives a {type(again).__name__}", type(again) is type(result.model)),
        ("its logits equal the pruned model's, bit for bit", same),
        ("generation with cache equals generation without", torch.equal(cached, uncached)),
        ("its config has as many layers as were kept", again.config.num_hidden_layers == len(result.plan.kept_layers)),
    ]
    return saved, checks


def _quality(model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Any]) -> tuple[float, float]:
    loss = completion_loss(model, tokenizer, rows, batch_size=16)
    exact = exact_match(model, tokenizer, rows, max_new_tokens=32, batch_size=len(rows))
    return loss.value, exact.value
