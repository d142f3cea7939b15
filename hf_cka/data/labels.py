"""Which of a model's labels a class of the data is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_GENERIC = re.compile(r"LABEL_\d+")


def class_names(dataset: Any, column: str = "label") -> tuple[str, ...]:
    """Return the names of a data set's classes, by their number; none where it has only numbers.

    Args:
        dataset: of the ``datasets`` library, or anything else.
        column: with the label.

    Example:
        >>> class_names([{"label": 1}])
        ()
    """
    feature = (getattr(dataset, "features", None) or {}).get(column)
    return tuple(getattr(feature, "names", None) or ())


def label_ids(names: Sequence[str], label2id: Mapping[str, int]) -> tuple[int, ...]:
    """Return the model's label of each class.

    Names count where the model has names: letter case and signs do not matter. Where it has none (``LABEL_0``), or the
    names are numbers, the numbers count.

    Args:
        names: of the classes, such as those of folders.
        label2id: of the model's config.

    Raises:
        ValueError: if a class is none of the model's labels, or there are more classes than labels.

    Example:
        >>> label_ids(["ankle_boot", "T-shirt top"], {"T-shirt/top": 0, "Ankle boot": 9})
        (9, 0)
        >>> label_ids(["cat", "dog"], {"LABEL_0": 0, "LABEL_1": 1})
        (0, 1)
        >>> label_ids(["cat", "cow"], {"cat": 0, "dog": 1})
        Traceback (most recent call last):
        ValueError: The classes cow are none of the model's labels (cat, dog). Rename ... or name them by number.
    """
    known = {_plain(name): index for name, index in label2id.items()}
    wanted = [_plain(name) for name in names]
    if wanted and all(name in known for name in wanted):
        return tuple(known[name] for name in wanted)
    count = len(label2id)
    if all(name.isdecimal() for name in names):
        found = tuple(map(int, names))
    elif all(_GENERIC.fullmatch(name) for name in label2id):
        found = tuple(range(len(names)))
    else:
        unknown = [name for name, plain in zip(names, wanted, strict=True) if plain not in known]
        raise ValueError(
            f"The classes {_listed(unknown)} are none of the model's labels ({_listed(list(label2id))}). Rename the "
            "folders or classes as the model does, or name them by number."
        )
    if found and max(found) >= count:
        raise ValueError(
            f"The data has {len(names)} classes (the highest is {max(found)}), but the model has {count} labels. Give "
            "the data that the model was trained for, or a model with as many labels."
        )
    return found


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.casefold())


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
