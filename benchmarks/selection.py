"""What choosing layers costs: time over the plain forward passes, and memory over the model's own.

    python benchmarks/selection.py [--model FOLDER] [--samples 64] [--tokens 128] [--repeats 5]

Plain forward passes and selections alternate in one process, so that the machine's drift hits both alike; the ratio
printed is the median over the pairs. Two plain passes are timed: of the backbone alone (what the selection runs), and
of the whole model with its logits (what a script would run). Without --model the demo's SmolLM2-135M-Instruct is used.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from hf_cka import calibration, find_anatomy, select_layers
from hf_cka.cli.demo_assets import load_demo_model
from hf_cka.cli.demo_tasks import documentation_texts
from hf_cka.evaluation import peak_memory
from hf_cka.representations import forward


def _plain(run, batches) -> float:
    start = time.perf_counter()
    with torch.inference_mode():
        for batch in batches:
            run(batch)
    return time.perf_counter() - start


def _select(model, batches, **kwargs) -> float:
    start = time.perf_counter()
    select_layers(model, batches, progress=False, **kwargs)
    return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hub id or a folder")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    if options.model:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(options.model).eval()
        tokenizer, name = AutoTokenizer.from_pretrained(options.model), options.model
    else:
        model, tokenizer, name = load_demo_model()
    texts = documentation_texts("calibration")
    batches = calibration(texts, tokenizer, options.samples, options.tokens, batch_size=options.batch_size)
    anatomy = find_anatomy(model)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    print(f"{name}; {options.samples} samples, {tokens} tokens, {torch.get_num_threads()} threads\n")

    _plain(lambda batch: forward(anatomy, batch), batches[:2])
    cases = {"last token (default)": {}, "mean": {"pooling": "mean"}, "all tokens, streamed": {"pooling": "tokens"}}
    seconds: dict[str, list[float]] = {case: [] for case in cases}
    backbone: list[float] = []
    whole: list[float] = []
    for _ in range(options.repeats):
        backbone.append(_plain(lambda batch: forward(anatomy, batch), batches))
        for case, kwargs in cases.items():
            seconds[case].append(_select(model, batches, **kwargs))
        whole.append(_plain(lambda batch: model(**batch, use_cache=False), batches))

    with peak_memory() as plain_memory:
        _plain(lambda batch: forward(anatomy, batch), batches)
    print("| readout | seconds | over backbone forward | over whole-model forward | peak memory over the model's own |")
    print("|---|---|---|---|---|")
    over_whole = statistics.median(b / w for b, w in zip(backbone, whole, strict=True))
    added = plain_memory.added_bytes / 2**20
    print(
        f"| (plain backbone forward) | {statistics.median(backbone):.2f} | 1.00 | {over_whole:.2f} | {added:.0f} MiB |"
    )
    for case, kwargs in cases.items():
        with peak_memory() as memory:
            _select(model, batches, **kwargs)
        ratio = statistics.median(s / b for s, b in zip(seconds[case], backbone, strict=True))
        over_whole = statistics.median(s / w for s, w in zip(seconds[case], whole, strict=True))
        added = memory.added_bytes / 2**20
        print(f"| {case} | {statistics.median(seconds[case]):.2f} | {ratio:.2f} | {over_whole:.2f} | {added:.0f} MiB |")


if __name__ == "__main__":
    main()
