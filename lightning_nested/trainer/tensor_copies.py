"""Copies of tensors that take the place of the originals during an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

# Bytes from which a tensor is copied only when it is written to.
_LAZY = 2**16
# A list of many small tensors is copied in one piece: entries from, bytes up to.
_MANY, _FEW_BYTES = 64, 2**24


class TensorCopies:
    """Copies of tensors, one for each, that share memory where the originals do.

    A tensor that requires gradients is not copied, for a graph needs the tensor itself: its ``.grad`` and, unless it is
    ``trained``, its value are restored in place.

    Args:
        trained: Parameters that an optimizer of the run moves.
        undo: List to which functions are added that restore what is not replaced by a copy.
    """

    def __init__(self, trained: Iterable[Tensor], undo: list[Callable[[], object]]) -> None:
        self._trained, self._undo = set(map(id, trained)), undo
        # With the originals, whose ids stay theirs while they are held here.
        self._known: dict[int, tuple[Tensor, Tensor]] = {}
        self._storages: dict[int, torch.UntypedStorage] = {}

    def copy_of(self, value: Tensor) -> Tensor:
        """Return the copy of a tensor, or the tensor itself if it is a leaf of graphs."""
        known = self._known.get(id(value))
        if known is None:
            known = self._known[id(value)] = value, self._new_copy(value)
        return known[1]

    def keep_many(self, values: list[Any]) -> bool:
        """Keep many small tensors at once, to be restored in place; return False if the values are not such."""
        if len(values) < _MANY or set(map(type, values)) != {Tensor}:
            return False
        size = len(values) * values[0].nbytes
        if size > _FEW_BYTES or len({t.dtype for t in values}) > 1 or any(t.requires_grad for t in values):
            return False
        if not self._known.keys().isdisjoint(map(id, values)):
            return False
        try:
            saved = _joined(values)
        # Shapes that cannot be joined, or several devices.
        except RuntimeError:
            return False
        self._known.update((id(t), (t, t)) for t in values)
        self._undo.append(partial(_restore_many, values, saved, _versions(*values)))
        return True

    def _new_copy(self, value: Tensor) -> Tensor:
        if value.requires_grad:
            if not value.is_leaf:
                with torch.enable_grad():
                    return value.clone()
            gradient = value.grad
            self._undo.append(partial(_restore_leaf, value, gradient))
            if id(value) not in self._trained:
                self._undo.append(
                    partial(_restore_in_place, [value], [self._numbers(value)], _versions(value))
                )
            if gradient is not None:
                value.grad = self.copy_of(gradient)
            return value
        copy = self._numbers(value)
        if isinstance(value, nn.Parameter):
            copy = nn.Parameter(copy, requires_grad=False)
        if value.__dict__:
            copy.__dict__.update(value.__dict__)
        return copy

    def _numbers(self, value: Tensor) -> Tensor:
        """Return a copy without a graph, which shares memory with the original until one of them is written to."""
        lazily = getattr(torch, "_lazy_clone", None)
        value = value.detach()
        if lazily is None or value.layout != torch.strided or value.is_conj() or value.is_neg():
            return value.clone()
        storage = value.untyped_storage()
        if storage.nbytes() < _LAZY:
            return value.clone()
        # Views of one memory stay views of one, and so do the weights of an RNN on a GPU.
        shared = self._storages.get(storage._cdata)
        if shared is None:
            copy: Tensor = lazily(value)
            self._storages[storage._cdata] = copy.untyped_storage()
            return copy
        return value.new_empty(0).set_(shared, value.storage_offset(), value.size(), value.stride())


def _joined(values: list[Tensor]) -> Tensor:
    return torch.cat(values) if values[0].ndim else torch.stack(values)


def _versions(*values: Tensor) -> AbstractContextManager[None]:
    """Return a context whose exit sets the versions of now: an earlier graph needs what will be there again."""
    try:
        return _unsafe_preserve_version_counter(values)
    # torch 2.5 takes one tensor only.
    except AttributeError:
        each = ExitStack()
        for value in values:
            each.enter_context(_unsafe_preserve_version_counter(value))
        return each


def _restore_leaf(value: Tensor, gradient: Tensor | None) -> None:
    if value.grad is not gradient:
        value.grad = gradient
    value.requires_grad_(True)


def _restore_many(values: list[Tensor], saved: Tensor, versions: AbstractContextManager[None]) -> None:
    if not torch.equal(_joined(values), saved):
        parts = torch.split(saved, [len(value) for value in values]) if values[0].ndim else saved.unbind()
        _restore_in_place(values, parts, versions)


def _restore_in_place(
    values: Sequence[Tensor], saved: Sequence[Tensor], versions: AbstractContextManager[None]
) -> None:
    changed = [(v, s) for v, s in zip(values, saved, strict=True) if not torch.equal(v.detach(), s)]
    if changed:
        with torch.no_grad(), versions:
            for value, before in changed:
                value.copy_(before)
