"""Dense against pruned: file size, resident memory, prefill and decode speed, each as a ratio within one run.

    python benchmarks/structure.py [--model FOLDER] [--dtype float32] [--output DIR]

For each removed share (20, 40 and 60 % of the non-embedding parameters) a model is pruned in two ways: whole layers
(a stock checkpoint) and a mixture of layers, attention, MLP units and KV groups (the hf_cka rung). Every model is
saved and measured in a fresh process of its own, in turn with the dense model there; the median of the paired ratios
counts, and their range is given. The control is the dense model against itself. Decoding multiplies by the whole
vocabulary at every step, which no pruning here changes: `decode_flops` counts it, `non_embedding` (which the target
goes by) does not. What is removed is chosen by position, not by a criterion: speed and size do not depend on which.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from hf_cka.data import public_name

SHARES = (0.2, 0.4, 0.6)


def depth_plan(config: Any, share: float) -> Any:
    """Whole layers, evenly spread, never the first or the last."""
    from hf_cka import PruningPlan

    count = round(share * config.num_hidden_layers)
    inner = range(1, config.num_hidden_layers - 1)
    removed = sorted({inner[round(k * (len(inner) - 1) / max(count - 1, 1))] for k in range(count)})
    return PruningPlan(num_layers=config.num_hidden_layers, model_type=config.model_type, removed_layers=tuple(removed))


def mixed_plan(config: Any, share: float) -> Any:
    """A third of the share in layers, the rest in attention, KV groups and MLP units of the others."""
    from hf_cka import PruningPlan

    layers = config.num_hidden_layers
    removed = depth_plan(config, share / 3).removed_layers
    rest = [i for i in range(layers) if i not in removed]
    inner = 1 - (1 - share) / (1 - len(removed) / layers)  # to be removed from each of the others
    attention = [i for i in rest if i % 4 == 1][: round(inner * len(rest) / 2)]
    groups = max(1, round((1 - inner) * config.num_key_value_heads))
    units = max(64, round((1 - inner) * config.intermediate_size / 64) * 64)
    return PruningPlan(
        num_layers=layers,
        model_type=config.model_type,
        removed_layers=removed,
        removed_attention=tuple(attention),
        kept_groups={i: range(groups) for i in rest if i not in attention and groups < config.num_key_value_heads},
        kept_units={i: range(units) for i in rest},
    )


def measure(folder: str, dense: str, options: argparse.Namespace) -> dict[str, Any]:
    """In a fresh process: resident memory of each model, and how long each takes, in turn on the same inputs."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from hf_cka.evaluation.running import cache_reader

    models: dict[str, Any] = {}
    found: dict[str, Any] = {}
    for name, path in (("pruned", folder), ("dense", dense)):
        # everything that is imported or allocated on first use, before the weights come
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
        before = _resident()
        models[name] = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
        for tensor in (*models[name].parameters(), *models[name].buffers()):
            tensor.data = tensor.data.clone()  # out of the file mapping, into memory that counts
        found[f"{name}_resident"] = float(_resident() - before)
    vocabulary = models["dense"].config.vocab_size
    ids = torch.randint(5, vocabulary, (1, options.prefill), generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {}
    cache_of = {name: cache_reader(model) for name, model in models.items()}
    with torch.no_grad():
        for number in range(options.rounds + 1):
            # the other one first every second time, so that a drift of the machine favours neither
            for name in sorted(models, reverse=bool(number % 2)):
                start = time.perf_counter()
                cache = cache_of[name](models[name](ids, use_cache=True, logits_to_keep=1))
                middle = time.perf_counter()
                for step in range(options.decode):
                    token = ids[:, step : step + 1]
                    models[name](token, use_cache=True, logits_to_keep=1, **cache)
                end = time.perf_counter()
                if number:  # the first round warms up
                    times.setdefault(f"{name}_prefill", []).append((middle - start) / options.prefill)
                    times.setdefault(f"{name}_decode", []).append((end - middle) / options.decode)
    for phase in ("prefill", "decode"):
        pairs = zip(times[f"pruned_{phase}"], times[f"dense_{phase}"], strict=True)
        found[f"{phase}_time"] = [pruned / dense for pruned, dense in pairs]
        found[f"dense_{phase}"] = 1 / min(times[f"dense_{phase}"])
    return found


def _resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("This benchmark reads resident memory from /proc/self/status, which this system lacks.")


def in_fresh_process(folder: Path, dense: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run `measure` in a process of its own."""
    sizes = [f"--{name}={getattr(options, name)}" for name in ("prefill", "decode", "rounds")]
    command = [sys.executable, __file__, "--measure", str(folder), "--model", str(dense), *sizes]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    if done.returncode:
        raise RuntimeError(f"measuring {folder} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _load(source: str | None, dtype: torch.dtype) -> Any:
    if source is None:
        from hf_cka.cli.demo_assets import load_demo_model

        return load_demo_model()[0].to(dtype)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype)


def main() -> None:
    """Prune, save, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint; SmolLM2-135M-Instruct by default")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--prefill", type=int, default=256)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="folder for structure.md and structure.json")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.model, options)))
        return

    from hf_cka import PruningPlan, apply_plan, save_pruned

    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        model = _load(options.model, getattr(torch, options.dtype))
        save_pruned(model, root / "dense", verify=False)
        config = model.config
        price = PruningPlan(config.num_hidden_layers, config.model_type).price(model, options.prefill)
        cases: list[dict[str, Any]] = [
            {"name": "nothing (control)", "folder": root / "dense", "rung": "", "price": price}
        ]
        for share in SHARES:
            for name, make in (("layers", depth_plan), ("mixed", mixed_plan)):
                plan = make(config, share)
                model = _load(str(root / "dense"), getattr(torch, options.dtype))
                price = plan.price(model, options.prefill)
                folder = root / f"{name}{share}"
                saved = save_pruned(apply_plan(model, plan), folder, verify=False)
                cases.append({"name": f"{share:.0%} {name}", "folder": folder, "rung": saved.rung.name, "price": price})

        def size(folder: Path) -> int:
            return sum(file.stat().st_size for file in folder.glob("*.safetensors"))

        runs = []
        for case in cases:
            before, after, folder = case["price"].before, case["price"].after, case["folder"]
            print(f"measuring {folder.name}", file=sys.stderr, flush=True)
            run = in_fresh_process(folder, root / "dense", options)
            runs.append(run)
            rows.append(
                {
                    "removed": case["name"],
                    "rung": case["rung"],
                    "parameters": after.parameters / before.parameters,
                    "file": size(folder) / size(root / "dense"),
                    "resident": run["pruned_resident"] / run["dense_resident"],
                    "non_embedding": after.non_embedding_parameters / before.non_embedding_parameters,
                    "decode_flops": after.decode_flops / before.decode_flops,
                    "prefill_time": run["prefill_time"],
                    "decode_time": run["decode_time"],
                }
            )
        dense = {
            "resident": statistics.median(run["dense_resident"] for run in runs),
            "prefill": max(run["dense_prefill"] for run in runs),
            "decode": max(run["dense_decode"] for run in runs),
        }
    report(rows, dense, options)


