"""Where rows come from: files, folders, zips, saved data sets."""

import json

import pytest

from hf_cka.data import class_names, load_rows, read_audio, read_image
from tests.media import pictures, png, sounds, wav, write


def test_local_files_load_alike(tmp_path):
    rows = [{"text": "one"}, {"text": "two"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text("text\none\ntwo\n")
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    for name in ("a.jsonl", "a.json", "a.csv", "a.txt"):
        assert [row["text"].strip() for row in load_rows(str(tmp_path / name))] == ["one", "two"]


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file 'missing.jsonl'"):
        load_rows("missing.jsonl")
    (tmp_path / "a.docx").write_text("")
    with pytest.raises(ValueError, match=r"its suffix is none of \.txt"):
        load_rows(str(tmp_path / "a.docx"))


@pytest.mark.parametrize("name", ["pets", "pets.zip"])
def test_class_folders_become_labels_by_their_sorted_names(tmp_path, name):
    rows = load_rows(str(write(tmp_path / name, {**pictures(), "__MACOSX/cat/._0.png": b"", "readme.txt": b"x"})))
    assert class_names(rows) == ("cat", "dog")
    assert list(rows["label"]) == [0, 0, 0, 1, 1, 1]
    assert read_image(rows[4]["image"]).getpixel((9, 9)) == (120, 120, 120)
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]  # nothing is extracted beside it


def test_a_zip_of_one_folder_is_that_folder(tmp_path):
    rows = load_rows(str(write(tmp_path / "a.zip", {f"pets/{name}": data for name, data in pictures().items()})))
    assert class_names(rows) == ("cat", "dog")


@pytest.mark.parametrize("name", ["set", "set.zip"])
def test_splits_are_folders_around_the_classes(tmp_path, name):
    files = {f"train/{file}": data for file, data in pictures(2).items()}
    files |= {f"val/{file}": data for file, data in pictures(1).items()}
    place = str(write(tmp_path / name, files))
    assert len(load_rows(place)) == 4
    assert len(load_rows(place, "validation")) == 2
    with pytest.raises(ValueError, match="has no split 'test'; it has train, val"):
        load_rows(place, "test")


@pytest.mark.parametrize("name", ["tones", "tones.zip"])
def test_sound_comes_in_class_folders_or_flat(tmp_path, name):
    rows = load_rows(str(write(tmp_path / name, sounds())))
    assert class_names(rows) == ("high", "low")
    flat = load_rows(str(write(tmp_path / f"flat_{name}", {"b.wav": wav(300), "a.wav": wav(200, rate=8000)})))
    assert flat.column_names == ["audio"]
    assert read_audio(flat[0]["audio"], 16000).shape == (8000,)


@pytest.mark.parametrize("name", ["speech", "speech.zip"])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_metadata_file_gives_the_columns(tmp_path, name, kind):
    said = [("1.wav", "one, two"), ("sub/2.wav", "three")]
    text = (
        "file_name,text\n" + "".join(f'{file},"{words}"\n' for file, words in said)
        if kind == "csv"
        else "".join(json.dumps({"file_name": file, "text": words}) + "\n" for file, words in said)
    )
    files = {"1.wav": wav(300), "sub/2.wav": wav(400), "unused.wav": wav(500), f"metadata.{kind}": text.encode()}
    rows = load_rows(str(write(tmp_path / name, files)))
    assert [row["text"] for row in rows] == ["one, two", "three"]
    assert len(read_audio(rows[1]["audio"], 16000)) == 8000


@pytest.mark.parametrize("column", ["audio", "file_name", "path"])
def test_names_in_a_file_are_relative_to_it(tmp_path, column, monkeypatch):
    write(tmp_path / "data", {"clips/a.wav": wav(300)})
    (tmp_path / "data" / "speech.jsonl").write_text(json.dumps({column: "clips/a.wav", "text": "hello"}) + "\n")
    monkeypatch.chdir(tmp_path)
    row = load_rows("data/speech.jsonl")[0]
    assert set(row) == {"audio", "text"}
    assert len(read_audio(row["audio"], 16000)) == 8000


def test_a_path_that_is_no_picture_stays_text(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"path": "src/a.py", "text": "x"}) + "\n")
    assert load_rows(str(tmp_path / "a.jsonl"))[0] == {"path": "src/a.py", "text": "x"}


def test_saved_data_sets_load(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list([{"text": "a"}, {"text": "b"}])
    rows.save_to_disk(tmp_path / "one")
    assert load_rows(str(tmp_path / "one"))[1] == {"text": "b"}
    DatasetDict({"train": rows, "dev": rows.select([0])}).save_to_disk(tmp_path / "many")
    assert len(load_rows(str(tmp_path / "many"))) == 2
    assert len(load_rows(str(tmp_path / "many"), "validation")) == 1
    with pytest.raises(ValueError, match="has no split 'test'; it has train, dev"):
        load_rows(str(tmp_path / "many"), "test")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"notes.md": b"x"}, "holds no image and no audio file"),
        ({"a.png": png(1), "a.wav": b""}, "both images and audio"),
        ({"cat/a.png": png(1), "b.png": png(2)}, "1 files beside them .first: b.png."),
        ({"a.wav": b"", "metadata.csv": b"name,text\na,b\n"}, "needs a column 'file_name'.*columns are: name, text"),
    ],
)
@pytest.mark.parametrize("name", ["data", "data.zip"])
def test_folders_that_are_no_data_are_named(tmp_path, files, message, name):
    with pytest.raises(ValueError, match=message):
        load_rows(str(write(tmp_path / name, files)))


def test_broken_and_missing_zips_are_named(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"not a zip")
    with pytest.raises(ValueError, match="is no zip file"):
        load_rows(str(tmp_path / "a.zip"))
    with pytest.raises(FileNotFoundError, match=r"There is no file 'missing.zip'"):
        load_rows("missing.zip")


@pytest.mark.assets
def test_the_zip_of_cifar_has_ten_classes(assets):
    rows = load_rows(str(assets / "images" / "cifar10_jpeg_test_2000.zip"))
    assert len(rows) == 2000
    assert class_names(rows)[:2] == ("airplane", "automobile")
    assert read_image(rows[1999]["image"]).size == (32, 32)
