"""MoP (arXiv 2602.06127): a mixture of depth and width pruning along a random path, then one recovery.

    python -m recipes.reproduce.mop [--model meta-llama/Llama-2-7b-hf]
    python -m recipes.reproduce.mop --small --assets FOLDER [--bf16]

The depth branch takes the third-to-last layer, the width branch as many parameters by AMP; a draw keeps one of them
(three seeds). LoRA: rank 32, alpha 10, dropout 0.05, 2 epochs of alpaca-cleaned, learning rate 3e-4, batches of 16.
`--small` prunes 20 % instead of 40 and trains 30 steps of 4 x 128 tokens; decoding is timed at 40 % in both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from hf_cka import prune
from hf_cka.evaluation import measure_efficiency
from hf_cka.pruning.config import MOP_PATHS, PruningConfig
from hf_cka.training import RecoveryConfig
from recipes.reproduce.common import (
    Claim,
    Paper,
    Training,
    open_rows,
    open_study,
    over_seeds,
    parse,
    settled,
    shown,
    threads,
    write_report,
)

PAPER = Paper(
    "mop",
    "MoP: a mixture of pruners",
    "2602.06127",
    "the path by perplexity judges the children as they are, where the paper tunes a copy of each first.",
)
FULL = Training(RecoveryConfig("lora", rank=32, alpha=10, dropout=0.05), 3e-4, 16, 512)
SMALL = replace(FULL, batch_size=4, length=128, steps=30)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prune along random paths, by depth alone and by width alone; heal each alike; time decoding; judge."""
    options = parse(PAPER, __doc__, "meta-llama/Llama-2-7b-hf", arguments)
    training = settled(options, FULL, SMALL)
    study, rows = open_study(options, training.length, train="yahma/alpaca-cleaned"), open_rows(options)
    ratio = 0.2 if options.small else 0.4
    batches = study.batches(50, 128 if options.small else 512)
    depth = PruningConfig(criterion="third_to_last", protect=(-2, -1), ratio=ratio, reach="at_least")
    alone = {"depth only": depth, "width only": PruningConfig.paper("amp", ratio=ratio)}

    def measured(name: str, config: PruningConfig) -> dict[str, float]:
        return rows.get(name, lambda: study.healed(config, batches, training, seed=config.seed))

    drawn = [
        measured(f"mixture, seed {seed}", PruningConfig.paper("mop", ratio=ratio, seed=seed)) for seed in options.seeds
    ]
    table = {
        "dense": rows.get("dense", lambda: study.quality(study.model)),
        f"mixture, random path, mean of {len(drawn)}": over_seeds(drawn),
        "mixture, path by perplexity": measured(
            "by perplexity", PruningConfig.paper("mop", ratio=ratio, path="perplexity")
        ),
        **{name: measured(name, config) for name, config in alone.items()},
    }

    def latency() -> dict[str, float]:
        config = PruningConfig.paper("mop", ratio=0.4, path=2 * MOP_PATHS[0])
        models = {"dense": study.model, "pruned": prune(study.model, batches, config, progress=False).model}
        found = measure_efficiency(models, prompt_tokens=12, new_tokens=128, batch_sizes=(1,), progress=False)
        speeds = {name: cost.speeds[0] for name, cost in found.items()}
        return {name: s.prefill_seconds + 127 / s.tokens_per_second for name, s in speeds.items()}

    seconds = rows.get("latency at 40 %", latency)
    less = 1 - seconds["pruned"] / seconds["dense"]
    mixture, by_perplexity, deep, wide = list(table.values())[1:]
    claims = [
        Claim(
            "a mixture beats depth alone",
            f"{shown(mixture)} (± {mixture['spread']:.1f}) against {shown(deep)}",
            beats(mixture, deep),
        ),
        Claim(
            "a mixture beats width alone",
            f"{shown(mixture)} (± {mixture['spread']:.1f}) against {shown(wide)}",
            beats(mixture, wide),
        ),
        Claim(
            "a random path is as good as one by perplexity (60.83 ± 0.43 against 60.84)",
            f"{shown(mixture)} (perplexity ± {mixture['spread']:.1f}) against {shown(by_perplexity)} at "
            f"{by_perplexity['removed']:.1%} removed",
            beats(mixture, by_perplexity),
        ),
        Claim(
            "39 % less latency at 40 % (12 prompt tokens, 128 new ones, batch 1)",
            f"{less:.0%} less: {seconds['dense']:.2f} s to {seconds['pruned']:.2f} s ({threads()})",
            less >= 0.39,
        ),
    ]
    settings = f"{ratio:.0%} asked; {training}."
    write_report(
        PAPER, options, settings, table, claims, ("removed", "before healing", "perplexity", "spread", "accuracy")
    )


def beats(drawn: Mapping[str, float], other: Mapping[str, float]) -> bool | None:
    """Whether drawn paths have the lower perplexity; None within two of their standard deviations."""
    difference = other["perplexity"] - drawn["perplexity"]
    return None if abs(difference) <= 2 * drawn["spread"] else difference > 0


if __name__ == "__main__":
    main()
