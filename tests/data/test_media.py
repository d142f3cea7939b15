"""Pictures and recordings from whatever a row holds."""

import io

import numpy as np
import pytest

from hf_cka.data import Unreadable, media_column, read_audio, read_image
from tests.media import png, wav


def test_every_form_of_a_picture_is_the_same_picture(tmp_path):
    from PIL import Image

    (tmp_path / "a.png").write_bytes(png(70))
    opened = Image.open(tmp_path / "a.png")
    forms = (
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        png(70),
        {"bytes": png(70), "path": None},
        {"bytes": None, "path": str(tmp_path / "a.png")},
        opened,
        np.asarray(opened),
        [opened],
    )
    for form in forms:
        assert np.array_equal(np.asarray(read_image(form)), np.asarray(opened)), form
    assert read_image(png(70), "L").mode == "L"


def test_a_picture_is_turned_upright():
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    file = io.BytesIO()
    Image.new("RGB", (8, 4)).save(file, "JPEG", exif=exif)
    assert read_image(file.getvalue()).size == (4, 8)


def test_every_form_of_a_recording_is_the_same_recording(tmp_path):
    (tmp_path / "a.wav").write_bytes(wav(440))
    plain = read_audio(tmp_path / "a.wav", 16000)
    assert plain.dtype == np.float32
    assert plain.shape == (8000,)
    forms = (
        wav(440),
        {"bytes": wav(440), "path": "a.wav"},
        {"bytes": None, "path": str(tmp_path / "a.wav")},
        {"array": plain, "sampling_rate": 16000},
        {"array": plain.tolist(), "sampling_rate": 16000},
        wav(440, channels=2),
        {"array": np.stack([plain, plain]), "sampling_rate": 16000},
        _Decoder(np.stack([plain, plain]), 16000),
    )
    for form in forms:
        assert np.allclose(read_audio(form, 16000), plain, atol=1e-6), form
    whole = {"array": (plain * 32767).round().astype(np.int16), "sampling_rate": 16000}
    assert np.allclose(read_audio(whole, 16000), plain, atol=1e-4)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_resampling_keeps_a_tone(rate):
    tone, wanted = read_audio(wav(440, 1.0, rate), 16000), read_audio(wav(440, 1.0), 16000)
    assert tone.shape == wanted.shape
    middle = slice(1000, -1000)  # the ends feel the filter
    assert np.abs(tone - wanted)[middle].max() < 0.01


@pytest.mark.assets
def test_real_speech_is_one_channel_of_eleven_seconds(assets):
    speech = read_audio(assets / "audio" / "jfk.flac", 16000)
    assert speech.shape == (176000,)
    assert 0.05 < np.abs(speech).max() <= 1


class _Decoder:
    """As torchcodec's, which ``datasets`` returns where it is installed."""

    def __init__(self, data, rate):
        self.data, self.sample_rate = data, rate

    def get_all_samples(self):
        return self


@pytest.mark.parametrize(
    ("read", "value", "message"),
    [
        (read_image, b"nothing", "bytes: cannot identify"),
        (read_image, "missing.jpg", "missing.jpg: No such file"),
        (read_image, 3, "int: a file name, bytes or a PIL image is needed"),
        (lambda v: read_audio(v, 16000), b"nothing", "bytes: .*ormat"),
        (lambda v: read_audio(v, 16000), {"array": np.zeros(0), "sampling_rate": 8000}, "holds no samples"),
        (lambda v: read_audio(v, 16000), {"array": np.full(4, np.nan), "sampling_rate": 8000}, "no numbers"),
        (lambda v: read_audio(v, 16000), {"array": np.zeros(4)}, "needs its sampling_rate"),
    ],
)
def test_what_cannot_be_read_is_named(read, value, message):
    with pytest.raises(Unreadable, match=message):
        read(value)


def test_columns_are_found_by_name_or_suffix():
    assert media_column({"label": 1, "image": "x"}) == ("image", "image")
    assert media_column({"path": "a.mp3"}) == ("path", "audio")
    assert media_column({"path": "a.txt", "audio": None}) is None
    assert media_column({"spectrum": {"bytes": b""}}, {"spectrum": "image"}) == ("spectrum", "image")
