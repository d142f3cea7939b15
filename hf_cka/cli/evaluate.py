"""``hf-cka evaluate``: measure a model on local data, Hub data and the tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hf_cka.cli import options


def evaluate_command(
    model: Annotated[str, typer.Argument(help="A Hub id or a folder, dense or pruned.")],
    tasks: Annotated[
        str,
        typer.Option(
            "--tasks",
            "-t",
            help="KIND, KIND:FILE or lm-eval's, by commas.",
        ),
    ] = "perplexity",
    dataset: Annotated[
        str | None, typer.Option("--dataset", "-d", help="Of a KIND without FILE: a Hub id or a file; default: none.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON file of the result; default: none is written.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Rows of each task; default: all.")] = None,
    batch_size: options.BatchSize = 8,
    context: Annotated[int, typer.Option(help="Window of perplexity, in tokens.")] = 512,
    stride: Annotated[int | None, typer.Option(help="Tokens between windows; default: no overlap.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens for perplexity; default: all.")] = None,
    template: Annotated[str | None, typer.Option(help="Prompt, columns in braces; default: the KIND's.")] = None,
    label_words: Annotated[
        str | None, typer.Option(help="A word a label, by commas; default: the model's head.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest generated answer.")] = 64,
    num_fewshot: Annotated[int | None, typer.Option(help="For lm-eval; default: the task's own number.")] = None,
    include_path: Annotated[str | None, typer.Option(help="Folder of lm-eval task files; default: none.")] = None,
    split: options.Split = "test",
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    as_json: options.Json = False,
) -> None:
    """Measure a model on tasks: your own data, or lm-eval's.

    A KIND is perplexity, multiple_choice, classification, exact_match, completion_loss, sts, image_classification,
    audio_classification, speech, or efficiency without data. FILE may be a folder or a zip of images or audio.

    Example: hf-cka evaluate pruned --tasks perplexity:test.txt,multiple_choice:questions.jsonl,piqa
    """
    from hf_cka.evaluation.tasks import EvaluationSettings, evaluate

    settings = EvaluationSettings(
        limit=limit,
        batch_size=batch_size,
        context=context,
        stride=stride,
        max_tokens=max_tokens,
        template=None if template is None else template.replace("\\n", "\n"),
        label_words=tuple(label_words.split(",")) if label_words else (),
        max_new_tokens=max_new_tokens,
        num_fewshot=num_fewshot,
        include_path=include_path,
        split=split,
        seed=seed,
    )
    result = evaluate(model, tasks, dataset=dataset, settings=settings, device=device, dtype=dtype)
    if output is not None:
        result.save(output)
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
        return
    typer.echo(result.table())
    if output is not None:
        typer.echo(f"Wrote {output}")
