"""Pruning before any recovery: methods x ratios x seeds, with the controls always in the table.

    python benchmarks/pruning.py --assets FOLDER [--ratios 0.105 0.211 0.3] [--methods ...] [--seeds 0 1 2]

Quality is measured on texts and questions that no method saw: perplexity on the first tokens of WikiText-2's
validation part (calibration uses later text of the same file) and on TinyStories (none of it is calibrated with),
accuracy on ARC-Easy and PIQA. Every finished row is kept in a JSON file, so that an interrupted run goes on. Without
--model the demo's SmolLM2-135M-Instruct is used.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_cka.cli.demo_assets import load_demo_model
from hf_cka.data import public_name
from hf_cka.evaluation import count_parameters, decode_speed, multiple_choice, peak_memory, perplexity
from hf_cka.lookup import lookup
from hf_cka.pruning.config import PruningConfig
from hf_cka.pruning.pruners import prune
from hf_cka.pruning.width_budgets import WidthSettings

UNITS = WidthSettings(structures="units")
# The test text is the start of the file; nothing before this token is ever calibrated with.
FIRST_CALIBRATION_TOKEN = 20_000


def _width(criterion: str, **more: Any) -> Callable[[float, int], PruningConfig]:
    return lambda ratio, seed: PruningConfig(
        **{"method": "width", "criterion": criterion, "ratio": ratio, "seed": seed, "width": UNITS, **more}
    )


def _depth(criterion: str, **more: Any) -> Callable[[float, int], PruningConfig]:
    return lambda ratio, seed: PruningConfig(
        **{"method": "depth", "criterion": criterion, "ratio": ratio, "seed": seed, **more}
    )


# name -> (config for a ratio and a seed, calibration rows, tokens a row)
METHODS: dict[str, tuple[Callable[[float, int], PruningConfig], int, int]] = {
    # controls, always in the table
    "random units": (_width("random"), 2, 16),
    "random layers": (_depth("random"), 2, 16),
    "magnitude": (_width("magnitude"), 2, 16),
    "last layers": (_depth("last"), 2, 16),
    "block influence": (_depth("block_influence", steps=1), 24, 128),
    # depth
    "cka, one layer at a time": (_depth("cka"), 24, 128),
    "cka, biased, last token (paper)": (
        lambda ratio, seed: PruningConfig.paper("cka", ratio=ratio, seed=seed, rescore="lazy"),
        24,
        128,
    ),
    "consensus": (_depth("consensus", steps=1), 24, 128),
    "block influence + least squares": (_depth("block_influence", steps=1, repair="least_squares"), 56, 256),
    "block influence + linear map": (_depth("block_influence", steps=1, repair="linear_map"), 56, 256),
    # width
    "amp": (_width("amp"), 56, 256),
    "amp, heads and units (paper)": (_width("amp", width=WidthSettings(rule="proportional")), 56, 256),
    "wanda": (_width("wanda"), 56, 256),
    "flap, global": (_width("flap", budget="global"), 56, 256),
    "taylor": (_width("taylor"), 56, 256),
    "amp, reversed": (_width("amp", order="reversed"), 56, 256),
    "random units + least squares": (_width("random", repair="least_squares"), 56, 256),
    "amp + least squares": (_width("amp", repair="least_squares"), 56, 256),
    "wanda + least squares": (_width("wanda", repair="least_squares"), 56, 256),
    "wanda by layer importance + least squares": (
        _width("wanda", budget="importance", repair="least_squares"),
        56,
        256,
    ),
    "obs, global + least squares": (_width("obs", budget="global", repair="least_squares"), 56, 256),
    "obs, global + least squares, more text": (_width("obs", budget="global", repair="least_squares"), 224, 256),
    # mixtures
    "mop, random path (paper)": (
        lambda ratio, seed: PruningConfig.paper("mop", ratio=ratio, seed=seed),
        24,
        128,
    ),
    "mop, cka path": (
        lambda ratio, seed: PruningConfig(
            method="mop", criterion="block_influence", path="cka", ratio=ratio, seed=seed, width=UNITS
        ),
        24,
        128,
    ),
}
CONTROLS = ("random units", "random layers", "magnitude", "last layers", "block influence")
SEEDED = ("random units", "random layers", "random units + least squares", "mop, random path (paper)")
TEXTS = ("WikiText-2", "TinyStories")
QUESTIONS = {"ARC-Easy": "arc_easy_test_a.jsonl", "PIQA": "piqa_valid_a.jsonl"}


def measure(
    row: dict[str, Any], model: Any, dense: Any, tokenizer: Any, data: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """Return the row with what is still missing in it: parameters, perplexities, accuracies, decoding speed."""
    row = {**row, "parameters": count_parameters(model).total, "non_embedding": count_parameters(model).non_embedding}
    for name in TEXTS:
        if name not in row:
            row[name] = perplexity(model, None, data[name], context=512, batch_size=2, progress=False).value
    if row.get("items", 0) < options.items:
        for name in QUESTIONS:
            row[name] = multiple_choice(model, tokenizer, data[name], progress=False).accuracy_bytes
        row["items"] = options.items
    # dense and pruned alternate, so that a shared machine's drift hits both
    speeds = []
    for _ in range(options.repeats):
        for which in (dense, model):
            speeds.append(
                decode_speed(which, prompt_tokens=32, new_tokens=16, repeats=1, progress=False).tokens_per_second
            )
    ratios = sorted(after / before for before, after in zip(speeds[::2], speeds[1::2], strict=True))
    row["decode"] = ratios[len(ratios) // 2]
    return row


def load_data(tokenizer: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Read the texts and questions, and cut the calibration text off the test text."""
    lm, mc = options.assets / "lm", options.assets / "mc"
    wiki = tokenizer((lm / "wikitext2_valid.txt").read_text(), verbose=False)["input_ids"]
    stories = [json.loads(line)["text"] for line in (lm / "tinystories_a.jsonl").read_text().splitlines()[:200]]
    data: dict[str, Any] = {
        "WikiText-2": wiki[: options.tokens],
        "TinyStories": tokenizer("\n".join(stories), verbose=False)["input_ids"][: options.tokens // 2],
        "calibration": wiki[FIRST_CALIBRATION_TOKEN:],
    }
    if options.tokens > FIRST_CALIBRATION_TOKEN:
        raise SystemExit(f"--tokens must stay below {FIRST_CALIBRATION_TOKEN}, where the calibration text begins.")
    for name, file in QUESTIONS.items():
        data[name] = [json.loads(line) for line in (mc / file).read_text().splitlines()[: options.items]]
    return data


def calibration_batches(data: dict[str, Any], rows: int, tokens: int) -> list[dict[str, torch.Tensor]]:
    """Cut consecutive rows out of the calibration text."""
    ids = torch.tensor(data["calibration"][: rows * tokens]).view(rows, tokens)
    return [{"input_ids": part} for part in ids.split(8)]


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the finished rows, whole or not at all: an interruption loses none of the earlier ones."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(rows, indent=1) + "\n")
    part.replace(file)


def table(rows: Sequence[dict[str, Any]], dense: dict[str, Any], ratios: Sequence[float], options: Any) -> str:
    """Return the rows as Markdown, one table a ratio, best WikiText-2 perplexity first."""
    questions = [name for name in QUESTIONS if name in dense]
    head = ["method", "removed", *(f"{name} ppl" for name in TEXTS), *questions, "decode", "seconds", "peak MiB"]
    lines = [
        f"{public_name(options.model) or 'SmolLM2-135M-Instruct'}, float32, no recovery, "
        f"{torch.get_num_threads()} thread(s). Removed: of all;",
        f"perplexity: {options.tokens} tokens of WikiText-2, {options.tokens // 2} of TinyStories, context 512; "
        + (f"accuracy: {options.items} questions each; " if questions else "")
        + "decode: tokens per second over the dense model's, alternating.",
        "Seconds and peak memory (added by the pruning) on a shared machine. Several seeds: mean (range).",
        "",
        f"`python benchmarks/pruning.py --assets ASSETS --items {options.items} --seeds "
        f"{' '.join(map(str, options.seeds))}`; rows are kept in `pruning.json`, and `--methods` and `--ratios` choose "
        "which to add.",
        "",
        "Dense: "
        + ", ".join([*(f"{name} {dense[name]:.2f}" for name in TEXTS), *(f"{q} {dense[q]:.2f}" for q in questions)])
        + ".",
    ]
    for ratio in ratios:
        lines += ["", f"### {ratio:.1%} asked", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        here: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if row["ratio"] == ratio:
                here.setdefault(row["method"], []).append(row)
        for method, group in sorted(here.items(), key=lambda item: min(row["WikiText-2"] for row in item[1])):
            cells = [method, f"{1 - group[0]['parameters'] / dense['parameters']:.1%}"]
            cells += [cell([row[name] for row in group], "{:.1f}") for name in TEXTS]
            cells += [cell([row[name] for row in group if name in row], "{:.2f}") for name in questions]
            cells += [cell([row["decode"] for row in group], "{:.2f}")]
            cells += [cell([row[key] for row in group], "{:.0f}") for key in ("seconds", "peak")]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def cell(values: Sequence[float], form: str) -> str:
    """Return the mean, with the range if there are several values; what is too large for its form is shortened."""
    if not values:
        return ""
    form = "{:.3g}" if max(values) >= 10_000 else form
    mean = form.format(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ({form.format(min(values))}-{form.format(max(values))})"


def plot(rows: Sequence[dict[str, Any]], dense: dict[str, Any], path: Path) -> None:
    """Draw perplexity over removed parameters, one panel a text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(TEXTS), figsize=(11, 5), constrained_layout=True)
    for axis, text in zip(axes, TEXTS, strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            points: dict[float, list[float]] = {}
            for row in rows:
                if row["method"] == method:
                    points.setdefault(1 - row["parameters"] / dense["parameters"], []).append(row[text])
            x = [0.0, *sorted(points)]
            y = [dense[text], *(sum(points[p]) / len(points[p]) for p in sorted(points))]
            axis.plot(x, y, marker="o", label=method, linestyle="--" if method in CONTROLS else "-")
        axis.set(yscale="log", xlabel="removed parameters / all", ylabel="perplexity", title=text)
        axis.set_ylim(top=dense[text] * 200)
    axes[-1].legend(fontsize=7)
    figure.savefig(path)


def main() -> None:
    """Measure what is missing, and write the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True, help="folder with lm/ and mc/")
    parser.add_argument("--model", help="a folder or Hub id instead of the demo's model")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), help="besides the controls")
    parser.add_argument("--ratios", nargs="*", type=float, default=[0.105, 0.211, 0.3, 0.4])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=4096, help="of the first test text")
    parser.add_argument("--items", type=int, default=100, help="questions of each kind; 0 for none")
    parser.add_argument("--repeats", type=int, default=3, help="of the decoding speed")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    for name in options.methods:
        lookup(METHODS, name, "method of this benchmark")

    if options.model:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    else:
        model, tokenizer, _ = load_demo_model()
    data = load_data(tokenizer, options)
    options.output.mkdir(parents=True, exist_ok=True)
    cache = options.output / "pruning.json"
    kept = [row for row in (json.loads(cache.read_text()) if cache.exists() else []) if row["tokens"] == options.tokens]
    done = {(row["method"], row["ratio"], row["seed"]): row for row in kept}

    def keep(row: dict[str, Any]) -> None:
        done[row["method"], row["ratio"], row["seed"]] = row
        write_rows(cache, list(done.values()))
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True)

    def started(method: str, ratio: float, seed: int) -> dict[str, Any] | None:
        """The row as far as it is there, or None if nothing is missing in it."""
        new = {"method": method, "ratio": ratio, "seed": seed, "tokens": options.tokens}
        row = done.get((method, ratio, seed), new)
        return None if "decode" in row and row.get("items", 0) >= options.items else row

    if (row := started("dense", 0.0, 0)) is not None:
        keep(measure(row, model, model, tokenizer, data, options))
    for ratio in options.ratios:
        for method in dict.fromkeys((*options.methods, *CONTROLS)):
            for seed in options.seeds if method in SEEDED else options.seeds[:1]:
                if (row := started(method, ratio, seed)) is None:
                    continue
                make, rows, tokens = METHODS[method]
                batches, start = calibration_batches(data, rows, tokens), time.perf_counter()
                with peak_memory() as memory:
                    result = prune(model, batches, make(ratio, seed), progress=False)
                row |= {"seconds": time.perf_counter() - start, "peak": memory.added_bytes / 2**20}
                keep(measure(row, result.model, model, tokenizer, data, options))
    dense = done["dense", 0.0, 0]
    rows = [row for row in done.values() if row["method"] != "dense"]
    ratios = sorted({row["ratio"] for row in rows})
    (options.output / "pruning.md").write_text(table(rows, dense, ratios, options))
    plot(rows, dense, options.output / "pruning.png")
    print(table(rows, dense, ratios, options))


if __name__ == "__main__":
    main()
