"""LoRA in all layers, or in the half that a criterion chooses: trainable parameters, quality, step time and memory.

    python benchmarks/lora_selection.py --task sst2 --assets FOLDER --bf16
    python benchmarks/lora_selection.py --task instruct --assets FOLDER --bf16

`sst2` classifies SST-2 sentences with an encoder (MiniLM; quality is the accuracy on the development set), `instruct`
follows instructions with SmolLM2-135M-Instruct (quality is the loss of 100 held-out responses). Both train as a user
would: `select_layers`, `LoraConfig(**selection.lora_kwargs())`, `get_peft_model`, `Trainer` or `SFTTrainer`. Every run
is a fresh process, because memory that an earlier run left to the allocator would hide its peak. Finished runs are
kept in a JSON file, so that an interrupted benchmark goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_cka.lookup import lookup


@dataclass(frozen=True)
class Variant:
    """Which layers get adapters, and of which rank.

    Args:
        criterion: of `select_layers`.
        keep_ratio: share of the layers.
        times_rank: rank over that of the other variants.
    """

    criterion: str
    keep_ratio: float = 0.5
    times_rank: int = 1


REFERENCE = "all layers"
VARIANTS = {
    REFERENCE: Variant("all", 1.0),
    "CKA half": Variant("cka"),
    "random half": Variant("random"),
    "first half": Variant("first"),
    "last half": Variant("last"),
    "block influence half": Variant("block_influence"),
    "CKA half, twice the rank": Variant("cka", times_rank=2),
}
# task -> (what quality is, higher is better, default number of steps)
TASKS = {"sst2": ("accuracy, %", True, 200), "instruct": ("response loss", False, 25)}
RANK = 8
CALIBRATION_SAMPLES = 128


def step_times() -> Any:
    """Return a callback of the Trainer that notes the seconds of every step.

    On a CPU they are the processor's, which a busy machine changes less than the clock's.
    """
    from transformers import TrainerCallback

    clock = time.perf_counter if torch.accelerator.is_available() else time.process_time

    class StepTimes(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = clock()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(clock() - self.start)

    return StepTimes()


def adapted(model: Any, tokenizer: Any, texts: Sequence[Any], name: str, task_type: str, options: Any) -> Any:
    """The model with adapters where the variant wants them; a selection by data is made once and kept."""
    from peft import LoraConfig, get_peft_model

    from hf_cka import LayerSelection, calibration, select_layers

    variant = VARIANTS[name]
    kept = Path(options.output) / f"{options.task}-{variant.criterion}"
    by_data = variant.criterion in ("cka", "block_influence")
    if by_data and (kept / "cka_selection.json").is_file():
        selection = LayerSelection.load(kept)
    else:
        batches = calibration(texts, tokenizer, CALIBRATION_SAMPLES, max_length=128) if by_data else None
        selection = select_layers(
            model, batches, variant.keep_ratio, criterion=variant.criterion, seed=options.seed, progress=False
        )
        if by_data:
            kept.mkdir(parents=True, exist_ok=True)
            selection.save(kept)
    rank = RANK * variant.times_rank
    torch.manual_seed(options.seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, task_type=task_type, **selection.lora_kwargs())
    return get_peft_model(model, config)


def arguments(options: Any, batch_size: int, learning_rate: float) -> dict[str, Any]:
    """What both trainers are told."""
    return {
        "output_dir": str(Path(options.output) / "trainer"),
        "max_steps": options.steps,
        "per_device_train_batch_size": batch_size,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, options.steps // 20),
        "seed": options.seed,
        "bf16": options.bf16,
        "use_cpu": not torch.accelerator.is_available(),
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def sst2(name: str, options: Any) -> dict[str, Any]:
    """Classify SST-2 sentences with the encoder."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed

    set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.encoder)
    model = AutoModelForSequenceClassification.from_pretrained(options.encoder, num_labels=2, dtype=torch.float32)
    rows = {part: read(Path(options.assets) / "glue" / f"sst2_{part}.jsonl") for part in ("train", "dev")}
    model = adapted(model, tokenizer, [row["sentence"] for row in rows["train"]], name, "SEQ_CLS", options)

    def encoded(part: str) -> Dataset:
        return Dataset.from_list(
            [
                {**tokenizer(row["sentence"], truncation=True, max_length=128), "label": row["label"]}
                for row in rows[part]
            ]
        )

    times = step_times()
    trainer = Trainer(
        model,
        TrainingArguments(**arguments(options, 16, 1e-3), per_device_eval_batch_size=32),
        train_dataset=encoded("train"),
        processing_class=tokenizer,
        callbacks=[times],
    )
    result = trained(trainer, times)
    answers = trainer.predict(encoded("dev"))
    result["quality"] = float(100 * (answers.predictions.argmax(-1) == answers.label_ids).mean())
    return result


