"""Which processor a model folder holds."""

import warnings

import pytest
import torch

from hf_cka.data import decoder_start, load_processor, parts_of, read_image, see
from tests.media import ctc_processor, png, tiny_vit, tiny_whisper, vit_processor
from tests.tiny import tiny_config, tiny_tokenizer


def test_a_folder_gives_what_it_holds(tmp_path):
    from transformers import Wav2Vec2FeatureExtractor

    folders = {name: tmp_path / name for name in ("text", "image", "sound", "ctc", "whisper")}
    for folder in folders.values():
        folder.mkdir()
    tiny_config("bert").save_pretrained(folders["text"])
    tiny_tokenizer().save_pretrained(folders["text"])
    tiny_vit().config.save_pretrained(folders["image"])
    vit_processor().save_pretrained(folders["image"])
    Wav2Vec2FeatureExtractor(sampling_rate=8000).save_pretrained(folders["sound"])
    ctc_processor(tmp_path).save_pretrained(folders["ctc"])
    tiny_whisper()[1].save_pretrained(folders["whisper"])
    found = {name: parts_of(load_processor(folder)) for name, folder in folders.items()}
    held = {
        name: [part for part in ("tokenizer", "image_processor", "feature_extractor") if getattr(parts, part)]
        for name, parts in found.items()
    }
    assert held == {
        "text": ["tokenizer"],
        "image": ["image_processor"],
        "sound": ["feature_extractor"],
        "ctc": ["tokenizer", "feature_extractor"],
        "whisper": ["tokenizer", "feature_extractor"],
    }
    assert found["sound"].feature_extractor.sampling_rate == 8000


def test_a_tokenizer_beside_an_image_processor_without_a_common_one(tmp_path):
    tiny_vit().config.save_pretrained(tmp_path)
    vit_processor().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert parts_of(load_processor(tmp_path)).image_processor is not None


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_model_without_one_gets_a_plain_one_and_says_so(tmp_path, channels):
    model = tiny_vit(channels=channels)
    model.config.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=rf"holds no image processor: images become 16 x 16 pixels in {channels}"):
        processor = load_processor(tmp_path)
    mode = parts_of(processor).color_mode
    assert mode == ("L" if channels == 1 else "RGB")
    made = see(processor, [read_image(png(0), mode), read_image(png(255, (30, 7)), mode)])
    assert made["pixel_values"].shape == (2, channels, 16, 16)
    assert made["pixel_values"].max() == 1
    with torch.no_grad():
        assert model(**made).logits.shape == (2, 2)
    processor.save_pretrained(tmp_path)  # goes along with the model, and is found the next time
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_processor(tmp_path).size == processor.size


def test_what_a_plain_one_would_need_is_named(tmp_path):
    from transformers import ResNetConfig, Wav2Vec2Config

    ResNetConfig().save_pretrained(tmp_path / "resnet")
    with pytest.raises(ValueError, match=r"image_size=None.*AutoImageProcessor.from_pretrained\(ORIGINAL\)"):
        load_processor(tmp_path / "resnet")
    Wav2Vec2Config().save_pretrained(tmp_path / "sound")
    with pytest.raises(ValueError, match=r"no feature extractor.*AutoFeatureExtractor.from_pretrained\(ORIGINAL\)"):
        load_processor(tmp_path / "sound")


def test_the_decoder_start_is_the_configs():
    assert decoder_start(tiny_whisper()[0].config) == 1
    assert decoder_start(tiny_config("llama")) is None


@pytest.mark.assets
def test_the_vit_of_fashion_mnist_has_none(assets):
    with pytest.warns(UserWarning, match="28 x 28 pixels in 1 channel"):
        assert parts_of(load_processor(assets / "models" / "vit_fmnist_hf")).color_mode == "L"
