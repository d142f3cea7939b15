"""What the scripts of this folder share: the command line, model and data, measuring, healing, and the verdicts.

Every script runs in two sizes. As it is, it has the settings of its paper, for a machine with a GPU and the Hub. With
``--small --assets FOLDER`` it runs SmolLM2-135M-Instruct (or ``--model``) on a CPU in minutes; training is then shorter
and the data are the local files of the folder. Finished rows are kept beside the report, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from datasets import Dataset

from hf_cka import calibration, prune, recover
from hf_cka.cli.demo_assets import load_demo_model
from hf_cka.data import load_rows, public_name, row_text
from hf_cka.evaluation import count_parameters, evaluate, multiple_choice, perplexity
from hf_cka.modeling.loading import load_model
from hf_cka.pruning.config import PruningConfig
from hf_cka.training import RecoveryConfig

FIVE_TASKS = ("piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge")
QUESTIONS = {"ARC-Easy": "arc_easy_test_a.jsonl", "PIQA": "piqa_valid_a.jsonl"}
# flags with a default: the others are in the report's command
DEFAULTS: dict[str, Any] = {"steps": None, "seeds": [0, 1, 2], "seed": 0, "items": 100, "tokens": 4096}
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Paper:
    """What is reproduced.

    Args:
        name: of the script.
        title: of the paper.
        arxiv: its number.
        differs: what the run on language models does not have from the paper, in a sentence or two.
    """

    name: str
    title: str
    arxiv: str
    differs: str


@dataclass(frozen=True)
class Training:
    """How a pruned model is tuned. With ``steps`` of -1 it is as many ``epochs``."""

    recovery: RecoveryConfig
    learning_rate: float
    batch_size: int
    length: int
    epochs: float = 2.0
    steps: int = -1

    def times(self, number: int) -> Training:
        """Return a training as long as so many of these."""
        return replace(self, steps=number * self.steps if self.steps >= 0 else -1, epochs=number * self.epochs)

    def __str__(self) -> str:
        recovery, long = self.recovery, f"{self.steps} steps" if self.steps >= 0 else f"{self.epochs:g} epochs"
        return (
            f"LoRA of rank {recovery.rank}, alpha {recovery.alpha:g}, dropout {recovery.dropout:g}; "
            f"{long} of {self.batch_size} x {self.length} tokens, learning rate {self.learning_rate:g}"
        )


@dataclass(frozen=True)
class Claim:
    """One claim of the paper, what was measured here, and whether it held; None where the data do not decide."""

    text: str
    measured: str
    held: bool | None


@dataclass(frozen=True)
class Study:
    """A loaded model and the data of a run."""

    options: argparse.Namespace
    model: Any
    tokenizer: Any
    prompts: Any
    train: Any
    text: list[int]
    questions: Mapping[str, list[dict[str, Any]]]

    def batches(self, samples: int, length: int) -> list[Any]:
        """Draw calibration batches from the prompts."""
        return calibration(self.prompts, self.tokenizer, samples, length, self.options.seed)

    def tuned(self, model: Any, training: Training, *, seed: int = 0) -> Any:
        """Tune a model on the training rows, in place, and return it merged."""
        return recover(
            model,
            self.train,
            training.recovery,
            processing_class=self.tokenizer,
            max_steps=training.steps,
            num_train_epochs=training.epochs,
            per_device_train_batch_size=training.batch_size,
            learning_rate=training.learning_rate,
            bf16=self.options.bf16,
            seed=seed,
            disable_tqdm=True,
        ).model.eval()

    def dense_tuned(self, training: Training) -> dict[str, float]:
        """Tune a copy of the dense model, and measure it: what the training alone gives."""
        return self.quality(self.tuned(copy.deepcopy(self.model), training))

    def rounds(
        self, config: PruningConfig, number: int, batches: Sequence[Any], training: Training, *, seed: int = 0
    ) -> Any:
        """Prune and tune, again and again; each round starts from what the one before left."""
        model = self.model
        for turn in range(number):
            one = replace(config, seed=1000 * seed + turn)
            model = self.tuned(prune(model, batches, one, progress=False).model, training, seed=seed)
        return model

    def healed(
        self, config: PruningConfig, batches: Sequence[Any], training: Training, *, seed: int = 0
    ) -> dict[str, float]:
        """Prune the dense model, tune what is left, and measure it; perplexity before tuning stands beside."""
        model = prune(self.model, batches, config, progress=False).model
        before = perplexity(model, None, self.text, context=512, progress=False).value
        return {**self.quality(self.tuned(model, training, seed=seed)), "before healing": before}

    def quality(self, model: Any) -> dict[str, float]:
        """Measure perplexity on WikiText-2 and the mean accuracy over the tasks, in percent."""
        found = perplexity(model, None, self.text, context=512, progress=False).value
        if self.options.small:
            parts = [
                multiple_choice(model, self.tokenizer, rows, progress=False).accuracy_bytes
                for rows in self.questions.values()
            ]
        else:
            results = evaluate(model, FIVE_TASKS, tokenizer=self.tokenizer).tasks
            parts = [result.metrics.get("acc_norm", result.metrics["acc"]) for result in results]
        removed = 1 - count_parameters(model).total / count_parameters(self.model).total
        row = {"removed": removed, "perplexity": found}
        return {**row, "accuracy": 100 * mean(parts)} if parts else row


class Rows:
    """Measured rows by name, kept in a file after each, as long as the settings are the same."""

    def __init__(self, file: Path, settings: Mapping[str, Any]) -> None:
        self.file, self.settings = file, dict(settings)
        kept = json.loads(file.read_text()) if file.is_file() else {}
        self.rows: dict[str, dict[str, Any]] = kept.get("rows", {}) if kept.get("settings") == self.settings else {}

    def get(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a row, measured now if it is not there yet."""
        if name not in self.rows:
            self.rows[name] = measure()
            self.file.parent.mkdir(parents=True, exist_ok=True)
            part = self.file.with_suffix(".part")
            part.write_text(json.dumps({"settings": self.settings, "rows": self.rows}, indent=1) + "\n")
            part.replace(self.file)
            shown = {
                key: round(value, 4) if isinstance(value, float) else value for key, value in self.rows[name].items()
            }
            print(f"{name}: {shown}", flush=True)
        return self.rows[name]


