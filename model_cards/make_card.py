"""Remove three layers of SmolLM2-135M-Instruct by CKA, measure what that costs, and write the model card.

    python model_cards/make_card.py --output smollm2-pruned

Nothing but a package index is needed. The checkpoint goes to --output, with its card; the card alone is also copied
beside this script. The controls remove as many layers: by magnitude, and at random with three seeds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from hf_cka import PruningConfig, calibration, prune, save_pruned
from hf_cka.cli.demo_assets import HUB_ID, load_demo_model
from hf_cka.cli.demo_tasks import documentation_texts
from hf_cka.evaluation import perplexity
from hf_cka.hub import model_card

HERE = Path(__file__).parent
SOURCE = "CPython documentation (pydoc_data.topics), three quarters of the topics"
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
    heldout = "\n\n".join(documentation_texts("heldout"))

    rows: list[dict[str, Any]] = []

    def measure(name: str, measured: Any, removed: tuple[int, ...]) -> None:
        value = perplexity(measured, tokenizer, heldout, context=512, max_tokens=args.tokens).value
        parameters = sum(p.numel() for p in measured.parameters())
        rows.append({"model": name, "layers removed": ", ".join(map(str, removed)) or "none"})
        rows[-1] |= {"parameters": parameters, "perplexity": value}
        print(*rows[-1].values(), sep="  ", flush=True)

    measure("dense", model, ())
    runs = [("cka", 0), ("magnitude", 0), ("random", 0), ("random", 1), ("random", 2)]
    results = {}
    for criterion, seed in runs:
        config = PruningConfig(method="depth", criterion=criterion, num_layers=args.layers, seed=seed)
        results[criterion, seed] = prune(model, batches, config)
        name = f"{criterion}, seed {seed}" if criterion == "random" else criterion
        measure(f"pruned by {name}", results[criterion, seed].model, results[criterion, seed].plan.removed_layers)

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
    measured = {
        "rows": rows,
        "command": "python model_cards/make_card.py --output smollm2-pruned",
        "notes": f"Perplexity of {args.tokens:,} tokens of the other quarter of the documentation topics, in windows "
        f"of 512 without overlap, without any training after the pruning. Weights: {weights}.",
    }
    (args.output / "results.json").write_text(json.dumps(measured, indent=1))
    limits = [
        "Speed was not measured here; layers that are gone save their share of the time of all layers.",
        "Weights that come from the 4-bit file of the package index are not bit-equal to those of the base model's Hub "
        "repository.",
    ]
    card = model_card(args.output, license=LICENSE, results=args.output / "results.json", limits=limits)
    for target in (args.output / "README.md", HERE / "SmolLM2-135M-Instruct-pruned.md"):
        card.save(target)
        print(f"Wrote {target}")


if __name__ == "__main__":
    main()
