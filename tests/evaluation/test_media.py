"""Pictures, recordings and speech: the same numbers as one row at a time, names that match, and clear errors."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from hf_cka.cli import app
from hf_cka.data import hear, load_rows, read_audio, read_image, see
from hf_cka.evaluation import classify_audio, classify_images, evaluate, word_error_rate
from hf_cka.evaluation.speech import normalised
from hf_cka.evaluation.tasks import EvaluationResult, EvaluationSettings
from tests.media import (
    ctc_processor,
    pictures,
    sounds,
    tiny_ctc,
    tiny_listener,
    tiny_vit,
    tiny_whisper,
    vit_processor,
    wav,
    write,
)


def _saved(folder, model, processor) -> str:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def test_a_transcript_holds_no_timestamps(monkeypatch):
    """Whisper's `generate` would go on from them, and never end from one of zero."""
    model, processor = tiny_whisper()
    model.generation_config.no_timestamps_token_id, model.generation_config.suppress_tokens = 20, [4]
    given = {}
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **settings: given.update(settings) or generate(**settings))
    written = word_error_rate(model, processor, [{"audio": wav(300), "text": "a"}], max_new_tokens=8)
    assert given["suppress_tokens"] == [4, *range(21, model.config.vocab_size)]
    later = {chr(ord("a") + token - 3) for token in range(21, 29)}
    assert not later & set(written.transcripts[0].produced)


def test_pictures_are_classified_as_one_at_a_time(tmp_path) -> None:
    rows = load_rows(str(write(tmp_path / "pets.zip", pictures(4))))
    model, processor = tiny_vit(("dog", "cat")), vit_processor()
    result = classify_images(model, processor, rows, batch_size=3)
    with torch.no_grad():
        alone = [int(model(**see(processor, [read_image(row["image"])])).logits.argmax()) for row in rows]
    assert list(result.predictions) == alone
    assert result.labels == (1,) * 4 + (0,) * 4  # the folders by the model's own numbers
    assert result.accuracy == sum(a == b for a, b in zip(result.labels, alone, strict=True)) / 8
    assert classify_images(model.double(), processor, rows).n == 8


def test_labels_may_be_words_or_numbers(tmp_path) -> None:
    write(tmp_path, {"a.png": pictures(1)["cat/0.png"]})
    model, processor = tiny_vit(("dog", "cat")), vit_processor()
    for label in (1, "cat", "Cat"):
        rows = [{"image": tmp_path / "a.png", "label": label}]
        assert classify_images(model, processor, rows).labels == (1,)


def test_recordings_are_classified_as_one_at_a_time(tmp_path) -> None:
    """With an extractor that gives no mask padding would change what the model hears."""
    from transformers import Wav2Vec2FeatureExtractor

    rows = load_rows(str(write(tmp_path / "tones", sounds(3))))
    model, extractor = tiny_listener(("low", "high")), Wav2Vec2FeatureExtractor()
    result = classify_audio(model, extractor, rows, batch_size=4)
    with torch.no_grad():
        heard = [hear(extractor, [read_audio(row["audio"], 16000)]) for row in rows]
        alone = [int(model(**one).logits.argmax()) for one in heard]
    assert list(result.predictions) == alone
    assert result.labels == (1,) * 3 + (0,) * 3


def test_what_cannot_be_read_is_counted(tmp_path) -> None:
    folder = write(tmp_path / "pets", {**pictures(2), "cat/broken.png": b"x"})
    model = _saved(tmp_path / "model", tiny_vit(), vit_processor())
    with pytest.warns(UserWarning, match="Left out 1 of 5 samples"):
        result = evaluate(model, f"image_classification:{folder}", device="cpu", progress=False)
    measured = result["image_classification:pets"]
    assert measured.n == 4
    assert measured.details == {"skipped": 1}
    assert measured.errors.keys() == {"accuracy"}


def test_a_limit_draws_from_all_classes(tmp_path) -> None:
    folder = write(tmp_path / "pets.zip", pictures(20))
    model = _saved(tmp_path / "model", tiny_vit(), vit_processor())
    settings = EvaluationSettings(limit=10)
    task = f"image_classification:{folder}"
    measured = evaluate(model, task, settings=settings, device="cpu", progress=False).tasks[0]
    assert measured.n == 10
    assert measured.metrics["majority"] < 1
    assert measured.details == {"drawn_with_seed": 0}


def _speech(folder) -> str:
    said = {"a.wav": "Hello, there!", "b.wav": "one-two three"}
    lines = "".join(json.dumps({"file_name": name, "text": text}) + "\n" for name, text in said.items())
    files = {"a.wav": wav(300, 0.4), "b.wav": wav(700, 0.6), "metadata.jsonl": lines.encode()}
    return str(write(folder, files))


def test_whisper_writes_the_same_whatever_the_batch(tmp_path) -> None:
    import jiwer

    model, processor = tiny_whisper()
    rows = load_rows(_speech(tmp_path / "speech"))
    one, two = (word_error_rate(model, processor, rows, batch_size=size) for size in (1, 2))
    assert one == two
    assert one.words == 5
    produced = [normalised(line.produced) for line in one.transcripts]
    assert one.value == pytest.approx(jiwer.wer(["hello there", "one two three"], produced))
    assert one.standard_error >= 0


