"""AMP (arXiv 2504.21174): attention heads and MLP units by activation magnitude, one shot, healed by LoRA.

    python -m recipes.reproduce.amp [--model meta-llama/Llama-2-7b-hf]
    python -m recipes.reproduce.amp --small --assets FOLDER [--bf16]

50 instructions score heads and units, the same share goes in every layer, then LoRA: rank 8, alpha 16, dropout 0.05,
all linear layers, 2 epochs, learning rate 3e-4, batches of 16 x 512 tokens. `--small` removes 13.2 %, which is as much
as two of SmolLM2's three KV groups hold, because heads alone cannot give 30 % there, and trains 30 steps of 4 x 128.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from hf_cka import prune
from hf_cka.evaluation import measure_efficiency
from hf_cka.pruning.config import PruningConfig
from hf_cka.pruning.width_budgets import WidthSettings
from hf_cka.training import RecoveryConfig
from recipes.reproduce.common import (
    Claim,
    Paper,
    Training,
    better,
    open_rows,
    open_study,
    parse,
    settled,
    shown,
    threads,
    write_report,
)

PAPER = Paper(
    "amp",
    "AMP: attention heads and MLP pruning",
    "2504.21174",
    "whole KV groups go where heads share them; the local prompts of `--small` are not Alpaca's.",
)
FULL = Training(RecoveryConfig("lora", rank=8, alpha=16, dropout=0.05), 3e-4, 16, 512)
SMALL = replace(FULL, batch_size=4, length=128, steps=30)
VARIANTS = {
    "heads and MLP": ("both", "normal"),
    "MLP only": ("units", "normal"),
    "heads only": ("heads", "normal"),
    "heads and MLP, reversed": ("both", "reversed"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Prune four ways, heal each alike, and judge."""
    options = parse(PAPER, __doc__, "meta-llama/Llama-2-7b-hf", arguments)
    training = settled(options, FULL, SMALL)
    study = open_study(options, training.length, train="yahma/alpaca-cleaned", prompts="tatsu-lab/alpaca")
    rows, ratio = open_rows(options), 0.132 if options.small else 0.3
    batches = study.batches(50, 128 if options.small else 512)

    def config(structures: str, order: str, share: float) -> PruningConfig:
        width = WidthSettings(structures=structures, rule="proportional" if structures == "both" else "exact")
        return PruningConfig.paper("amp", ratio=share, width=width, order=order)

    table = {"dense": rows.get("dense", lambda: study.quality(study.model))}
    for name, variant in VARIANTS.items():
        table[name] = rows.get(name, partial(study.healed, config(*variant, ratio), batches, training))

    def speed() -> dict[str, float]:
        models = {
            "dense": study.model,
            "pruned": prune(study.model, batches, config("both", "normal", 0.2), progress=False).model,
        }
        found = measure_efficiency(models, prompt_tokens=12, new_tokens=128, batch_sizes=(1,), progress=False)
        rates = {name: cost.speeds[0].tokens_per_second for name, cost in found.items()}
        return {"times": rates["pruned"] / rates["dense"]}

    times = rows.get("decoding, 20 % removed", speed)["times"]
    both, units, heads, backwards = (table[name] for name in VARIANTS)
    claims = [
        Claim(
            "at 30 %, heads with MLP (61.02) beat MLP only (56.93), and MLP only beats heads only (37.63)",
            f"perplexity, accuracy: {shown(both)}; {shown(units)}; {shown(heads)}",
            better(both, units) and better(units, heads),
        ),
        Claim(
            "removing the most important instead costs more than 25 points",
            f"{shown(both)} against {shown(backwards)}, dense {shown(table['dense'])}"
            + ("; perplexity decides: so near to chance there are no 25 points to lose" if options.small else ""),
            better(both, backwards) if options.small else both["accuracy"] - backwards["accuracy"] > 25,
        ),
        Claim("1.19 to 1.25 times as fast at 20 %", f"{times:.2f} times ({threads()})", times >= 1.19),
    ]
    settings = f"{ratio:.1%} asked, scored on 50 prompts; {training}."
    write_report(PAPER, options, settings, table, claims, ("removed", "before healing", "perplexity", "accuracy"))


if __name__ == "__main__":
    main()
