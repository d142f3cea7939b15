"""Which learning rate heals: every way of recovery at three of them, in a few steps, on a model that lost layers.

    python benchmarks/learning_rates.py --assets FOLDER --bf16

What `hf_cka.training.recovery.LEARNING_RATES` rests on; 2e-5 and 5e-5, meant for all weights, are what TRL and the
Trainer take where none is given. Perplexity is that of held-out rows of the training text. Short runs on a small model
favour high rates, so the defaults stay below the best of these.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

from pruning import METHODS, calibration_batches, load_data
from recovery import training_rows

from hf_cka.cli.demo_assets import load_demo_model
from hf_cka.evaluation import perplexity
from hf_cka.pruning.pruners import prune
from hf_cka.training import recover
from hf_cka.training.recovery import LEARNING_RATES

RATES = {"lora": (2e-5, 2e-4, 1e-3), "norms": (2e-4, 2e-3, 1e-2), "full": (2e-5, 5e-5, 2e-4)}
HELD_OUT = 12


def main() -> None:
    """Prune once, train each way at each rate, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True, help="folder with lm/, mc/ and instruct/")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--length", type=int, default=128, help="tokens a row")
    parser.add_argument("--bf16", action="store_true", help="train under bfloat16 autocast")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    options.tokens, options.items = 2, 0  # of the test text and the questions, which this benchmark leaves alone

    dense, tokenizer, _ = load_demo_model()
    data = load_data(tokenizer, options)
    rows = training_rows(tokenizer, data, 0, options)
    held_out = [token for row in rows[:HELD_OUT] for token in row["input_ids"]]
    make, number, tokens = METHODS["block influence"]
    pruned = prune(dense, calibration_batches(data, number, tokens), make(0.2, 0), progress=False).model

    def measured(model: object) -> float:
        return perplexity(model, None, held_out, context=options.length, progress=False).value

    command = f"python benchmarks/learning_rates.py --assets ASSETS{' --bf16' if options.bf16 else ''}"
    lines = [
        "# Learning rates of recovery",
        "",
        f"`{command}`; SmolLM2-135M-Instruct, 20 % removed in layers by block influence; {options.steps} steps of "
        f"{options.batch_size} x {options.length} tokens, one seed. Before: {measured(pruned):.1f}.",
        "",
        "| method | learning rate | default | held-out perplexity |",
        "|---|---:|---|---:|",
    ]
    for method, rates in RATES.items():
        for rate in rates:
            healed = recover(
                copy.deepcopy(pruned),
                rows[HELD_OUT:],
                method,
                max_steps=options.steps,
                per_device_train_batch_size=options.batch_size,
                learning_rate=rate,
                warmup_steps=1,
                bf16=options.bf16,
                disable_tqdm=True,
            ).model.eval()
            chosen = "yes" if rate == LEARNING_RATES[method] else ""
            lines.append(f"| {method} | {rate:g} | {chosen} | {measured(healed):.1f} |")
            print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "learning_rates.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
