"""A teacher's answers on disk, so that each row of a data set is asked once. What is learnt from them is elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from hf_cka.pruning.history import model_digest
from hf_cka.representations.running import token_mask
from hf_cka.training.divergence import most_likely, teacher_divergence, top_divergence

_META = "teacher.json"
_FORMAT = 1
# inputs that say where texts end which a collator joined in one row
_JOINED = ("position_ids", "cu_seq_lens_q", "seq_idx")


class TeacherCache:
    """Answers of a teacher by row: found by what the row holds, whatever its place in the data and its padding.

    There is one file a row, written at once or not at all, so that several processes and interrupted runs can share a
    folder. Kept are, at every position with a label, all logits in the teacher's dtype (4 bytes x vocabulary in
    float32: 200 kB a token at 50 000 tokens), or with ``top_k`` 8 bytes x k + 4 (0.5 kB a token at 64).

    Args:
        folder: made if it is not there.
        teacher: the model.
        top_k: keep only so many of the most likely classes, and the others as one.
        temperature: of teacher and student. With ``top_k`` it is applied before the others are joined, so that such a
            cache serves one temperature; all logits serve any.

    Raises:
        ValueError: if the folder holds answers of another teacher, or other ones.

    Example:
        >>> cache = TeacherCache("answers", dense, top_k=64)  # doctest: +SKIP
    """

    def __init__(
        self, folder: str | os.PathLike[str], teacher: Any, *, top_k: int | None = None, temperature: float = 1.0
    ) -> None:
        self.folder, self.top_k, self.temperature = Path(folder), top_k, temperature
        meta = {
            "format_version": _FORMAT,
            "teacher": model_digest(teacher),
            "dtype": str(teacher.dtype),
            "top_k": top_k,
            "temperature": None if top_k is None else temperature,
        }
        path = self.folder / _META
        if path.exists():
            known = json.loads(path.read_text())
            differ = [
                f"{name} is {known.get(name)!r} there, {value!r} here"
                for name, value in meta.items()
                if known.get(name) != value
            ]
            if differ:
                raise ValueError(
                    f"The folder {str(folder)!r} holds other answers: {'; '.join(differ)}. Choose another cache_dir."
                )
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            _at_once(path, lambda scratch: scratch.write_text(json.dumps(meta, indent=1) + "\n"))

    def divergence(
        self,
        student: torch.Tensor,
        inputs: Mapping[str, Any],
        keep: torch.Tensor,
        ask: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """Return the divergence of a student from the teacher, summed over positions, in nats.

        Args:
            student: logits, ``(batch, ..., classes)``.
            inputs: of the model, without labels.
            keep: ``(batch, ...)``, true where a position counts.
            ask: returns the teacher's logits for the batch; called if a row of it is new.

        Raises:
            ValueError: if the batch joins several texts in one row, or ``top_k`` is not below the number of classes.
        """
        from safetensors.torch import load_file

        paths = [self.folder / name[:2] / f"{name}.safetensors" for name in row_digests(inputs, keep)]
        new = [row for row, path in enumerate(paths) if not path.exists()]
        if new:
            logits = ask().clone()
            for row in new:
                self._write(paths[row], logits[row][keep[row]])
        found = [load_file(path) for path in paths]
        answers = {name: torch.cat([part[name] for part in found]).to(student.device) for name in found[0]}
        student = student[keep]
        if self.top_k is None:
            everywhere = torch.ones(len(student), dtype=torch.bool, device=student.device)
            return teacher_divergence(student, answers["logits"], everywhere, self.temperature)
        indices = answers["indices"].long()
        return top_divergence(student, answers["log_probabilities"], indices, self.temperature)

    @torch.no_grad()
    def _write(self, path: Path, logits: torch.Tensor) -> None:
        from safetensors.torch import save_file

        tensors = {"logits": logits}
        if self.top_k is not None:
            if self.top_k >= logits.shape[-1]:
                raise ValueError(
                    f"cache_top_k={self.top_k} must be below the number of classes, {logits.shape[-1]}. Leave it "
                    "out to keep all."
                )
            values, indices = most_likely((logits.float() / self.temperature).log_softmax(dim=-1), self.top_k)
            tensors = {"log_probabilities": values, "indices": indices.int()}
        path.parent.mkdir(exist_ok=True)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        _at_once(path, lambda scratch: save_file(tensors, scratch))


def row_digests(inputs: Mapping[str, Any], keep: torch.Tensor) -> list[str]:
    """Return one digest a row: of all that the model reads there but padding, and of the positions that count.

    Args:
        inputs: of the model, without labels.
        keep: ``(batch, ...)``, true where a position counts.

    Raises:
        ValueError: if several texts are joined in one row.

    Example:
        >>> keep = torch.tensor([[True, True]])
        >>> short = row_digests({"input_ids": torch.tensor([[5, 6]])}, keep)
        >>> padded = {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
        >>> short == row_digests(padded, torch.tensor([[True, True, False]]))
        True
    """
    joined = [name for name in _JOINED if name in inputs]
    if joined:
        raise ValueError(
            f"The batch holds {joined[0]}: several texts are joined in one row, and the cache finds answers by row. "
            "Use a collator that pads, or leave cache_dir out."
        )
    mask = token_mask(inputs)
    tensors = {name: value.cpu() for name, value in sorted(inputs.items()) if isinstance(value, torch.Tensor)}
    tensors.pop("attention_mask", None)
    digests = []
    for row, real in enumerate(mask):
        places = real.nonzero().flatten()
        parts = [places - places[0], torch.atleast_1d(keep[row].cpu()).nonzero().flatten() - places[0]]
        parts += [value[row][real] if value.shape[:2] == mask.shape else value[row] for value in tensors.values()]
        digest = hashlib.sha256(" ".join(tensors).encode())
        for part in parts:
            digest.update(f"{tuple(part.shape)}".encode() + part.double().contiguous().numpy().tobytes())
        digests.append(digest.hexdigest())
    return digests


def _at_once(path: Path, write: Callable[[Path], Any]) -> None:
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    write(scratch)
    os.replace(scratch, path)