def test_ctc_writes_the_most_likely_letters(tmp_path) -> None:
    model, processor = tiny_ctc(), ctc_processor(tmp_path)
    rows = load_rows(_speech(tmp_path / "speech.zip"))
    result = word_error_rate(model, processor, rows, batch_size=2)
    with torch.no_grad():
        logits = model(**hear(processor.feature_extractor, [read_audio(rows[1]["audio"], 16000)])).logits
    assert result.transcripts[1].produced == processor.batch_decode(logits.argmax(-1))[0].strip()
    assert [line.expected for line in result.transcripts] == ["Hello, there!", "one-two three"]


def test_a_perfect_transcript_has_no_errors(tmp_path, monkeypatch) -> None:
    model, processor = tiny_ctc(), ctc_processor(tmp_path)
    monkeypatch.setattr(type(processor), "batch_decode", lambda self, ids: ["HELLO THERE."])
    result = word_error_rate(model, processor, [{"audio": wav(300), "text": "hello, there"}])
    assert (result.value, result.standard_error) == (0, None)


def test_the_command_measures_models_of_pictures_and_sound(tmp_path) -> None:
    from transformers import Wav2Vec2FeatureExtractor

    seen = _saved(tmp_path / "vit", tiny_vit(), vit_processor())
    heard = _saved(tmp_path / "listener", tiny_listener(), Wav2Vec2FeatureExtractor())
    written = _saved(tmp_path / "whisper", *tiny_whisper())
    runs = (
        (seen, f"image_classification:{write(tmp_path / 'pets.zip', pictures(2))}", "accuracy"),
        (heard, f"audio_classification:{write(tmp_path / 'tones', sounds(2))}", "accuracy"),
        (written, f"speech:{_speech(tmp_path / 'speech')}", "wer"),
    )
    for model, task, metric in runs:
        done = CliRunner().invoke(app, ["evaluate", model, "-t", task, "--json", "--device", "cpu"])
        assert done.exit_code == 0, done.output
        result = EvaluationResult.from_dict(json.loads(done.stdout))
        assert metric in result.tasks[0].metrics
        assert str(tmp_path) not in done.stdout


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (lambda: classify_images(tiny_vit(), vit_processor(), []), "no rows to measure on"),
        (lambda: classify_images(tiny_vit(), vit_processor(), [{"text": "a"}]), "has no column 'image'.*are: text"),
        (
            lambda: classify_images(tiny_vit(), vit_processor(), [{"image": "a.png", "label": 2}]),
            "label=2 must be an index from 0 to 1",
        ),
        (
            lambda: classify_images(tiny_vit(), vit_processor(), [{"image": "a.png", "label": "cow"}]),
            "classes cow are none",
        ),
        (lambda: classify_images(tiny_ctc(), vit_processor(), [{"image": "a.png"}]), "no classification head"),
        (lambda: classify_audio(tiny_listener(), vit_processor(), [{"audio": "a"}]), "needs a feature extractor"),
        (
            lambda: word_error_rate(tiny_vit(), tiny_whisper()[1], [{"audio": "a", "text": "b"}]),
            "ViTForImageClassification writes nothing down",
        ),
        (lambda: word_error_rate(*tiny_whisper(), [{"audio": wav(300), "text": "..."}]), "Row 0 has no words"),
        (
            lambda: word_error_rate(*tiny_whisper(), [{"audio": wav(300, 2.0), "text": "a"}]),
            "is 2.0 seconds long, and the model hears 1",
        ),
        (
            lambda: evaluate(tiny_vit(), "efficiency,perplexity:README.md", tokenizer=vit_processor()),
            "suffix is none of",
        ),
    ],
)
def test_what_does_not_fit_is_named(measure, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure()


def test_a_text_task_of_a_model_of_pictures_is_named(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    with pytest.raises(ValueError, match="'perplexity' reads text, and ViTImageProcessor.*image_classification"):
        evaluate(tiny_vit(), f"perplexity:{tmp_path / 'a.txt'}", tokenizer=vit_processor())


def test_without_jiwer_the_error_gives_the_command(monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(ImportError, match=r"pip install 'hf_cka\[speech\]'"):
        word_error_rate(*tiny_whisper(), [{"audio": "a", "text": "b"}])


@pytest.mark.assets
def test_real_pictures_go_through_a_model_by_name(assets, tmp_path) -> None:
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    model = _saved(tmp_path / "vit", tiny_vit(names), vit_processor())
    task = f"image_classification:{assets / 'images' / 'cifar10_jpeg_test_2000.zip'}"
    measured = evaluate(model, task, device="cpu", progress=False).tasks[0]
    assert measured.n == 2000
    assert measured.metrics["majority"] == 0.1


def test_compare_says_what_to_do_with_models_of_pictures(tmp_path) -> None:
    from hf_cka.evaluation import compare

    model = _saved(tmp_path / "vit", tiny_vit(), vit_processor())
    with pytest.raises(ValueError, match="reads no text. For models of pictures or sound run hf-cka evaluate"):
        compare(model, {"other": tiny_vit()}, ["some text"], device="cpu")
