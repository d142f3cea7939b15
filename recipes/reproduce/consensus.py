"""Consensus (arXiv 2411.14345): eight dissimilarities vote which layer to remove; tune, repeat.

    python -m recipes.reproduce.consensus [--model HuggingFaceTB/SmolLM2-1.7B]
    python -m recipes.reproduce.consensus --small --assets FOLDER [--bf16]

Measured beside quality, as in the paper: cost in operations and energy (with codecarbon, if it is installed), and
robustness: next-token accuracy after contexts with typos, other casing and dropped words. `--small` removes 3 layers
with 10 steps of LoRA after each; CKA alone and random layers are treated the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from statistics import mean
from typing import Any

from hf_cka.data import row_text
from hf_cka.evaluation import count_flops, generation_energy, robustness
from hf_cka.pruning.config import PruningConfig
from recipes.reproduce.cka_depth import FULL, SMALL
from recipes.reproduce.common import (
    Claim,
    Paper,
    Study,
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
    "consensus",
    "Consensus: layer pruning by a vote of similarity metrics",
    "2411.14345",
    "its networks are image classifiers, tuned in full, under image corruptions and attacks; here it is a language "
    "model, LoRA, and damaged text. Without class labels the Gaussian metrics are unconditional.",
)
CRITERIA = {
    "consensus": PruningConfig.paper("consensus", num_layers=1),
    "CKA alone": PruningConfig.paper("cka", num_layers=1),
}


def measure(study: Study, model: Any, texts: Sequence[str]) -> dict[str, float]:
    """Measure quality, robustness and cost."""
    rows = robustness(model, study.tokenizer, texts, rates=(0.1,), max_context=64, max_continuation=32, progress=False)
    clean, *damaged = rows
    found = {
        **study.quality(model),
        "clean, % of tokens": 100 * clean.accuracy,
        "damaged, % of tokens": 100 * mean(row.accuracy for row in damaged),
        "GFLOPs a token": count_flops(model).decode / 1e9,
    }
    if find_spec("codecarbon"):
        found["mJ a token"] = 1000 * generation_energy(model, new_tokens=64).joules_per_token
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Prune in rounds by the vote, by CKA alone and at random, and judge."""
    options = parse(PAPER, __doc__, "HuggingFaceTB/SmolLM2-1.7B", arguments)
    training = settled(options, FULL, SMALL)
    study, rows = open_study(options, training.length, train="yahma/alpaca-cleaned"), open_rows(options)
    rounds, samples, length = (3, 24, 128) if options.small else (8, 128, 512)
    texts = [row_text(study.prompts[i], study.tokenizer) for i in range(min(64, len(study.prompts)))]

    batches = study.batches(samples, length)

    def run(name: str, config: PruningConfig, seed: int = 0) -> dict[str, float]:
        return rows.get(name, lambda: measure(study, study.rounds(config, rounds, batches, training, seed=seed), texts))

    random = PruningConfig(criterion="random", num_layers=1)
    table = {
        "dense": rows.get("dense", lambda: measure(study, study.model, texts)),
        **{name: run(name, config) for name, config in CRITERIA.items()},
    }
    drawn = [run(f"random {seed}", random, seed) for seed in options.seeds]
    table[f"random, mean of {len(drawn)}"] = over_seeds(drawn)
    dense, voted, alone, chance = table.values()
    gained = voted["damaged, % of tokens"] - dense["damaged, % of tokens"]
    fewer = 1 - voted["GFLOPs a token"] / dense["GFLOPs a token"]
    claims = [
        Claim(
            "pruning by the vote makes networks more robust, by up to 4 points",
            f"{gained:+.1f} points on damaged text, and "
            f"{voted['clean, % of tokens'] - dense['clean, % of tokens']:+.1f} on clean text",
            gained > 0,
        ),
        Claim(
            "the vote keeps more than one metric alone",
            f"{shown(voted)}; CKA alone {shown(alone)}, random {shown(chance)}",
            better(voted, alone),
        ),
    ]
    if "mJ a token" in voted:
        saved = 1 - voted["mJ a token"] / dense["mJ a token"]
        claims.append(
            Claim(
                "energy falls nearly as much as operations do (-67 % at -79 %)",
                f"{saved:.0%} less energy at {fewer:.0%} fewer operations (codecarbon; of the whole machine)",
                saved >= 0.67 / 0.788 * fewer,
            )
        )
    settings = f"{rounds} layers, one a round, scored on {samples} x {length} tokens; after each: {training}."
    columns = [column for column in chance if column != "spread"]
    write_report(PAPER, options, settings, table, claims, columns)


if __name__ == "__main__":
    main()
