"""Word error rate of a speech model: what it writes down of recordings, held against what was said.

Rows hold ``audio`` in any form that :func:`hf_cka.data.read_audio` takes, and the words as ``text``, ``sentence``,
``transcription`` or ``transcript``.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from hf_cka.data import AUDIO, Readable, alike, caption, hear, parts_of, read_audio
from hf_cka.evaluation.classification_media import in_parts, media_rows
from hf_cka.evaluation.running import measuring, to_model

Row = Mapping[str, Any]

NORMALISATION = "lower case, no punctuation"


@dataclass(frozen=True)
class Transcript:
    """What was said in a recording beside what the model wrote, both as given.

    Args:
        expected: the words of the row.
        produced: the words of the model.
        edits: words to replace, leave out or put in, after normalisation.
        words: words expected, after normalisation.
    """

    expected: str
    produced: str
    edits: int
    words: int


@dataclass(frozen=True)
class WordErrorRate:
    """How many words are wrong.

    Args:
        value: edits over expected words, of all recordings together; above 1 where more was written than said.
        n: recordings.
        words: expected.
        transcripts: one a recording, in the order of the rows.
        skipped: recordings that could not be read, and why.
    """

    value: float
    n: int
    words: int
    transcripts: tuple[Transcript, ...]
    skipped: tuple[str, ...] = ()

    @property
    def standard_error(self) -> float | None:
        """Of the rate, as a ratio of two sums over recordings; None for a single recording.

        Source: Cochran, Sampling Techniques (1977), equation 6.13.

        Example:
            >>> same = tuple(Transcript("a b", "a c", 1, 2) for _ in range(3))
            >>> WordErrorRate(0.5, 3, 6, same).standard_error
            0.0
        """
        if self.n < 2:
            return None
        squares = sum((one.edits - self.value * one.words) ** 2 for one in self.transcripts)
        return math.sqrt(self.n / (self.n - 1) * squares) / self.words


def word_error_rate(
    model: Any,
    processor: Any,
    rows: Sequence[Row],
    *,
    max_new_tokens: int | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> WordErrorRate:
    """Transcribe recordings and count the wrong words.

    An encoder-decoder (Whisper) generates greedily. A CTC model (Wav2Vec2) takes the most likely letter of each frame,
    one recording at a time, because padding would change what it hears. Both texts are normalised simply: lower case,
    dashes are spaces, other punctuation is left out.

    Args:
        model: ``AutoModelForSpeechSeq2Seq`` or ``AutoModelForCTC``; its training mode is put back afterwards.
        processor: of the model: a feature extractor with a tokenizer.
        rows: recordings with their words.
        max_new_tokens: longest transcript; None for half of the decoder's positions, as Whisper's own code, or 256.
        batch_size: recordings an encoder-decoder takes together.
        progress: show a bar if it takes longer than two seconds.

    Raises:
        ValueError: if there are no rows, none can be read, one has no words or is longer than the model hears, or the
            model is no speech model.
        ImportError: without jiwer.

    Example:
        >>> word_error_rate(model, processor, load_rows("speech.jsonl")).value  # doctest: +SKIP
    """
    try:
        import jiwer
    except ImportError as error:
        raise ImportError("Word error rates need jiwer: pip install 'hf_cka[speech]'") from error
    parts = parts_of(processor)
    if parts.feature_extractor is None or parts.tokenizer is None:
        raise ValueError(
            "Speech needs a processor with a feature extractor and a tokenizer, and "
            f"{type(processor).__name__} is none."
        )
    writes = getattr(model.config, "is_encoder_decoder", False) and model.can_generate()
    if not writes and not type(model).__name__.endswith("ForCTC"):
        raise ValueError(
            f"{type(model).__name__} writes nothing down. Load AutoModelForSpeechSeq2Seq or AutoModelForCTC."
        )
    data, column = media_rows(rows, AUDIO, batch_size)
    expected = [_words(row, index) for index, row in enumerate(data)]
    extractor = parts.feature_extractor
    reading = Readable(data, lambda row: read_audio(row[column], extractor.sampling_rate))
    longest = max_new_tokens or (getattr(model.config, "max_target_positions", None) or 512) // 2
    words_only = _no_timestamps(model) if writes else {}
    found: dict[int, Transcript] = {}
    bar = tqdm(total=len(data), desc="speech", unit="row", disable=not progress, delay=2)
    with measuring(model), bar:
        for read in in_parts(reading, batch_size if writes else 1):
            for index, sound in read:
                _check_length(extractor, sound, index)
            for together in alike(extractor, [sound for _, sound in read], batch_size):
                inputs = to_model(model, hear(extractor, [read[at][1] for at in together]))
                if writes:
                    ids = model.generate(**inputs, **words_only, max_new_tokens=longest, do_sample=False, num_beams=1)
                    produced = parts.tokenizer.batch_decode(ids, skip_special_tokens=True)
                else:
                    # the blank is the pad token: leaving special tokens out would join letters that it keeps apart
                    produced = processor.batch_decode(model(**inputs).logits.argmax(-1))
                for at, text in zip(together, produced, strict=True):
                    given = normalised(expected[read[at][0]])
                    made = jiwer.process_words(given, normalised(text))
                    edits = made.substitutions + made.deletions + made.insertions
                    found[read[at][0]] = Transcript(expected[read[at][0]], text.strip(), edits, len(given.split()))
            bar.update(len(read))
    transcripts = tuple(found[index] for index in sorted(found))
    words = sum(one.words for one in transcripts)
    rate = sum(one.edits for one in transcripts) / words
    return WordErrorRate(rate, len(transcripts), words, transcripts, tuple(reading.skipped))


def normalised(text: str) -> str:
    """Return a text in lower case, without punctuation, with one space between two words.

    Example:
        >>> normalised("Ask not -- what's well-known, he said.")
        'ask not whats well known he said'
    """
    spaced = re.sub(r"[-‐-―/]", " ", unicodedata.normalize("NFKC", text).lower())
    kept = "".join(letter for letter in spaced if unicodedata.category(letter)[0] not in "PS")
    return " ".join(kept.split())


def _no_timestamps(model: Any) -> dict[str, Any]:
    """Keep Whisper from writing timestamps, which a damaged one may do unasked.

    Its ``generate`` goes on from the last one, for ever if that is zero (transformers 5.24, ``generation_whisper.py``).
    """
    settings = model.generation_config
    last = getattr(settings, "no_timestamps_token_id", None)
    if last is None:
        return {}
    quiet = getattr(settings, "suppress_tokens", None) or []
    return {"suppress_tokens": [*quiet, *range(last + 1, model.config.vocab_size)]}


def _words(row: Row, index: int) -> str:
    text = caption(row)
    if text is None or not normalised(text):
        raise ValueError(
            f"Row {index} has no words to compare with; its columns are: {', '.join(row)}. Give 'text', 'sentence', "
            "'transcription' or 'transcript'."
        )
    return text


def _check_length(extractor: Any, sound: np.ndarray, index: int) -> None:
    limit = getattr(extractor, "n_samples", None)  # of Whisper, which cuts what is longer
    if limit is not None and len(sound) > limit:
        rate = extractor.sampling_rate
        raise ValueError(
            f"Row {index} is {len(sound) / rate:.1f} seconds long, and the model hears {limit / rate:.0f}. Cut the "
            "recording into pieces."
        )
