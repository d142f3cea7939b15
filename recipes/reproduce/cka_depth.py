"""CKA layer pruning (arXiv 2405.17081): remove the layer whose absence changes the readout least, tune, repeat.

    python -m recipes.reproduce.cka_depth [--model HuggingFaceTB/SmolLM2-1.7B]
    python -m recipes.reproduce.cka_depth --small --assets FOLDER [--bf16]

Scores are 1 - CKA (biased) between the readouts of the current model with and without a layer; the network after
tuning is the next reference. `--small` removes 3 layers with 10 steps of LoRA after each. Controls remove as many
layers with as much tuning: by perplexity, by block influence, at random; and the dense model is tuned as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

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
    "cka_depth",
    "CKA layer pruning",
    "2405.17081",
    "its networks are ResNets on CIFAR-10 and ImageNet, tuned in full; here it is a language model and LoRA.",
)
FULL = Training(RecoveryConfig("lora", rank=16), 3e-4, 16, 512, epochs=0.1)
SMALL = replace(FULL, batch_size=4, length=128, steps=10)
CRITERIA = {
    "CKA": PruningConfig.paper("cka", num_layers=1),
    "perplexity": PruningConfig.paper("sleb", num_layers=1),
    "block influence": PruningConfig.paper("shortgpt", num_layers=1),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Prune in rounds by CKA and by the controls, and judge."""
    options = parse(PAPER, __doc__, "HuggingFaceTB/SmolLM2-1.7B", arguments)
    training = settled(options, FULL, SMALL)
    study, rows = open_study(options, training.length, train="yahma/alpaca-cleaned"), open_rows(options)
    rounds, samples, length = (3, 24, 128) if options.small else (8, 128, 512)

    batches = study.batches(samples, length)

    def run(name: str, config: PruningConfig, seed: int = 0) -> dict[str, float]:
        return rows.get(name, lambda: study.quality(study.rounds(config, rounds, batches, training, seed=seed)))

    random = PruningConfig(criterion="random", num_layers=1)
    table = {
        "dense": rows.get("dense", lambda: study.quality(study.model)),
        "dense, tuned as long": rows.get("dense, tuned", lambda: study.dense_tuned(training.times(rounds))),
        **{name: run(name, config) for name, config in CRITERIA.items()},
        f"random, mean of {len(options.seeds)}": over_seeds([run(f"random {s}", random, s) for s in options.seeds]),
    }
    dense, tuned, cka, *controls = table.values()
    best = min(controls, key=lambda row: row["perplexity"])
    claims = [
        Claim(
            "pruned and tuned networks lose next to nothing (-0.66 to +1.25 points at 38 to 79 % of the FLOPs)",
            f"{shown(cka)}; dense {shown(dense)}, tuned as long {shown(tuned)}",
            not better(tuned, cka),
        ),
        Claim(
            "at equal cost CKA keeps more than other criteria",
            f"{shown(cka)}; the best control {shown(best)}, random {shown(controls[-1])}",
            better(cka, best),
        ),
    ]
    settings = f"{rounds} layers, one a round, scored on {samples} x {length} tokens; after each: {training}."
    write_report(PAPER, options, settings, table, claims, ("removed", "perplexity", "spread", "accuracy"))


if __name__ == "__main__":
    main()
