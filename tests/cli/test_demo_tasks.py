"""The demo's texts and task: the splits share nothing, the same seed gives the same rows, the records are right."""

from __future__ import annotations

import json

import pytest

from hf_cka.cli.demo_tasks import documentation_texts, record_rows


def _paragraphs(texts: list[str]) -> set[str]:
    return {" ".join(paragraph.split()) for text in texts for paragraph in text.split("\n\n")}


@pytest.mark.parametrize("seed", [0, 1])
def test_no_paragraph_is_in_both_splits(seed: int) -> None:
    calibration = documentation_texts("calibration", seed=seed)
    held_out = documentation_texts("heldout", seed=seed)
    assert len(calibration) >= 64
    assert len(held_out) >= 16
    assert not _paragraphs(calibration) & _paragraphs(held_out)


def test_texts_depend_on_the_seed_alone() -> None:
    assert documentation_texts("heldout", seed=3) == documentation_texts("heldout", seed=3)
    assert documentation_texts("heldout", seed=3) != documentation_texts("heldout", seed=4)


def test_texts_are_long_enough_for_what_was_asked() -> None:
    assert min(len(text) for text in documentation_texts("calibration", characters=400)) >= 400


def test_no_sentence_is_in_both_splits_whatever_the_seeds() -> None:
    train = {row["prompt"] for seed in range(3) for row in record_rows("train", 2000, seed=seed)}
    held_out = {row["prompt"] for seed in range(3) for row in record_rows("heldout", 1000, seed=seed)}
    assert not train & held_out


def test_rows_are_different_and_a_shorter_list_is_a_prefix() -> None:
    rows = record_rows("train", 600)
    assert len({row["prompt"] for row in rows}) == 600
    assert record_rows("train", 50) == rows[:50]


def test_records_say_what_the_sentences_say() -> None:
    """Checked against an independent reading of the words, for every kind of sentence."""
    spoken = {"a dozen": 12, "two dozen": 24, "half a dozen": 6, "three dozen": 36}
    kinds = set()
    for row in record_rows("train", 900):
        sentence, record = row["prompt"].removesuffix("\nJSON:\n"), json.loads(row["completion"])
        kinds.add(tuple(record))
        lowered = sentence.lower()
        if "count" in record:
            assert record["who"] in sentence
            assert record["item"][:3] in sentence  # knife / knives
            for words, count in spoken.items():
                assert (f"{words} " in lowered.replace("half a dozen", "half_dozen")) <= (record["count"] == count)
        elif "value" in record:
            assert record["place"] in sentence
            assert ("minus" in lowered) == (record["value"] < 0)
        else:
            hour, minute = map(int, record["time"].split(":"))
            assert record["guest"] != record["host"]
            assert ("morning" in sentence) == (hour < 12)
            assert ("evening" in sentence) == (hour >= 18)
            assert ("half past" in sentence) == (minute == 30)
            assert ("quarter to" in sentence) == (minute == 45)
            guest_first = sentence.index(record["guest"]) < sentence.index(record["host"])
            assert guest_first != ("expects" in sentence)
    assert len(kinds) == 3


def test_the_words_of_a_number_are_its_digits() -> None:
    completions = {row["prompt"].lower(): json.loads(row["completion"]) for row in record_rows("train", 3000)}
    counts = {record["count"] for prompt, record in completions.items() if "forty-one " in prompt and "count" in record}
    assert counts == {41}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: documentation_texts("test"), "Known: 'calibration', 'heldout'"),
        (lambda: documentation_texts("heldout", characters=0), "characters=0"),
        (lambda: record_rows("test", 1), "Known: 'train', 'heldout'"),
        (lambda: record_rows("train", 0), "num_rows=0"),
        (lambda: record_rows("train", 10**6), "num_rows=1000000"),
    ],
)
def test_bad_arguments_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_trl_takes_the_loss_on_the_completion_only(smollm2, tmp_path) -> None:
    """What is trained is the record and the end token, nothing of the sentence."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    model, tokenizer = smollm2()
    rows = record_rows("train", 4)
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(str(tmp_path), per_device_train_batch_size=4, report_to=[], use_cpu=True, bf16=False),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    trained = {tokenizer.decode(labels[labels >= 0]) for labels in batch["labels"]}
    assert trained == {row["completion"] + tokenizer.eos_token for row in rows}
