"""Real models of four kinds, end to end: select, prune, save, reload, measure; and LoRA where CKA chooses the layers.

    python benchmarks/real_models.py --assets FOLDER [--models minilm mpnet vit whisper smollm2] [--output FILE]

Each model loses layers, sub-layers, heads and MLP units, chosen by hf_cka's default criterion of each, by magnitude and
by a draw with three seeds, and is measured before any training. Every pruned model is saved, loaded by its auto class
in a process that never saw it, and measured there; its output on one batch must equal, to the last bit, that of the
model in memory. Then adapters are trained for a few steps in all layers, the half that CKA chooses, and half at random.
Finished rows are kept in a JSON file, so that an interrupted benchmark goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import transformers
from real_kinds import KINDS, Kind
from safetensors.torch import load_file, save_file

from hf_cka import CKALoraConfig, PruningConfig, prune, save_pruned, select_layers
from hf_cka.data import load_processor
from hf_cka.evaluation import count_parameters
from hf_cka.lookup import lookup


def serve(kind: Kind, options: argparse.Namespace) -> None:
    """Load each folder that comes in by its auto class, compare its output, measure it."""
    transformers.logging.set_verbosity_error()
    for line in sys.stdin:
        folder = Path(line.strip())
        model = getattr(transformers, kind.auto).from_pretrained(folder, dtype=torch.float32).eval()
        probe = load_file(folder / "probe.safetensors")
        wanted = probe.pop("output")
        same = torch.equal(output_of(model, probe), wanted)
        answer = {"same": same, **kind.score(model, load_processor(folder), options)}
        print("ANSWER " + json.dumps(answer), flush=True)


class Reader:
    """A fresh process in which saved models are loaded and measured."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--serve", name, "--assets", str(options.assets)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def read(self, folder: Path) -> dict[str, Any]:
        """Whether the loaded model's output is the same, and its scores."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(folder, file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise RuntimeError(f"{folder} could not be loaded in a fresh process.")


def output_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits, or else the last hidden states."""
    model.eval()
    with torch.no_grad():
        output = model(**batch)
    return output.logits if "logits" in output else output.last_hidden_state


def kept(key: str, options: argparse.Namespace, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured before under this name, or is now: an interrupted benchmark goes on."""
    rows = json.loads(options.rows.read_text()) if options.rows.is_file() else {}
    if key not in rows:
        rows[key] = make()
        options.rows.parent.mkdir(parents=True, exist_ok=True)
        options.rows.write_text(json.dumps(rows, indent=1))
    return rows[key]


def measured(model: Any, processor: Any, batches: Any, reader: Reader) -> dict[str, Any]:
    """Save a model, and return what the fresh process finds in the folder."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "pruned"
        saved = save_pruned(model, folder, tokenizer=processor, verify=False)
        probe = {name: value[:2].clone() for name, value in batches[0].items() if name != "labels"}
        save_file({**probe, "output": output_of(model, probe).contiguous()}, folder / "probe.safetensors")
        return {"rung": saved.rung.name, "parameters": saved.parameters, **reader.read(folder)}


def pruned(name: str, kind: Kind, options: argparse.Namespace) -> Iterator[str]:
    """The table of one model, line by line."""
    model, processor = kind.load(options)
    model.eval()
    batches = kind.batches(model, processor, options)
    total = count_parameters(model).total
    start = time.perf_counter()
    selection = select_layers(model, batches, 0.5, progress=False)
    chosen = "; ".join(
        f"`{one.layers_path}` {', '.join(map(str, one.layers))}" for one in (selection, *selection.others)
    )
    yield f"`select_layers` keeps {chosen} ({time.perf_counter() - start:.1f} s on {batches.num_samples} samples)."
    yield ""
    with Reader(name, options) as reader:
        dense = kept(f"{name}, nothing", options, lambda: measured(model, processor, batches, reader))
        metrics = [key for key in dense if key not in ("rung", "parameters", "same")]
        yield "| removed | chosen by | parameters | " + " | ".join(metrics) + " | rung | reload | seconds |"
        yield "|---" * (6 + len(metrics)) + "|"
        yield line("nothing", "", [{**dense, "seconds": 0.0}], total, metrics)
        for cut in kind.cuts:
            found: dict[str, list[dict[str, Any]]] = {}
            for by, config in cut.configs():

                def make(config: PruningConfig = config) -> dict[str, Any]:
                    start = time.perf_counter()
                    result = prune(model, batches, config, progress=False)
                    seconds = time.perf_counter() - start
                    return {**measured(result.model, processor, batches, reader), "seconds": seconds}

                row = kept(f"{name}, {cut.what}, {config.criterion}, {config.seed}", options, make)
                found.setdefault(by or str(config.criterion), []).append(row)
            for by, rows in found.items():
                yield line(cut.what, by, rows, total, metrics)


def line(what: str, by: str, rows: Sequence[dict[str, Any]], total: int, metrics: Sequence[str]) -> str:
    """One row of a table; of several runs the mean and the range."""

    def several(values: Sequence[float], form: str) -> str:
        text = format(mean(values), form)
        return text if len(set(values)) == 1 else f"{text} ({min(values):{form}}-{max(values):{form}})"

    cells = [what, f"{by}, {len(rows)} seeds" if len(rows) > 1 else by]
    cells += [several([row["parameters"] / total for row in rows], ".3f")]
    cells += [several([row[name] for row in rows], ".1f") for name in metrics]
    cells += [", ".join(dict.fromkeys(row["rung"] for row in rows))]
    cells += ["equal" if all(row["same"] for row in rows) else "DIFFERENT"]
    return "| " + " | ".join([*cells, f"{mean(row['seconds'] for row in rows):.1f}"]) + " |"


def adapted(kind: Kind, options: argparse.Namespace) -> Iterator[str]:
    """The table of LoRA in all layers, half by CKA and half at random."""
    from peft import get_peft_model

    assert kind.train is not None
    score = kind.after or kind.score
    base, processor = kind.load(options)
    batches = kind.batches(base, processor, options)
    before = score(base.eval(), processor, options)
    yield f"LoRA (r=8), {kind.steps} steps, {kind.seeds} seed{'s: mean ± standard deviation' * (kind.seeds > 1)}."
    yield ""
    yield "| adapters in | trainable | " + " | ".join(before) + " | seconds a step |"
    yield "|---" * (3 + len(before)) + "|"
    yield "| none |  | " + " | ".join(f"{value:.2f}" for value in before.values()) + " |  |"
    everything = 0
    for criterion, ratio in (("all", 1.0), ("cka", 0.5), ("random", 0.5)):
        found: list[dict[str, float]] = []
        for seed in range(kind.seeds):
            model, _ = kind.load(options)
            torch.manual_seed(seed)
            config = CKALoraConfig(
                r=8, lora_alpha=16, keep_ratio=ratio, criterion=criterion, selection_seed=seed, calibration=batches
            )
            model = get_peft_model(model, config)
            start = time.perf_counter()
            train(model, kind.train(base, processor, options, seed), kind)
            seconds = (time.perf_counter() - start) / kind.steps
            trainable = count_parameters(model).trainable
            model = model.merge_and_unload().eval()
            found.append({**score(model, processor, options), "trainable": trainable, "seconds": seconds})
        everything = everything or int(found[0]["trainable"])
        shown = {"all": "all layers", "cka": "half by CKA", "random": "half at random"}[criterion]
        cells = [shown, f"{mean(f['trainable'] for f in found) / everything:.2f}"]
        for name in before:
            values = [f[name] for f in found]
            cells.append(f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else ""))
        yield "| " + " | ".join([*cells, f"{mean(f['seconds'] for f in found):.2f}"]) + " |"


