"""What sharing the prefix saves when every layer of SmolLM2 is left out once, and lazy scoring in a greedy run.

    python benchmarks/leave_one_out.py [--samples 16] [--tokens 24] [--rounds 2] [--remove 8] [--threads 1]
                                       [--output benchmarks/results/leave_one_out.md]

Leave-one-out of all 30 layers: the engine (one pass, candidates fork from it) against the plain loop (one forward pass
for each candidate, the removed layer skipped, no head), rounds interleaved, the best of each taken. Both give the same
readouts to the last bit, which is checked. Greedy removal of 8 layers by debiased CKA, scored again after each: lazily
against in full, once each; whether both remove the same layers is printed. CPU seconds of the process, which other
processes disturb less than the wall clock; wall seconds beside them. The text is CPython's own documentation.
"""

from __future__ import annotations

import argparse
import platform
import pydoc_data.topics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_cka import PruningConfig, calibration, prune
from hf_cka.anatomy import find_anatomy
from hf_cka.cli.demo_assets import load_demo_model
from hf_cka.pruning.criteria import ScoringContext, Structure
from hf_cka.pruning.criteria.leave_one_out import LeftOut, leave_one_out
from hf_cka.representations import Pooling


def timed(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return what a call gives, its CPU seconds and its wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    value = call()
    return value, time.process_time() - cpu, time.perf_counter() - wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--remove", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    model, tokenizer, source = load_demo_model()
    texts = [text for text in pydoc_data.topics.topics.values() if len(text) > 40 * arguments.tokens]
    batches = calibration(texts, tokenizer, arguments.samples, arguments.tokens, batch_size=arguments.samples)
    anatomy = find_anatomy(model)
    context = ScoringContext(model, anatomy, batches, Pooling("mean", skip_first=4))
    layers = [Structure("layer", i) for i in range(anatomy.num_layers)]

    best: dict[str, tuple[float, float]] = {}
    results: dict[str, LeftOut] = {}
    for _ in range(arguments.rounds):
        for name, shared in (("shared prefix", True), ("plain loop", False)):
            results[name], cpu, wall = timed(lambda shared=shared: leave_one_out(context, layers, shared=shared))
            best[name] = min(best.get(name, (cpu, wall)), (cpu, wall))
            print(f"{name}: {cpu:.1f} CPU s, {wall:.1f} s", flush=True)
    same = all(map(torch.equal, results["shared prefix"].readouts, results["plain loop"].readouts))

    greedy: dict[str, Any] = {}
    for how in ("full", "lazy"):
        config = PruningConfig(num_layers=arguments.remove, rescore=how)
        greedy[how], cpu, wall = timed(lambda config=config: prune(model, batches, config, progress=False))
        best[how] = cpu, wall
        print(f"{how}: {cpu:.1f} CPU s, {wall:.1f} s, {greedy[how].plan.removed_layers}", flush=True)
    calls = {how: sum(step.layer_calls for step in result.history.steps) for how, result in greedy.items()}
    calls |= {name: result.layer_calls for name, result in results.items()}

    rows = [
        "| what | CPU s | wall s | layer calls | ratio of CPU s | target | same result |",
        "|---|---|---|---|---|---|---|",
    ]
    for title, name, against, target, equal in (
        (f"leave out each of {anatomy.num_layers} layers", "shared prefix", "plain loop", 0.6, same),
        (f"remove {arguments.remove} layers", "lazy", "full", 0.5, greedy["lazy"].plan == greedy["full"].plan),
    ):
        rows.append(
            f"| {title}: {against} | {best[against][0]:.1f} | {best[against][1]:.1f} | {calls[against]} | 1 | | |"
        )
        rows.append(
            f"| {title}: {name} | {best[name][0]:.1f} | {best[name][1]:.1f} | {calls[name]} | "
            f"**{best[name][0] / best[against][0]:.3f}** | {target} | {'yes' if equal else 'NO'} |"
        )
    command = (
        f"python benchmarks/leave_one_out.py --samples {arguments.samples} --tokens {arguments.tokens} "
        f"--rounds {arguments.rounds} --remove {arguments.remove} --threads {arguments.threads}"
    )
    report = "\n".join(
        [
            "# Leave-one-out",
            "",
            f"`{command}`",
            "",
            f"{source}; {arguments.samples} samples of {arguments.tokens} tokens, readout: mean without the first 4. "
            f"torch {torch.__version__}, {platform.machine()}, {arguments.threads} thread(s).",
            "",
            *rows,
            "",
        ]
    )
    print(report)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(report)


if __name__ == "__main__":
    main()