def instruct(name: str, options: Any) -> dict[str, Any]:
    """Follow instructions with SmolLM2: 1,000 to learn from, 100 held out."""
    from datasets import Dataset
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    from hf_cka.cli.demo_assets import load_demo_model
    from hf_cka.evaluation import completion_loss

    set_seed(options.seed)
    model, tokenizer, _ = load_demo_model()
    rows = json.loads((Path(options.assets) / "instruct" / "instruction_1100.json").read_text())
    rows = [
        {"prompt": f"{row['instruction']}\n{row['input']}".strip() + "\n\n", "completion": row["output"]}
        for row in rows
    ]
    train, held_out = rows[:1000], rows[1000:]
    model = adapted(model, tokenizer, [row["prompt"] + row["completion"] for row in train], name, "CAUSAL_LM", options)
    times = step_times()
    trainer = SFTTrainer(
        model,
        # without checkpointing: its second forward pass costs the same wherever the adapters are
        SFTConfig(**arguments(options, 6, 5e-4), max_length=256, gradient_checkpointing=False),
        train_dataset=Dataset.from_list(train),
        processing_class=tokenizer,
        callbacks=[times],
    )
    result = trained(trainer, times)
    merged = trainer.model.merge_and_unload()
    with torch.autocast(next(merged.parameters()).device.type, torch.bfloat16, enabled=options.bf16):
        result["quality"] = completion_loss(merged, tokenizer, held_out, batch_size=10, progress=False).value
    return result


def trained(trainer: Any, times: Any) -> dict[str, Any]:
    """Train, and return what that cost."""
    from hf_cka.evaluation import peak_memory

    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    with peak_memory() as memory:
        trainer.train()
    # the first steps fill caches
    seconds = statistics.median(times.seconds[min(2, len(times.seconds) - 1) :])
    return {"trainable": trainable, "seconds": seconds, "added_bytes": memory.added_bytes, "peak": memory.peak_bytes}


RUNS = {"sst2": sst2, "instruct": instruct}


