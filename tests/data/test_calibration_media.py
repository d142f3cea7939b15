"""Calibration with pictures and recordings: the right keys, the same samples, and nothing of what cannot be read."""

import numpy as np
import pytest
import torch

import hf_cka
from hf_cka.data import batch_digests, load_rows
from tests.media import (
    ctc_processor,
    pictures,
    png,
    sounds,
    tiny_ctc,
    tiny_listener,
    tiny_vit,
    tiny_whisper,
    vit_processor,
    wav,
    write,
)


def _digests(batches):
    return sorted(digest for batch in batches for digest in batch_digests(batch))


def test_the_samples_of_pictures_do_not_depend_on_the_batch_size(tmp_path):
    rows = load_rows(str(write(tmp_path / "pets.zip", pictures(4))))
    one, three = (hf_cka.calibration(rows, vit_processor(), 6, batch_size=size) for size in (1, 3))
    assert [batch["pixel_values"].shape for batch in three] == [(3, 3, 16, 16)] * 2
    assert _digests(one) == _digests(three)
    assert len(set(_digests(one))) == 6
    assert _digests(one) != _digests(hf_cka.calibration(rows, vit_processor(), 6, seed=1))
    assert three.num_samples == 6
    assert three[0].keys() == {"pixel_values"}


def test_datasets_with_features_need_no_decoder_of_their_own(tmp_path):
    """Audio features decode with torchcodec, which is not needed here."""
    from datasets import Audio, Dataset, Image
    from transformers import Wav2Vec2FeatureExtractor

    folder = write(tmp_path / "files", {"a.png": png(1), "b.png": png(2), "a.wav": wav(300), "b.wav": wav(400)})
    seen = Dataset.from_dict({"photo": [str(folder / f"{n}.png") for n in "ab"]}).cast_column("photo", Image())
    (batch,) = hf_cka.calibration(seen, vit_processor())
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    heard = Dataset.from_dict({"clip": [str(folder / f"{n}.wav") for n in "ab"]}).cast_column("clip", Audio())
    (batch,) = hf_cka.calibration(heard, Wav2Vec2FeatureExtractor())
    assert batch["input_values"].shape == (2, 8000)


def test_labels_are_the_models_own(tmp_path):
    rows = load_rows(str(write(tmp_path / "pets", pictures(2))))
    model = tiny_vit(("dog", "cat"))
    batches = hf_cka.calibration(rows, vit_processor(), label2id=model.config.label2id)
    assert torch.cat([batch["labels"] for batch in batches]).sum() == 2
    (cats,) = hf_cka.calibration(rows.select([0, 1]), vit_processor(), label2id=model.config.label2id)
    assert cats["labels"].tolist() == [1, 1]
    assert model(**cats).loss.isfinite()


def test_files_that_cannot_be_read_are_left_out_and_named(tmp_path):
    files = {**pictures(2), "cat/broken.png": b"x", "dog/cut.png": png(3)[:50]}
    rows = load_rows(str(write(tmp_path / "pets.zip", files)))
    with pytest.warns(UserWarning, match=r"Left out 2 of 6 samples.*(broken|cut).png.*(broken|cut).png"):
        batches = hf_cka.calibration(rows, vit_processor())
    assert batches.num_samples == 4
    assert len(batches.skipped) == 2
    broken = load_rows(str(write(tmp_path / "broken", {"cat/a.png": b"x", "cat/b.png": b"y"})))
    with pytest.raises(ValueError, match="None of the 2 samples can be read: .*a.png"):
        hf_cka.calibration(broken, vit_processor())


def test_sound_without_a_mask_is_not_padded(tmp_path):
    """Padding would change what such a model hears, and with it the measurement."""
    from transformers import Wav2Vec2FeatureExtractor

    rows = load_rows(str(write(tmp_path / "tones", sounds(2))))
    plain = hf_cka.calibration(rows, Wav2Vec2FeatureExtractor())
    assert [batch["input_values"].shape for batch in plain] == [(2, 6400), (2, 7200)]
    masked = hf_cka.calibration(rows, Wav2Vec2FeatureExtractor(return_attention_mask=True))
    assert [batch["input_values"].shape for batch in masked] == [(4, 7200)]
    assert masked[0]["attention_mask"].sum() == 2 * (6400 + 7200)
    alone = hf_cka.calibration(rows, Wav2Vec2FeatureExtractor(return_attention_mask=True), batch_size=1)
    assert _digests(masked) == _digests(alone)
    with torch.no_grad():
        assert tiny_listener()(**masked[0]).logits.shape == (4, 2)


def test_long_recordings_are_cut(tmp_path):
    from transformers import Wav2Vec2FeatureExtractor

    rows = [{"audio": wav(300, 1.0)}, {"audio": {"array": np.ones(800), "sampling_rate": 8000}}]
    batches = hf_cka.calibration(rows, Wav2Vec2FeatureExtractor(), max_seconds=0.25)
    assert [batch["input_values"].shape[1] for batch in batches] == [1600, 4000]


