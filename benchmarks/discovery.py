"""How long it takes, and how much memory, to find out what a model is made of.

    python benchmarks/discovery.py                       # configurations of the size people use, on the meta device
    python benchmarks/discovery.py --census FOLDER       # every model type that a census there builds, tiny

Each runs in a process of its own, on one thread; the memory is the growth of its peak during discovery.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_cka import find_anatomy

# name -> (model class, config class, what differs from the default sizes)
REAL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama-2 7B": ("LlamaForCausalLM", "LlamaConfig", {}),
    "Mistral 7B": ("MistralForCausalLM", "MistralConfig", {}),
    "Qwen2 7B": ("Qwen2ForCausalLM", "Qwen2Config", {}),
    "Gemma 7B": ("GemmaForCausalLM", "GemmaConfig", {}),
    "Mixtral 8x7B": ("MixtralForCausalLM", "MixtralConfig", {}),
    "Falcon-Mamba 7B": ("FalconMambaForCausalLM", "FalconMambaConfig", {"hidden_size": 4096, "num_hidden_layers": 64}),
    "T5 base": ("T5ForConditionalGeneration", "T5Config", {}),
    "BART large": ("BartForConditionalGeneration", "BartConfig", {}),
    "BERT base": ("BertForMaskedLM", "BertConfig", {}),
    "ViT base": ("ViTForImageClassification", "ViTConfig", {}),
    "ConvNeXt tiny": ("ConvNextForImageClassification", "ConvNextConfig", {}),
    "Whisper tiny": ("WhisperForConditionalGeneration", "WhisperConfig", {}),
    "wav2vec 2.0 base": ("Wav2Vec2ForCTC", "Wav2Vec2Config", {}),
}


def _real(name: str) -> Any:
    model, config, changes = REAL[name]
    with torch.device("meta"):
        return getattr(transformers, model)._from_config(getattr(transformers, config)(**changes))


def _tiny(folder: Path, name: str, model_type: str) -> Any:
    sys.path.insert(0, str(folder))
    import census

    return census.build(name, model_type)


def _measure(answer: Any, make: Any, *args: Any) -> None:
    torch.set_num_threads(1)
    try:
        model = make(*args)
    except Exception:
        answer.send(None)  # a type that the census cannot build
        return
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    try:
        anatomy = find_anatomy(model)
        found = f"{len(anatomy.stacks)} stacks, {sum(len(s.layers) for s in anatomy.stacks)} layers"
    except ValueError as error:
        found = str(error)[:80]
    seconds = time.perf_counter() - start
    answer.send((seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, found))


def measured(make: Any, *args: Any) -> tuple[float, float, str] | None:
    """Run one discovery in a fresh process.

    Returns:
        Seconds, MiB and what was found; None where the model cannot be built.
    """
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_measure, args=(theirs, make, *args))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        return float("inf"), 0.0, "the process ended"
    finally:
        process.join()


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--census", type=Path, help="a folder with a census.py that builds tiny models")
    parser.add_argument("--slowest", type=int, default=20, help="rows to print of a census")
    options = parser.parse_args()
    rows: list[tuple[str, float, float, str]] = []
    if options.census:
        sys.path.insert(0, str(options.census))
        import census
        from transformers.models.auto import modeling_auto

        for name, (_, table) in census.CLASSES.items():
            for model_type in getattr(modeling_auto, table):
                if found := measured(_tiny, options.census, name, model_type):
                    rows.append((f"{model_type} ({name})", *found))
                    print(*rows[-1][:3], file=sys.stderr, flush=True)
        rows.sort(key=lambda row: -row[1])
        over = sum(row[1] > 10 for row in rows)
        print(f"{len(rows)} tiny models: median {sorted(r[1] for r in rows)[len(rows) // 2]:.1f} s, {over} over 10 s,")
        print(f"most memory {max(r[2] for r in rows):.0f} MiB. The slowest {options.slowest}:\n")
        rows = rows[: options.slowest]
    else:
        rows = [(name, *found) for name in REAL if (found := measured(_real, name))]
    print("| model | seconds | MiB | found |\n|---|---:|---:|---|")
    for name, seconds, memory, found in rows:
        print(f"| {name} | {seconds:.1f} | {memory:.0f} | {found} |")


if __name__ == "__main__":
    main()