def report(rows: list[dict[str, Any]], dense: dict[str, float], options: argparse.Namespace) -> None:
    """Print the table and whether the targets are met; write it if a folder was given."""
    ratios = ("parameters", "file", "resident", "non_embedding", "decode_flops")
    times = ("prefill_time", "decode_time")
    head = ("removed", "rung", *ratios, *times, "targets")
    command = f"benchmarks/structure.py --rounds {options.rounds} --prefill {options.prefill} --decode {options.decode}"
    model = public_name(options.model) or "SmolLM2-135M-Instruct"
    lines = [
        "# Structure: dense against pruned",
        "",
        f"{model}, {options.dtype}, {torch.get_num_threads()} thread(s) on a shared machine, `python {command}`.",
        "",
        f"Dense: {dense['resident'] / 1e6:.0f} MB resident, prefill {dense['prefill']:.0f} and decode "
        f"{dense['decode']:.1f} tokens/s at {options.prefill} tokens. Below: pruned / dense; of times (below 1 is "
        f"faster) the median and the range of {options.rounds} paired rounds.",
        "",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
    ]
    for row in rows:
        median = {key: statistics.median(row[key]) for key in times}
        missed = [key for key in ("file", "resident") if abs(row[key] - row["parameters"]) > 0.02]
        missed += ["decode_time"] if median["decode_time"] > row["non_embedding"] + 0.05 else []
        row["missed"] = missed
        cells = [row["removed"], row["rung"], *(f"{row[key]:.3f}" for key in ratios)]
        cells += [f"{median[key]:.2f} ({min(row[key]):.2f}-{max(row[key]):.2f})" for key in times]
        lines.append("| " + " | ".join([*cells, f"missed: {', '.join(missed)}" if missed else "met"]) + " |")
    lines += [
        "",
        "Targets: file and resident memory within 2 points of the parameters, decode time within 5 of the "
        "non-embedding parameters. Every step multiplies by the whole vocabulary, which no pruning here changes, so "
        "the time follows `decode_flops` instead.",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "structure.md").write_text(text)
        (options.output / "structure.json").write_text(json.dumps({"dense": dense, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
