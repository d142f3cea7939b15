"""What the commands load: the processor that a model's folder holds, and batches of the model's kind."""

from __future__ import annotations

import pytest
import torch

from hf_cka.cli import options
from hf_cka.data import parts_of
from tests.media import pictures, tiny_vit, tiny_whisper, vit_processor, wav, write
from tests.tiny import tiny_model, tiny_tokenizer


def _load(folder, model, processor):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return options.load_model(str(folder), "cpu")


def test_a_model_of_pictures_gets_pictures_and_its_labels(tmp_path):
    model, processor = _load(tmp_path / "vit", tiny_vit(("dog", "cat")), vit_processor())
    assert type(model).__name__ == "ViTForImageClassification"
    batches = options.load_calibration(str(write(tmp_path / "pets.zip", pictures(2))), processor, model, batch_size=2)
    assert batches.source == "pets.zip"
    assert torch.cat([batch["labels"] for batch in batches]).tolist().count(1) == 2
    with torch.no_grad():
        assert model(**batches[0]).loss.isfinite()


def test_a_speech_model_gets_sound_and_what_its_decoder_reads(tmp_path):
    model, processor = _load(tmp_path / "whisper", *tiny_whisper())
    assert type(model).__name__ == "WhisperForConditionalGeneration"
    folder = write(tmp_path / "sounds", {"a.wav": wav(300), "b.wav": wav(400)})
    (batch,) = options.load_calibration(str(folder), processor, model)
    assert batch["decoder_input_ids"].tolist() == [[1], [1]]
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()


def test_a_model_of_text_gets_what_it_always_got(tmp_path):
    (tmp_path / "a.txt").write_text("w1 w2\n\nw3\n")
    model, processor = _load(tmp_path / "bert", tiny_model("bert", "classification"), tiny_tokenizer())
    assert parts_of(processor).tokenizer is processor
    (batch,) = options.load_calibration(str(tmp_path / "a.txt"), processor, model)
    assert batch.keys() == {"input_ids", "attention_mask"}


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        options.load_model(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="is no model: it has no config.json"):
        options.load_model(str(tmp_path / "empty"))
    tiny_vit().save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="Unknown dtype 'float31'"):
        options.load_model(str(tmp_path / "vit"), dtype="float31")
    with pytest.warns(UserWarning, match="holds no image processor"):
        options.load_model(str(tmp_path / "vit"))