def parse(paper: Paper, doc: str | None, model: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line that all scripts have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="minutes on a CPU instead of the paper's size")
    parser.add_argument("--assets", type=Path, help="with --small: a folder with lm/, mc/, instruct/ and glue/")
    parser.add_argument("--model", help=f"a Hub id or a folder; {model}, or SmolLM2-135M-Instruct with --small")
    parser.add_argument("--steps", type=int, help="of every training, instead of the setting's own number")
    parser.add_argument("--seeds", type=int, nargs="+", help="of what is random (0 1 2)")
    parser.add_argument("--seed", type=int, help="of the calibration data (0)")
    parser.add_argument("--items", type=int, help="with --small: questions of each task (100)")
    parser.add_argument("--tokens", type=int, help="with --small: tokens of WikiText-2 (4096)")
    parser.add_argument("--bf16", action="store_true", help="train under bfloat16 autocast")
    parser.add_argument("--output", type=Path, help=f"report; results/{paper.name}.md with --small")
    parser.set_defaults(**DEFAULTS)
    options = parser.parse_args(arguments)
    if options.small and options.assets is None:
        parser.error("--small needs --assets: the folder with lm/, mc/, instruct/ and glue/.")
    options.model = options.model or (None if options.small else model)
    options.output = options.output or (RESULTS if options.small else Path("runs/reproduce")) / f"{paper.name}.md"
    return options


def settled(options: argparse.Namespace, full: Training, small: Training) -> Training:
    """Return the training of the size that was asked for, with the steps of the command line."""
    training = small if options.small else full
    return training if options.steps is None else replace(training, steps=options.steps)


def open_model(options: argparse.Namespace) -> tuple[Any, Any]:
    """Load the model of the command line and its tokenizer."""
    if options.model is None:
        model, tokenizer, _ = load_demo_model()
        return model, tokenizer
    return load_model(options.model, dtype="float32" if options.small else "bfloat16")


