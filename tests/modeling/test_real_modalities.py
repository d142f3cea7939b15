"""Real weights that are no decoder of text: pruned, saved and loaded they still see, hear and compare."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from benchmarks import real_weights
from hf_cka import CKALoraConfig, PruningConfig, calibration, find_anatomy, prune, save_pruned, select_layers
from hf_cka.data import decoder_start, load_processor, load_rows
from hf_cka.evaluation import classify_images, sentence_similarity, word_error_rate
from hf_cka.pruning.width_budgets import WidthSettings

pytestmark = pytest.mark.assets


def had(fetch: Callable[..., Any], *arguments: Any) -> Any:
    """What a function fetches, or a skip that says why not."""
    try:
        return fetch(*arguments)
    except RuntimeError as error:
        pytest.skip(f"not to be had here: {error}")


def output(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found = model.eval()(**{name: value for name, value in batch.items() if name != "labels"})
    return found.logits if "logits" in found else found.last_hidden_state


# ---- MiniLM ----


@pytest.fixture(scope="module")
def minilm(assets: Path) -> tuple[Any, Any, Any, list[Any]]:
    """The encoder, its tokenizer, calibration batches, and pairs of sentences with people's scores."""
    folder = had(real_weights.minilm)
    model, tokenizer = transformers.AutoModel.from_pretrained(folder), load_processor(folder)
    texts = [row["sentence1"] for row in load_rows(str(assets / "glue" / "stsb_train.jsonl"))][::100]
    rows = list(load_rows(str(assets / "glue" / "stsb_dev.jsonl")))[::10]
    return model, tokenizer, calibration(texts, tokenizer, 48, max_length=64), rows


def spearman(model: Any, tokenizer: Any, rows: list[Any]) -> float:
    return sentence_similarity(model, tokenizer, rows, progress=False).spearman


def test_minilm_without_a_layer_compares_sentences_and_loads_with_transformers_alone(minilm, tmp_path):
    model, tokenizer, batches, rows = minilm
    small = prune(model, batches, PruningConfig(num_layers=1), progress=False).model
    saved = save_pruned(small, tmp_path / "small", tokenizer=tokenizer)
    assert saved.rung.name == "stock"
    again = transformers.AutoModel.from_pretrained(tmp_path / "small")
    assert again.config.num_hidden_layers == 5
    assert torch.equal(output(again, batches[0]), output(small, batches[0]))
    dense = spearman(model, tokenizer, rows)
    by_weights = prune(model, [], PruningConfig(num_layers=1, criterion="magnitude"), progress=False).model
    left = spearman(again, tokenizer, rows)
    assert dense > 0.85
    assert left > dense - 0.04
    assert left > spearman(by_weights, tokenizer, rows)


# ---- the ViT ----


@pytest.fixture(scope="module")
def vit(assets: Path) -> tuple[Any, Any, Any, list[Any]]:
    """The classifier of garments, its image processor, calibration batches, and test pictures with labels."""
    folder = had(real_weights.vit, assets)
    model = transformers.AutoModelForImageClassification.from_pretrained(folder)
    processor = load_processor(folder)
    train = had(real_weights.fashion_mnist, "train", 64)
    rows = had(real_weights.fashion_mnist, "t10k", 1000)
    return model, processor, calibration(train, processor, 64, batch_size=32), rows


def accuracy(model: Any, processor: Any, rows: list[Any]) -> float:
    return classify_images(model, processor, rows, batch_size=100, progress=False).accuracy


def test_a_vit_without_layers_still_tells_garments_apart(vit, tmp_path):
    model, processor, batches, rows = vit
    dense = accuracy(model, processor, rows)
    small = prune(model, batches, PruningConfig(num_layers=2), progress=False).model
    saved = save_pruned(small, tmp_path / "small", tokenizer=processor, verify=False)
    assert saved.rung.name == "stock"
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "small")
    assert torch.equal(output(again, batches[0]), output(small, batches[0]))
    left = accuracy(again, load_processor(tmp_path / "small"), rows)
    drawn = [
        accuracy(prune(model, [], PruningConfig(num_layers=2, criterion="random", seed=seed)).model, processor, rows)
        for seed in range(3)
    ]
    assert dense > 0.85
    assert left > dense - 0.04
    assert left > sum(drawn) / len(drawn)


def test_a_vit_with_fewer_units_is_a_stock_checkpoint(vit, tmp_path):
    model, processor, batches, rows = vit
    config = PruningConfig(method="width", ratio=0.123, width=WidthSettings(structures="units"))
    small = prune(model, batches, config, progress=False).model
    assert save_pruned(small, tmp_path / "small", verify=False).rung.name == "stock"
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path / "small")
    assert again.config.intermediate_size == 192
    assert torch.equal(output(again, batches[0]), output(small, batches[0]))
    assert accuracy(again, processor, rows) > 0.8


# ---- Whisper ----


@pytest.fixture(scope="module")
def whisper(assets: Path) -> tuple[Any, Any, Any, list[Any]]:
    """The speech model, its processor, calibration batches (four short recordings), and the speech with its words."""
    folder = had(real_weights.whisper)
    model, processor = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(folder), load_processor(folder)
    rows = had(real_weights.sentences, "cards")
    start = decoder_start(model.config)
    batches = calibration(rows, processor, 4, batch_size=4, decoder_start_token_id=start)
    speech = [{"audio": str(assets / "audio" / "jfk.flac"), "text": real_weights.WORDS_OF_JFK}]
    return model, processor, batches, speech


def errors(model: Any, processor: Any, rows: list[Any]) -> float:
    return word_error_rate(model, processor, rows, progress=False, max_new_tokens=40).value


def test_whisper_writes_the_same_words_without_some_heads(whisper, tmp_path):
    model, processor, batches, speech = whisper
    assert errors(model, processor, speech) == 0
    width = WidthSettings(structures="heads")
    config = PruningConfig(method="width", ratio=0.0105, stack="encoder", width=width)  # one of six in every layer
    small = prune(model, batches, config, progress=False).model
    save_pruned(small, tmp_path / "small", tokenizer=processor, verify=False)
    again = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "small")
    assert {find_anatomy(again, "encoder").sizes(i).num_heads for i in range(4)} == {5}
    assert torch.equal(output(again, batches[0]), output(small, batches[0]))
    assert errors(again, load_processor(tmp_path / "small"), speech) == 0


def test_lora_of_whisper_is_chosen_in_both_towers(whisper):
    from peft import get_peft_model

    model, processor, batches, speech = whisper
    selection = select_layers(model, batches, 0.5, progress=False)
    towers = {one.layers_path: one.layers for one in (selection, *selection.others)}
    assert towers.keys() == {"model.encoder.layers", "model.decoder.layers"}
    adapted = get_peft_model(model, CKALoraConfig(r=4, keep_ratio=0.5, calibration=batches))
    inside = {name.partition(".lora_A")[0] for name, _ in adapted.named_parameters() if ".lora_A" in name}
    for path, layers in towers.items():
        found = {int(n.partition(f"{path}.")[2].partition(".")[0]) for n in inside if f"{path}." in n}
        assert found == set(layers)
    assert errors(adapted, processor, speech) == 0  # adapters begin as nothing
