"""What a model reads at once: padded batches, what they were made of, and the digest of each sample.

No file is read here, and no text is turned into tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

Batch = Mapping[str, Any]
Row = Mapping[str, Any]

# what a model may read, the first one that is there first; each has one entry a sample
MAIN_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values")
_MASKED = ("input_ids", "inputs_embeds", "input_features", "input_values")  # those that are padded along axis 1
_MASKS = ("attention_mask", "padding_mask")
_ANSWERS = ("labels", "label")


@dataclass(frozen=True)
class CalibrationInfo:
    """What calibration data was: enough to say in a record, never the data itself.

    Args:
        num_samples: rows that were measured.
        num_tokens: their tokens, padding not counted.
        hash: digest of the samples' token ids, the same for any batch size, padding and order.
        source: where the rows came from, as far as it is known.
        seed: of the draw, if there was one.
        max_length: tokens after which rows were cut, if they were.
    """

    num_samples: int
    num_tokens: int
    hash: str
    source: str | None = None
    seed: int | None = None
    max_length: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON data."""
        return asdict(self)


class CalibrationBatches(list[dict[str, torch.Tensor]]):
    """A list of model-ready batches that remembers where it came from.

    Args:
        batches: dicts of tensors.
        source: name of the data.
        seed: of the draw.
        max_length: tokens after which rows were cut.
        skipped: names of the samples that could not be read.
    """

    def __init__(
        self,
        batches: Iterable[dict[str, torch.Tensor]],
        *,
        source: str | None = None,
        seed: int | None = None,
        max_length: int | None = None,
        skipped: Sequence[str] = (),
    ) -> None:
        super().__init__(batches)
        self.source, self.seed, self.max_length, self.skipped = source, seed, max_length, tuple(skipped)

    @property
    def num_samples(self) -> int:
        """Samples in all batches.

        Example:
            >>> batches = [{"pixel_values": torch.zeros(3, 1, 2, 2)}, {"input_ids": torch.ones(2, 4)}]
            >>> CalibrationBatches(batches).num_samples
            5
        """
        return sum(map(batch_rows, self))


def batch_rows(batch: Batch) -> int:
    """Return how many samples a batch holds.

    Args:
        batch: a model-ready dict.

    Raises:
        ValueError: if there is nothing in it that a model reads.

    Example:
        >>> batch_rows({"labels": torch.zeros(2), "pixel_values": torch.zeros(2, 3, 8, 8)})
        2
    """
    for name in (*MAIN_INPUTS, *batch):  # models of other things have other inputs
        value = batch.get(name)
        if isinstance(value, torch.Tensor) and value.ndim and name not in _ANSWERS:
            return len(value)
    raise ValueError(
        f"The batch holds none of {', '.join(MAIN_INPUTS)}, or another tensor that a model reads; its keys are: "
        f"{', '.join(batch)}."
    )


def pad(sequences: Sequence[Sequence[int]], value: int, side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """Pad token ids to one length and return them with their attention mask, each ``(rows, longest)``.

    Example:
        >>> ids, mask = pad([[5, 6], [7]], 0, "left")
        >>> ids.tolist(), mask.tolist()
        ([[5, 6], [0, 7]], [[1, 1], [0, 1]])
    """
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), value, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        place = slice(longest - len(sequence), longest) if side == "left" else slice(0, len(sequence))
        ids[row, place] = torch.tensor(sequence, dtype=torch.long)
        mask[row, place] = 1
    return ids, mask


def decoder_inputs(targets: Sequence[Sequence[int]], start: int, filler: int) -> dict[str, torch.Tensor]:
    """Return what the decoder of an encoder-decoder reads for targets: themselves, shifted right by one place.

    Args:
        targets: token ids of each row; an empty one gives the start token alone.
        start: the decoder's start token.
        filler: what to pad with.

    Returns:
        ``decoder_input_ids`` and ``decoder_attention_mask``, each ``(rows, longest target)``.

    Example:
        >>> decoder_inputs([[5, 6, 2], [7, 2]], start=1, filler=0)["decoder_input_ids"].tolist()
        [[1, 5, 6], [1, 7, 0]]
    """
    ids, mask = pad([[start, *target[:-1]] for target in targets], filler)
    return {"decoder_input_ids": ids, "decoder_attention_mask": mask}


def sample_digests(input_ids: torch.Tensor, mask: torch.Tensor) -> list[str]:
    """Return one digest a row of the tokens that the mask keeps, whatever the padding.

    Args:
        input_ids: ``(batch, tokens)``.
        mask: ``(batch, tokens)``, true where there is a token.

    Example:
        >>> ids, mask = torch.tensor([[0, 5, 6]]), torch.tensor([[0, 1, 1]])
        >>> sample_digests(ids, mask) == sample_digests(torch.tensor([[5, 6]]), torch.tensor([[1, 1]]))
        True
    """
    return batch_digests({"input_ids": input_ids}, mask)


def batch_digests(batch: Batch, mask: torch.Tensor | None = None) -> list[str]:
    """Return one digest a sample of what a model reads: tokens, pixels, sound, and what its decoder starts from.

    Padding does not count where a mask says what is padding. Tokens alone give the digest of :func:`sample_digests`.

    Args:
        batch: a model-ready dict.
        mask: ``(batch, positions)``, true where there is something; by default the batch's own attention mask. Of
            inputs with another number of positions (the frames a model makes of sound) the batch's own counts.

    Returns:
        As many digests as there are samples; empty ones for a batch that holds no known input.

    Example:
        >>> pixels = torch.rand(2, 3, 4, 4)
        >>> one, two = batch_digests({"pixel_values": pixels})
        >>> one == two, batch_digests({"pixel_values": pixels[1:]}) == [two]
        (False, True)
    """
    masks = [given for given in (mask, *(batch.get(name) for name in _MASKS)) if isinstance(given, torch.Tensor)]
    rows = next((len(batch[name]) for name in MAIN_INPUTS if isinstance(batch.get(name), torch.Tensor)), None)
    if rows is None:
        return [""] * (len(masks[0]) if masks else 0)
    digests = [hashlib.sha256() for _ in range(rows)]
    decoder_mask = batch.get("decoder_attention_mask")
    for name in (*MAIN_INPUTS, "decoder_input_ids"):
        value = batch.get(name)
        # some processors join the patches of all images: those belong to no row
        if not isinstance(value, torch.Tensor) or len(value) != rows:
            continue
        value = value.cpu()
        value = value.to(torch.float32 if value.is_floating_point() else torch.int64)
        candidates = masks if name in _MASKED else [decoder_mask] if name == "decoder_input_ids" else []
        keep = next((m.cpu().bool() for m in candidates if m is not None and m.shape == value.shape[:2]), None)
        for index, digest in enumerate(digests):
            row = value[index] if keep is None else value[index][keep[index]]
            digest.update(row.contiguous().numpy().tobytes())
    return [digest.hexdigest() for digest in digests]