def open_study(options: argparse.Namespace, length: int, *, train: str, prompts: str = "") -> Study:
    """Load model and data: local files with ``--small``, else the named data sets of the Hub.

    Training rows are cut at ``length`` tokens.
    """
    model, tokenizer = open_model(options)
    if options.small:
        rows = json.loads((options.assets / "instruct" / "instruction_1100.json").read_text())
        data, source = Dataset.from_list(rows[:1000]), rows[1000:]
        text = (options.assets / "lm" / "wikitext2_valid.txt").read_text()
    else:
        data = load_rows(train)
        source = load_rows(prompts) if prompts else data
        text = "\n\n".join(load_rows("Salesforce/wikitext:wikitext-2-raw-v1", "test")["text"])

    def tokenized(row: dict[str, Any]) -> dict[str, list[int]]:
        return {"input_ids": tokenizer(row_text(row, tokenizer) + tokenizer.eos_token)["input_ids"][:length]}

    data = data.map(tokenized, remove_columns=data.column_names)
    ids = tokenizer(text, verbose=False)["input_ids"]
    return Study(
        options,
        model.eval(),
        tokenizer,
        source,
        data,
        ids[: options.tokens] if options.small else ids,
        {
            name: [
                json.loads(line) for line in (options.assets / "mc" / file).read_text().splitlines()[: options.items]
            ]
            for name, file in (QUESTIONS.items() if options.small and options.items else ())
        },
    )


def open_rows(options: argparse.Namespace) -> Rows:
    """Return the rows kept beside the report."""
    unread = ("assets", "output")
    settings = {key: value for key, value in vars(options).items() if key not in unread}
    settings["model"] = public_name(options.model)
    return Rows(options.output.with_suffix(".json"), settings)


def better(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether the first has the lower perplexity: on few questions accuracy cannot tell two models apart."""
    return first["perplexity"] < second["perplexity"]


def shown(row: Mapping[str, Any]) -> str:
    """Name a row's quality in words."""
    accuracy = f", {row['accuracy']:.1f} %" if "accuracy" in row else ""
    return f"{row['perplexity']:.1f}{accuracy}"


def over_seeds(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean of every number over the seeds, and the standard deviation of perplexity as ``spread``."""
    values = {key: mean(row[key] for row in rows) for key in rows[0]}
    return {**values, "spread": stdev([row["perplexity"] for row in rows]) if len(rows) > 1 else 0.0}


def write_report(
    paper: Paper,
    options: argparse.Namespace,
    settings: str,
    rows: Mapping[str, Mapping[str, Any]],
    claims: Sequence[Claim],
    columns: Sequence[str],
) -> None:
    """Print the paper's claims, what was measured, and whether they held; and write the same as Markdown."""
    name = public_name(options.model) or "SmolLM2-135M-Instruct"
    command = f"python -m recipes.reproduce.{paper.name}"
    command += " --small --assets FOLDER" if options.small else ""
    for flag, default in DEFAULTS.items():
        value = getattr(options, flag)
        if value != default:
            command += f" --{flag} {' '.join(map(str, value)) if isinstance(value, list) else value}"
    command += " --bf16" if options.bf16 else ""
    lines = [
        f"## {paper.title}",
        "",
        f"arXiv {paper.arxiv}, on {name}. `{command}`",
        "",
        settings,
        "",
        f"Not as in the paper: {paper.differs}",
        "",
        "| " + " | ".join(["model", *columns]) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for label, row in rows.items():
        lines.append("| " + " | ".join([label, *(_cell(row.get(column), column) for column in columns)]) + " |")
    lines += ["", "| the paper says | measured here | held |", "|---|---|---|"]
    words = {True: "yes", False: "no", None: "undecided"}
    lines += [f"| {claim.text} | {claim.measured} | {words[claim.held]} |" for claim in claims]
    text = "\n".join(lines) + "\n"
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text)
    print(text)


def _cell(value: Any, column: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    if column == "removed":
        return f"{value:.1%}"
    return f"{value:.3g}" if abs(value) < 10 or abs(value) >= 10_000 else f"{value:.1f}"


def threads() -> str:
    """Say what training and timing ran on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} thread(s)"