def test_whisper_gets_features_labels_and_what_its_decoder_reads():
    model, processor = tiny_whisper()
    rows = [{"audio": wav(300), "text": "abc"}, {"audio": wav(500), "text": "de"}]
    (batch,) = hf_cka.calibration(rows, processor, decoder_start_token_id=1)
    assert batch["input_features"].shape == (2, 20, 100)
    assert sorted(batch["labels"].tolist()) == [[2, 3, 4, 5, 0], [2, 6, 7, 0, -100]]
    assert sorted(batch["decoder_input_ids"].tolist()) == [[1, 2, 3, 4, 5], [1, 2, 6, 7, 0]]
    with torch.no_grad():
        whole = model(**batch)
        same = model(input_features=batch["input_features"], labels=batch["labels"])
    counted = batch["labels"] != -100
    assert torch.allclose(whole.logits[counted], same.logits[counted], atol=1e-5)
    assert torch.allclose(whole.loss, same.loss)
    (silent,) = hf_cka.calibration([{"audio": wav(300)}], processor, decoder_start_token_id=1)
    assert silent["decoder_input_ids"].tolist() == [[1]]
    assert "labels" not in silent


def test_a_ctc_model_gets_its_transcript_as_labels(tmp_path):
    rows = [{"audio": wav(300), "text": "abc"}, {"audio": wav(500), "text": "de"}]
    (batch,) = hf_cka.calibration(rows, ctc_processor(tmp_path))
    assert batch.keys() == {"input_values", "labels"}
    assert tiny_ctc()(**batch).loss.isfinite()


def test_a_model_of_pictures_and_text_reads_both():
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor

    from tests.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer("cat", "dog")
    tokenizer.model_max_length = 4
    processor = CLIPProcessor(vit_processor(), tokenizer)
    rows = [{"image": png(3), "caption": "w5 w6 w7 w8 w9 w10"}, {"image": png(9), "caption": "dog"}]
    (batch,) = hf_cka.calibration(rows, processor)
    assert batch["input_ids"].shape == (2, 4)
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, "vocab_size": 96, "max_position_embeddings": 8, "eos_token_id": 2, "bos_token_id": 1},
        vision_config={**small, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        assert CLIPModel(config).eval()(**inputs).logits_per_image.shape == (2, 2)
    (text,) = hf_cka.calibration(["w3 w4"], processor)
    assert text.keys() == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}], "ViTImageProcessor.* takes images, and the data has columns text"),
        (["a"], "takes images, and the data has strings"),
        ([{"audio": "a.wav"}], "holds audios, but ViTImageProcessor.* has no feature extractor"),
    ],
)
def test_data_of_another_kind_is_named(rows, message):
    with pytest.raises(ValueError, match=message):
        hf_cka.calibration(rows, vit_processor())


def test_some_transcripts_missing_is_an_error():
    with pytest.raises(ValueError, match="1 of 2 rows have no text"):
        hf_cka.calibration([{"audio": wav(300), "text": "a"}, {"audio": wav(400)}], tiny_whisper()[1])


@pytest.mark.assets
def test_real_pictures_and_speech(assets):
    rows = load_rows(str(assets / "images" / "cifar10_jpeg_test_2000.zip"))
    batches = hf_cka.calibration(rows, vit_processor(), 20)
    assert batches.num_samples == 20
    (batch,) = hf_cka.calibration([{"audio": assets / "audio" / "jfk.flac"}], tiny_whisper()[1], max_seconds=2)
    assert batch["input_features"].shape == (1, 20, 100)


@pytest.mark.parametrize("template", [None, "[{{ messages[0].role }}] <image> {{ messages[0].content[1].text }} w1 w2"])
def test_a_model_that_reads_pictures_inside_its_text(template):
    """The text is the last thing in it: what a template appends is the same for every sample."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    from tests.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer("cat", "dog", "<image>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.image_token = "<image>"
    processor = LlavaProcessor(
        vit_processor(),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=template,
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    rows = [{"image": png(3), "text": "w5 cat w7"}, {"image": png(9), "text": "dog"}]
    (batch,) = hf_cka.calibration(rows, processor)
    image, cat, dog = tokenizer.convert_tokens_to_ids(["<image>", "cat", "dog"])
    assert (batch["input_ids"] == image).sum(1).tolist() == [4, 4]
    last = [ids[mask.bool()][-1].item() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert sorted(last) == sorted([tokenizer("w7")["input_ids"][0], dog])
    assert cat in batch["input_ids"]
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config={**small, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 8},
        text_config={**small, "model_type": "llama", "vocab_size": 96, "num_key_value_heads": 2},
        image_token_index=image,
        vision_feature_layer=-1,
    )
    with torch.no_grad():
        assert LlavaForConditionalGeneration(config).eval()(**batch).logits.isfinite().all()
