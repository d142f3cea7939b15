"""What the demo reads and learns, made without a download: documentation texts, and sentences to turn into JSON.

Both come in a training and a held-out split that share nothing. Where the model comes from is in ``demo_assets``.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable
from typing import Any

_HELD_OUT_SHARE = 4  # one in four

Record = dict[str, Any]


def documentation_texts(split: str, *, characters: int = 1500, seed: int = 0) -> list[str]:
    """Return texts of about equal length from CPython's own documentation topics (``pydoc_data.topics``).

    Whole topics go to one split; a paragraph that several topics repeat is kept only where it comes first, so no
    paragraph is in both splits. The exact texts depend on the Python version, whose documentation they are.

    Args:
        split: ``"calibration"`` (three quarters of the topics) or ``"heldout"``.
        characters: paragraphs are joined until a text has at least this many characters (4 to a token, roughly).
        seed: decides which topics are held out, and the order of the texts.

    Raises:
        ValueError: if the split is unknown or ``characters`` is not positive.

    Example:
        >>> texts = documentation_texts("calibration")
        >>> len(texts) > 100 and min(len(text) for text in texts) >= 1500
        True
    """
    _check_split(split, ("calibration", "heldout"))
    if characters < 1:
        raise ValueError(f"characters={characters} must be at least 1.")
    from pydoc_data.topics import topics

    names = sorted(topics)
    random.Random(seed).shuffle(names)
    held_out = set(names[::_HELD_OUT_SHARE])
    seen: set[str] = set()
    texts: list[str] = []
    for name in names:
        paragraphs = []
        for paragraph in topics[name].split("\n\n"):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                paragraphs.append(paragraph.strip("\n"))
        if (name in held_out) == (split == "heldout"):
            texts += _join(paragraphs, characters)
    return texts


def record_rows(split: str, num_rows: int, *, seed: int = 0) -> list[dict[str, str]]:
    """Return generated rows of the demo's task: a sentence about an order, a visit or a reading becomes JSON.

    It takes more than copying: number words become digits, plurals singular, spoken times 24-hour clock, guest and
    host are told apart. The rows are plain prompt/completion rows, for which TRL's SFTTrainer takes the loss on the
    completion only; plain rather than chat, because the chat template would double the tokens of such short rows.
    No sentence is in both splits, whatever the seeds.

    Args:
        split: ``"train"`` or ``"heldout"``.
        num_rows: how many rows, all different.
        seed: decides which.

    Raises:
        ValueError: if the split is unknown or ``num_rows`` is not in 1..5000 (there are few different readings).

    Example:
        >>> sorted(record_rows("train", 1)[0])
        ['completion', 'prompt']
    """
    _check_split(split, ("train", "heldout"))
    if not 1 <= num_rows <= 5000:
        raise ValueError(f"num_rows={num_rows} must be between 1 and 5000.")
    rng = random.Random(seed)
    makers = (_order, _visit, _reading)
    seen: set[str] = set()
    rows: list[dict[str, str]] = []
    while len(rows) < num_rows:
        sentence, record = makers[len(rows) % len(makers)](rng)
        # The sentence itself decides its split, so that no choice of seeds or sizes can make the splits overlap.
        held_out = zlib.crc32(sentence.encode()) % _HELD_OUT_SHARE == 0
        if sentence in seen or held_out != (split == "heldout"):
            continue
        seen.add(sentence)
        rows.append({"prompt": f"{sentence}\nJSON:\n", "completion": json.dumps(record)})
    return rows


def _check_split(split: str, known: tuple[str, str]) -> None:
    if split not in known:
        raise ValueError(f"split={split!r} is unknown. Known: {known[0]!r}, {known[1]!r}.")


def _join(paragraphs: list[str], characters: int) -> list[str]:
    """Join paragraphs into texts of at least ``characters``; what is left over at the end is dropped."""
    texts, current, length = [], [], 0
    for paragraph in paragraphs:
        current.append(paragraph)
        length += len(paragraph) + 2
        if length - 2 >= characters:
            texts.append("\n\n".join(current))
            current, length = [], 0
    return texts


_NAMES = [
    "Mira", "Tomas", "Elif", "Jonas", "Aiko", "Ravi", "Lena", "Omar",
    "Greta", "Paulo", "Nadia", "Felix", "Ingrid", "Samuel", "Chiara", "Viktor",
]  # fmt: skip
_ITEMS = {
    "pears": "pear", "loaves": "loaf", "boxes": "box", "knives": "knife", "cherries": "cherry", "candles": "candle",
    "shelves": "shelf", "brushes": "brush", "lamps": "lamp", "batteries": "battery", "tickets": "ticket",
    "scarves": "scarf", "glasses": "glass", "ropes": "rope", "daisies": "daisy", "bolts": "bolt",
}  # fmt: skip
_SMALL = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
_TENS = ["_", "_", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_DOZENS = [("a dozen", 12), ("two dozen", 24), ("half a dozen", 6), ("three dozen", 36)]
_PLACES = ["north tank", "cold room", "greenhouse", "boiler", "attic", "east well", "dry store", "roof sensor"]
_QUANTITIES = {"degrees": "C", "percent humidity": "%", "bar": "bar", "litres": "L", "volts": "V"}
_HOURS = ((6, 11, "in the morning"), (13, 17, "in the afternoon"), (18, 21, "in the evening"))


def _order(rng: random.Random) -> tuple[str, Record]:
    name, plural = rng.choice(_NAMES), rng.choice(list(_ITEMS))
    words, count = rng.choice([_spoken_number(rng.randint(2, 99)), rng.choice(_DOZENS)])
    sentence = rng.choice(
        [
            f"{name} ordered {words} {plural}.",
            f"Please send {words} {plural} to {name}.",
            f"{words.capitalize()} {plural} are wanted by {name}.",
        ]
    )
    return sentence, {"who": name, "item": _ITEMS[plural], "count": count}


def _visit(rng: random.Random) -> tuple[str, Record]:
    name, host = rng.sample(_NAMES, 2)
    words, clock = _spoken_time(rng)
    sentence = rng.choice(
        [
            f"{name} visits {host} at {words}.",
            f"{host} expects {name} at {words}.",
            f"At {words}, {name} calls on {host}.",
        ]
    )
    return sentence, {"guest": name, "host": host, "time": clock}


def _reading(rng: random.Random) -> tuple[str, Record]:
    place, quantity = rng.choice(_PLACES), rng.choice(list(_QUANTITIES))
    words, value = _spoken_number(rng.randint(2, 99))
    if quantity == "degrees" and rng.random() < 0.5:
        words, value = f"minus {words}", -value
    sentence = rng.choice(
        [
            f"The {place} read {words} {quantity}.",
            f"{words.capitalize()} {quantity} in the {place}.",
            f"We noted {words} {quantity} at the {place}.",
        ]
    )
    return sentence, {"place": place, "value": value, "unit": _QUANTITIES[quantity]}


def _spoken_number(value: int) -> tuple[str, int]:
    if value < 20:
        return _SMALL[value], value
    tens, ones = divmod(value, 10)
    return _TENS[tens] + (f"-{_SMALL[ones]}" if ones else ""), value


def _spoken_time(rng: random.Random) -> tuple[str, str]:
    first, last, part = rng.choice(_HOURS)
    hour = rng.randint(first, last)
    said = _SMALL[(hour - 1) % 12 + 1]
    following = _SMALL[hour % 12 + 1]
    forms: list[Callable[[], tuple[str, int]]] = [
        lambda: (f"{said} o'clock", 0),
        lambda: (f"half past {said}", 30),
        lambda: (f"a quarter past {said}", 15),
        lambda: (f"a quarter to {following}", 45),
        lambda: (f"ten past {said}", 10),
    ]
    words, minute = rng.choice(forms)()
    return f"{words} {part}", f"{hour:02d}:{minute:02d}"
