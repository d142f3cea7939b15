"""See what enters the matrices of experts: parameters of one module, one behind the other, and no modules of their own.

Hooks see what enters a module; here the multiplication itself is seen, whichever of transformers' ways to run experts
(eager, batched, grouped) does it. No scores are made here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from hf_cka.anatomy.stacks import running_as
from hf_cka.modeling.modeling_hf_cka import main_input

#: gets (rows, features) and, where it was seen, which row of the experts' input each of them is; and that input.
#: What it returns, if anything, takes the place of the rows
Tap = Callable[[torch.Tensor, "torch.Tensor | None", torch.Tensor], "torch.Tensor | None"]

_PRODUCTS = frozenset({"linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm"})
_GROUPED = frozenset({"grouped_mm", "_grouped_mm", "grouped_mm_fallback"})


def watched(module: nn.Module, attribute: str, axis: int, tap: Tap) -> AbstractContextManager[None]:
    """Hand over what is multiplied with a parameter of experts, whenever their module runs.

    Args:
        module: holds the parameter.
        attribute: its name there; ``(experts, ...)``.
        axis: of the parameter, along which the features lie.
        tap: called once for every multiplication: once per expert, or once for all.
    """
    forward = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        with _Products(lambda: getattr(module, attribute), axis, main_input(args, kwargs), tap):
            return forward(*args, **kwargs)

    return running_as(module, run)


class _Products(TorchFunctionMode):
    """Recognises multiplications with a parameter by its memory."""

    def __init__(self, parameter: Callable[[], torch.Tensor], axis: int, hidden: torch.Tensor, tap: Tap) -> None:
        super().__init__()
        self.parameter, self.axis, self.hidden, self.tap = parameter, axis, hidden, tap
        # copies of some experts' matrices; held, so that no other tensor takes their place in memory
        self.copies: list[torch.Tensor] = []
        self.selected: torch.Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _PRODUCTS or any(name.startswith(known) for known in _GROUPED):
            args = self._multiplied(2 if name in ("addmm", "baddbmm") else 1, args)
        out = func(*args, **kwargs)
        if name == "__getitem__":
            self._indexed(args[0], args[1], out)
        elif name == "repeat_interleave":
            self._repeated(args, kwargs)
        return out

    def _is_weight(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and any(_same(value, own) for own in (self.parameter(), *self.copies))

    def _indexed(self, source: Any, index: Any, out: Any) -> None:
        if self._is_weight(source) and isinstance(out, torch.Tensor) and not self._is_weight(out):
            self.copies.append(out)
        elif (
            self._is_input(source) and isinstance(index, torch.Tensor) and (index.ndim, index.dtype) == (1, torch.long)
        ):
            self.selected = index

    def _repeated(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Every token once for each of its experts, one after the other."""
        if args and self._is_input(args[0]) and kwargs.get("dim") == 0 and len(args) > 1 and type(args[1]) is int:
            self.selected = torch.arange(len(args[0])).repeat_interleave(args[1])

    def _is_input(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.ndim == 2 and _same(value, self.hidden)

    def _multiplied(self, right: int, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(args) <= right:
            return args
        if self._is_weight(args[right]):
            place, axis = right - 1, -1
        elif self._is_weight(args[right - 1]):
            place, axis = right, -2
        else:
            return args
        rows = args[place]
        if rows.ndim < 2 or rows.shape[axis] != self.parameter().shape[self.axis]:
            return args
        last = rows if axis == -1 else rows.transpose(-1, -2)
        values = last.reshape(-1, last.shape[-1])
        selected = self.selected if self.selected is not None and len(self.selected) == len(values) else None
        changed = self.tap(values, selected, self.hidden)
        if changed is None:
            return args
        new = changed.reshape(last.shape)
        return (*args[:place], new if axis == -1 else new.transpose(-1, -2), *args[place + 1 :])


def _same(one: torch.Tensor, two: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == two.untyped_storage().data_ptr()
