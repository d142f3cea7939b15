"""Calibration batches out of a Trainer's training set, without disturbing the training. Nothing is measured here."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy
import torch


def training_batches(loader: Any, num_samples: int, seed: int) -> list[dict[str, Any]]:
    """Draw rows of a data loader's data set and collate them, as the loader would.

    The draw depends on the seed alone: every process and every resumed run gets the same rows. The order in which
    training sees its data, and every random number generator, stay as they were.

    Args:
        loader: of the training set.
        num_samples: rows to draw; all if there are fewer. An iterable data set is read from its start.
        seed: of the draw.

    Raises:
        ValueError: if the data set is empty.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> loader = DataLoader([{"x": torch.tensor(i)} for i in range(9)], batch_size=4)
        >>> [len(batch["x"]) for batch in training_batches(loader, 6, seed=0)]
        [4, 2]
    """
    dataset: Any = loader.dataset
    with undisturbed():
        if hasattr(dataset, "__getitem__") and isinstance(dataset, Sized):
            size = len(dataset)
            rows = [loader.dataset[i] for i in random.Random(seed).sample(range(size), min(num_samples, size))]
        else:
            rows = list(islice(iter(dataset), num_samples))
        if not rows:
            raise ValueError("The training set is empty, so there is nothing to calibrate with.")
        size = getattr(loader, "batch_size", None) or getattr(loader.batch_sampler, "batch_size", None) or 8
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        torch.manual_seed(seed)  # a collator may draw masks
        return [dict(loader.collate_fn(rows[i : i + size])) for i in range(0, len(rows), size)]


@contextmanager
def undisturbed() -> Iterator[None]:
    """Put every random number generator back to where it was."""
    python, array = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(array)