def train(model: Any, losses: Iterator[Callable[[Any], torch.Tensor]], kind: Kind) -> None:
    """Adam with a linear decay over the steps."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=kind.rate)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, kind.steps)
    for _, loss in zip(range(kind.steps), losses, strict=False):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()


def main() -> None:
    """Prune, adapt and print, model by model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True, help="folder with glue/, lm/, audio/ and models/")
    parser.add_argument("--models", nargs="+", default=list(KINDS), help=f"some of {', '.join(KINDS)}")
    parser.add_argument("--output", type=Path, help="Markdown file; printed as well")
    parser.add_argument("--rows", type=Path, default=Path("runs/real_models.json"), help="finished rows, kept")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options.serve:
        serve(KINDS[options.serve], options)
        return
    kinds = {name: lookup(KINDS, name, "model") for name in options.models}
    done = sections(options.output)
    for name, kind in kinds.items():
        lines = [f"{kind.note} {torch.get_num_threads()} thread(s).", ""]
        print(f"## {kind.title}\n\n{lines[0]}\n", flush=True)
        for part in (pruned(name, kind, options), *((("",), adapted(kind, options)) if kind.train else ())):
            for text in part:
                print(text, flush=True)
                lines.append(text)
        print(flush=True)
        done[kind.title] = "\n".join(lines)
        if options.output:
            order = [each.title for each in KINDS.values() if each.title in done]
            options.output.write_text(INTRODUCTION + "".join(f"\n## {title}\n\n{done[title]}\n" for title in order))


INTRODUCTION = """# Real models of every kind, end to end

`python benchmarks/real_models.py --assets ASSETS --output FILE` (`--models` measures some of them again): what is
removed, who chose it, and what is left of the parameters and of the quality before any training. Rung: `stock` loads
with transformers alone, `hf_cka` with hf_cka or its remote code. Reload: whether the output of the saved model, loaded
by its auto class in a process that never saw it, equals that of the model in memory to the last bit; the quality is
measured there. Random: the mean, and in brackets the range. Seconds, of choosing and removing, and of a step of
training, are those of a CPU that others used as well. float32.
"""


def sections(file: Path | None) -> dict[str, str]:
    """Title -> text of the models that were measured before."""
    if file is None or not file.is_file():
        return {}
    parts = file.read_text().split("\n## ")[1:]
    return {title: text.strip() for title, _, text in (part.partition("\n") for part in parts)}


if __name__ == "__main__":
    main()