def read(file: Path) -> list[dict[str, Any]]:
    """The rows of a jsonl file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def table(task: str, runs: dict[str, dict[str, Any]], options: Any) -> str:
    """The runs of one task as a Markdown section."""
    what, higher, _ = TASKS[task]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    for seed in options.seeds:
        for name in VARIANTS:
            if key(task, name, seed, options) in runs:
                found[name].append(runs[key(task, name, seed, options)])
    found = {name: rows for name, rows in found.items() if rows}
    base = found[REFERENCE]
    lines = [
        f"| adapters | trainable parameters | {what} ({'higher' if higher else 'lower'} is better) | step time | "
        "memory added by training | peak memory of the process |",
        "|---|---|---|---|---|---|",
    ]
    spread = {name: statistics.stdev([r["quality"] for r in rows]) if rows[1:] else 0.0 for name, rows in found.items()}
    mean = {name: statistics.mean(r["quality"] for r in rows) for name, rows in found.items()}
    for name, rows in found.items():
        ratios = [
            statistics.median(row[field] for row in rows) / statistics.median(row[field] for row in base)
            for field in ("trainable", "seconds", "added_bytes", "peak")
        ]
        lines.append(
            f"| {name} | {rows[0]['trainable']:,} ({ratios[0]:.2f}) | {mean[name]:.3f} ± {spread[name]:.3f} | "
            f"{ratios[1]:.2f} | {ratios[2]:.2f} | {ratios[3]:.2f} |"
        )
    close = [
        name
        for name in found
        if name != "CKA half" and abs(mean[name] - mean["CKA half"]) <= spread[name] + spread["CKA half"]
    ]
    return "\n".join([*lines, "", absolute(base), "", verdict(len(base), close)])


def absolute(rows: Sequence[dict[str, Any]]) -> str:
    """What the ratios are of."""
    seconds, added = (statistics.median(row[field] for row in rows) for field in ("seconds", "added_bytes"))
    return f"All layers: {seconds:.2f} s a step, {added / 2**20:.0f} MiB added."


def verdict(seeds: int, close: Sequence[str]) -> str:
    """Which differences the seeds can carry."""
    if seeds < 2:
        return "One seed cannot tell these apart."
    if not close:
        return f"Over {seeds} seeds every row differs from CKA half by more than the two standard deviations added."
    return (
        f"{seeds} seeds do not separate CKA half from {', '.join(close)}: the means differ by less than the two "
        "standard deviations added."
    )


def key(task: str, name: str, seed: int, options: Any) -> str:
    """What a run is kept under: everything that its numbers depend on."""
    return f"{task}, {name}, seed {seed}, {options.steps} steps, {'bf16' if options.bf16 else 'fp32'}"


def main() -> None:
    """Run what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="sst2", help="sst2 or instruct")
    parser.add_argument("--assets", required=True, help="folder with glue/ and instruct/")
    parser.add_argument("--encoder", default="sentence-transformers/all-MiniLM-L6-v2", help="a Hub id or a folder")
    parser.add_argument("--steps", type=int, help="by default 200 (sst2) or 25 (instruct)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--bf16", action="store_true", help="train and evaluate under bfloat16 autocast")
    parser.add_argument("--output", default="runs/lora_selection", help="folder of the finished runs")
    parser.add_argument("--table", help="Markdown file to write the table to, instead of printing it")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # one run, in the process that the benchmark starts for it
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.steps = options.steps or lookup(TASKS, options.task, "task")[2]
    if options.run:
        print("\n" + json.dumps(RUNS[options.task](options.run, options)))
        return

    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "runs.json"
    runs: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else {}
    # seed by seed, so that the machine's drift hits every variant alike
    for seed in options.seeds:
        for name in VARIANTS:
            wanted = key(options.task, name, seed, options)
            if wanted not in runs:
                start = time.perf_counter()
                command = [sys.executable, __file__, *sys.argv[1:], "--run", name, "--seed", str(seed)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                runs[wanted] = json.loads(done.stdout.splitlines()[-1])
                file.write_text(json.dumps(runs, indent=1))
                print(f"{wanted}: {runs[wanted]} ({time.perf_counter() - start:.0f} s)", flush=True)
    text = table(options.task, runs, options)
    if options.table is None:
        print(text)
        return
    shown = " ".join(["python benchmarks/lora_selection.py", "--task", options.task, "--assets FOLDER"])
    shown += f" --steps {options.steps}" + (" --bf16" if options.bf16 else "")
    heading = f"## {options.task}: {options.steps} steps, {len(options.seeds)} seeds\n\n`{shown}`, {versions()}\n\n"
    target = Path(options.table)
    old = target.read_text() if target.is_file() else INTRODUCTION
    # a section of the same task is replaced
    sections = [s for s in old.split("\n## ") if not s.startswith(f"{options.task}:")]
    target.write_text("\n## ".join([*(s.rstrip() + "\n" for s in sections), heading[3:] + text + "\n"]))


INTRODUCTION = """# LoRA in the layers that a criterion chooses

Mean and standard deviation of the quality over the seeds (each draws the adapters, the order of the data, and the
random half anew; the layers by CKA and block influence come from 128 training samples, once). Step time and memory are
medians over the seeds, as ratios to adapters in all layers; time is that of the processor where training runs on a CPU.
Memory is resident memory, sampled in a fresh process for every run: what training adds to the loaded model, and the
peak of the whole process. Choosing the layers, one forward pass over the 128 samples, is not counted.
"""


def versions() -> str:
    """What the numbers were measured with."""
    import peft
    import transformers

    libraries = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    return f"{libraries}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
