"""``hf-cka recover``: train a pruned model until it is itself again, and save it with its record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_cka.cli import options


def recover_command(
    model: options.Model,
    dataset: options.Dataset,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the recovered checkpoint.")] = Path(
        "recovered"
    ),
    method: Annotated[str, typer.Option(help="lora, cka_lora, norms or full.")] = "lora",
    teacher: Annotated[str | None, typer.Option(help="The dense model to learn from; default: none.")] = None,
    weight: Annotated[float | None, typer.Option(help="Of the teacher in the loss, 0 to 1; default: 1.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of the teacher's and the model's logits; default: 1.")
    ] = None,
    hidden_weight: Annotated[
        float | None, typer.Option(help="Of the teacher's hidden states in the loss; default: 0.")
    ] = None,
    teacher_cache: Annotated[Path | None, typer.Option(help="Folder of the teacher's answers; default: none.")] = None,
    teacher_top_k: Annotated[int | None, typer.Option(help="Tokens a place in it; default: all.")] = None,
    rank: Annotated[int | None, typer.Option(help="Of lora and cka_lora; default: 8.")] = None,
    keep_ratio: Annotated[float | None, typer.Option(help="Of cka_lora: share of the layers; default: 0.5.")] = None,
    max_steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 200,
    learning_rate: Annotated[float | None, typer.Option(help="Highest; default: 2e-4; norms 2e-3, full 5e-5.")] = None,
    batch_size: options.BatchSize = 8,
    max_length: options.MaxLength = 512,
    num_samples: options.NumSamples = 128,
    save_steps: Annotated[int | None, typer.Option(help="Steps between checkpoints; default: none.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint in --output.")] = False,
    split: options.Split = "train",
    text_column: options.TextColumn = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    as_json: options.Json = False,
) -> None:
    """Heal a pruned model with TRL's trainer, on labels or on what its dense parent says.

    Example: hf-cka recover --model pruned --dataset data.jsonl --teacher DENSE --output recovered
    """
    import torch

    from hf_cka.data import load_rows, parts_of, public_name, row_text
    from hf_cka.modeling import save_pruned
    from hf_cka.training import DistillationConfig, RecoveryConfig, recover
    from hf_cka.training.recovery import LEARNING_RATES

    config = RecoveryConfig(method, **_given(rank=rank, keep_ratio=keep_ratio))
    mix = _given(weight=weight, temperature=temperature, hidden_weight=hidden_weight, cache_top_k=teacher_top_k)
    if teacher_cache is not None:
        mix["cache_dir"] = str(teacher_cache)
    distillation = DistillationConfig(**mix) if teacher is not None or mix else None
    options.check_output(output, overwrite)
    checkpoints = output.with_name(output.name + ".checkpoints")
    if resume and not any(checkpoints.glob("checkpoint-*")):
        raise FileNotFoundError(f"{checkpoints} holds no checkpoint to go on from. Leave --resume out.")

    loaded, processor = options.load_model(model, device, dtype)
    tokenizer = parts_of(processor).tokenizer
    if tokenizer is None or not loaded.can_generate() or getattr(loaded.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(loaded).__name__} is no causal language model. Tokenize its rows and call hf_cka.recover in Python."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = load_rows(dataset, split)
    if text_column is not None:
        texts = [row_text(row, tokenizer, text_column) for row in rows]
        rows = [text for text in texts if text]
    batches = None
    if config.needs_batches:
        batches = options.load_calibration(
            dataset,
            tokenizer,
            loaded,
            split=split,
            num_samples=num_samples,
            max_length=max_length,
            seed=seed,
            batch_size=batch_size,
            text_column=text_column,
        )
    settings: dict[str, Any] = {
        "max_steps": max_steps,
        "learning_rate": learning_rate if learning_rate is not None else LEARNING_RATES[config.method],
        "per_device_train_batch_size": batch_size,
        "max_length": max_length,
        "disable_tqdm": as_json,
        "use_cpu": loaded.device.type == "cpu",
        "bf16": loaded.device.type != "cpu" and torch.cuda.is_bf16_supported(),
    }
    if save_steps is not None or resume:
        settings |= {"output_dir": str(checkpoints), "save_strategy": "steps", "save_steps": save_steps or max_steps}
    result = recover(
        loaded,
        rows,
        config,
        processing_class=tokenizer,
        teacher=None if teacher is None else options.load_model(teacher, device, dtype)[0],
        distillation=distillation,
        batches=batches,
        resume_from_checkpoint=resume or None,
        seed=seed,
        **settings,
    )
    record = config.to_dict() | {
        "dataset": public_name(dataset),
        "steps": max_steps,
        "learning_rate": settings["learning_rate"],
        "batch_size": batch_size,
        "max_length": max_length,
        "seed": seed,
        "trainable": result.trainable,
        "teacher": public_name(teacher),
        "distillation": None if distillation is None else distillation.to_dict(),
    }
    saved = save_pruned(result.model, output, tokenizer=processor, record={"recovery": record}, overwrite=overwrite)
    if as_json:
        typer.echo(json.dumps({"recovery": record, "losses": result.losses, "output": str(saved.folder)}))
        return
    if result.losses:
        (first, before), (last, after) = result.losses[0], result.losses[-1]
        typer.echo(f"training loss {before:.4f} at step {first}, {after:.4f} at step {last}")
    typer.echo(f"{result.trainable:,} parameters trained\n\n{saved}")


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
