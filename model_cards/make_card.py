"""Remove three layers of SmolLM2-135M-Instruct by CKA, measure what that costs, and write the model card.

    python model_cards/make_card.py --output smollm2-pruned

Nothing but a package index is needed. The checkpoint goes to --output, with its card; the card alone is also copied
beside this script. The controls remove as many layers: by magnitude, and at random with three seeds. All of them are
measured by `compare`, whose report goes to a folder beside --output and gives the card its numbers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_cka import PruningConfig, calibration, prune, save_pruned
from hf_cka.cli.demo_assets import HUB_ID, load_demo_model
from hf_cka.cli.demo_tasks import documentation_texts
from hf_cka.evaluation import ComparisonSettings, compare, write_report
from hf_cka.hub import model_card

HERE = Path(__file__).parent
SOURCE = "CPython documentation (pydoc_data.topics), three quarters of the topics"
HELDOUT = "the other quarter of the topics of CPython's documentation"
LICENSE = "apache-2.0"  # of the base model


def main() -> None:
    """Run everything; see the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--layers", type=int, default=3, help="how many layers to remove")
    parser.add_argument("--samples", type=int, default=32, help="calibration samples")
    parser.add_argument("--length", type=int, default=64, help="tokens of a calibration sample")
    parser.add_argument("--tokens", type=int, default=4096, help="held-out tokens for perplexity")
    args = parser.parse_args()

    model, tokenizer, weights = load_demo_model()
    texts = documentation_texts("calibration")
    batches = calibration(texts, tokenizer, args.samples, args.length, batch_size=16, source=SOURCE)
    runs = [("cka", 0), ("magnitude", 0), ("random", 0), ("random", 1), ("random", 2)]
    results, models = {}, {}
    for criterion, seed in runs:
        config = PruningConfig(method="depth", criterion=criterion, num_layers=args.layers, seed=seed)
        results[criterion, seed] = pruned = prune(model, batches, config)
        name = f"{criterion}, seed {seed}" if criterion == "random" else criterion
        removed = ", ".join(map(str, pruned.plan.removed_layers))
        models[f"pruned by {name} ({removed})"] = pruned.model
        print(f"{name} removes {removed}", flush=True)
    settings = ComparisonSettings(parts=("quality",), context=512, max_tokens=args.tokens)
    heldout = documentation_texts("heldout")
    comparison = compare(
        model, models, heldout, tokenizer=tokenizer, base_name="dense", settings=settings, source=HELDOUT, say=print
    )

    result = results["cka", 0]
    record = {
        "method": result.history.config.method,
        "settings": result.history.config.to_dict(),
        "calibration": {
            "source": SOURCE,
            "num_samples": sum(len(batch["input_ids"]) for batch in batches),
            "num_tokens": sum(int(batch["attention_mask"].sum()) for batch in batches),
            "max_length": args.length,
            "seed": batches.seed,
            "hash": result.history.calibration,
        },
        "base_model": HUB_ID,
    }
    scores = dict(result.history.steps[0].scores)  # of all layers, before the first is removed
    print(save_pruned(result.model, args.output, tokenizer=tokenizer, record=record, scores=scores, overwrite=True))
    report = comparison.report(command="python model_cards/make_card.py --output smollm2-pruned")
    page = write_report(report, args.output.with_name(f"{args.output.name}-comparison") / "report.html")
    limits = [
        "Measured without any training after the pruning.",
        "Speed was not measured here; layers that are gone save their share of the time of all layers.",
        f"Weights: {weights}. Those from the 4-bit file of the package index are not bit-equal to those of the base "
        "model's Hub repository.",
    ]
    card = model_card(args.output, license=LICENSE, results=page.with_suffix(".json"), limits=limits)
    for target in (args.output / "README.md", HERE / "SmolLM2-135M-Instruct-pruned.md"):
        card.save(target)
        print(f"Wrote {target}")


if __name__ == "__main__":
    main()
