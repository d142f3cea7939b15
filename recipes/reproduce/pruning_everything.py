"""Pruning everything, everywhere, all at once (arXiv 2506.04513): two children a step, tuned, the more similar kept.

    python -m recipes.reproduce.pruning_everything [--model HuggingFaceTB/SmolLM2-360M]
    python -m recipes.reproduce.pruning_everything --small --assets FOLDER [--bf16]

One child loses a layer, the other as many parameters of width, both by the KL divergence of the output without the
structure; both are tuned, the one with the higher CKA to its parent stays. `--small` takes 2 steps of a layer's
parameters, tunes each child 8 steps, and scores width by Taylor instead: KL would need a pass for each of 46,080 units.
Controls follow fixed paths with the same tuning: layers alone, width alone, and drawn ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hf_cka import prune
from hf_cka.pruning.config import PruningConfig
from hf_cka.training import RecoveryConfig
from recipes.reproduce.common import (
    Claim,
    Paper,
    Training,
    better,
    open_rows,
    open_study,
    over_seeds,
    parse,
    settled,
    shown,
    write_report,
)

PAPER = Paper(
    "pruning_everything",
    "Pruning everything, everywhere, all at once",
    "2506.04513",
    "its networks are ResNets on CIFAR-10, tuned in full for 10 epochs a child; here it is a language model and LoRA. "
    "Children are compared on calibration data, where the released code takes the test set.",
)
FULL = Training(RecoveryConfig("lora", rank=16), 3e-4, 16, 512, epochs=0.1)
SMALL = replace(FULL, batch_size=4, length=128, steps=8)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prune along the chosen path and along the controls', and judge."""
    options = parse(PAPER, __doc__, "HuggingFaceTB/SmolLM2-360M", arguments)
    training = settled(options, FULL, SMALL)
    study, rows = open_study(options, training.length, train="yahma/alpaca-cleaned"), open_rows(options)
    number, samples, length = (2, 16, 128) if options.small else (8, 64, 512)
    batches = study.batches(samples, length)

    def run(name: str, path: str, seed: int = 0) -> dict[str, float]:
        width = "taylor" if options.small else "kl"
        config = PruningConfig(method="everything", width_criterion=width, num_layers=number, path=path, seed=seed)

        def measure() -> dict[str, float]:
            result = prune(
                study.model, batches, config, progress=False, tune=lambda m: study.tuned(m, training, seed=seed)
            )
            return {**study.quality(result.model), "layers": len(result.plan.removed_layers)}

        return rows.get(name, measure)

    table = {
        "dense": rows.get("dense", lambda: study.quality(study.model)),
        "dense, tuned as long": rows.get("dense, tuned", lambda: study.dense_tuned(training.times(number))),
        "the child with the higher CKA": run("cka", "cka"),
        "layers alone": run("layers", "L" * number),
        "width alone": run("width", "G" * number),
        f"a drawn child, mean of {len(options.seeds)}": over_seeds(
            [run(f"random {s}", "random", s) for s in options.seeds]
        ),
    }
    dense, tuned, chosen, layers, width, drawn = table.values()
    claims = [
        Claim(
            "pruned networks are as good as the dense one (+0.96 to -1.36 points at 63 to 86 % of the FLOPs)",
            f"{shown(chosen)} at {chosen['removed']:.0%} of the parameters; dense {shown(dense)}, "
            f"tuned as long {shown(tuned)}",
            not better(tuned, chosen),
        ),
        Claim(
            "choosing between layers and width beats either alone",
            f"{shown(chosen)}; layers alone {shown(layers)}, width alone {shown(width)}, drawn {shown(drawn)}",
            better(chosen, layers) and better(chosen, width),
        ),
    ]
    settings = f"{number} steps, scored on {samples} x {length} tokens; each child: {training}."
    write_report(PAPER, options, settings, table, claims, ("removed", "layers", "perplexity", "spread", "accuracy"))


if __name__ == "__main__":
    main()
