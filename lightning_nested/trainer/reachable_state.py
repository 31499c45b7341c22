"""Copies of all that can be reached from a module, so that an evaluation of a user's code leaves nothing behind."""

from __future__ import annotations

import array
import operator
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import CellType, FunctionType, MethodType
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_nested.trainer.replayed import Replayed
from lightning_nested.trainer.tensor_copies import TensorCopies
from lightning_nested.trainer.user_objects import (
    has_own_attributes,
    is_data,
    is_foreign,
    is_plain_iterator,
    is_shared,
    slots,
)

_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)
_HOOKS = frozenset(name for name in _OF_EVERY_MODULE if "hooks" in name)
# Bytes from which a NumPy array is write-protected instead of copied.
_DATA = 2**26

Handler: TypeAlias = Callable[["ReachableState", Any], Any]


def _once(visit: Callable[[Any, Any], None]) -> Handler:
    """Return a handler that visits an object once, later, and replaces nothing: names may go on holding it."""

    def handler(state: ReachableState, value: Any) -> Any:
        if id(value) not in state.seen:
            state.seen[id(value)] = value
            state.visits.append(partial(visit, state, value))
        return value

    return handler


@contextmanager
def untouched_state(*roots: object, trained: Iterable[Tensor] = ()) -> Iterator[None]:
    """Restore on exit all that can be reached from ``roots``, usually a module.

    Reached are submodules, metrics and networks that are registered nowhere, through attributes, lists, tuples, dicts,
    sets, deques, closures, bound methods, class attributes and plain objects of the user's own classes. Restored are
    bindings and contents, buffers, frozen parameters, plain tensors, NumPy arrays, generators of random numbers, modes,
    ``requires_grad`` and ``.grad``. Not looked into are objects of the Trainer, data sets and loaders, and what holds
    a lock, a thread or an open file; a NumPy array above 64 MB is read-only inside.

    Tensors without gradients are replaced by copies until exit and never written back, so a graph from inside stays
    valid. The copies share memory with the originals until they are written to.

    Args:
        roots: Objects to start from.
        trained: Parameters that an optimizer of the run moves: only their values are left alone.
    """
    state = ReachableState(trained)
    try:
        state.keep(roots)
        yield
    finally:
        state.restore()


@contextmanager
def untouched_networks(*roots: object, trained: Iterable[Tensor] = ()) -> Iterator[None]:
    """Restore on exit the networks and metrics that can be reached: buffers, frozen parameters, states of metrics.

    For the losses of our own modules, which are steps of a user's loop: its attributes are left as the loss made them.
    See :func:`untouched_state`.
    """
    search = ReachableState(copies=False)
    search.keep(roots)
    modules = [each for each in search.seen.values() if isinstance(each, nn.Module)]
    metrics = [each for each in modules if isinstance(each, Metric)]
    numbers = [held for each in modules for held in (each._buffers, each._parameters) if held]
    with untouched_state(*metrics, *numbers, trained=trained):
        yield


class ReachableState:
    """Walk over objects, each visited once, that collects how to restore them, or with ``copies=False`` only them."""

    def __init__(self, trained: Iterable[Tensor] = (), *, copies: bool = True) -> None:
        self._copies = copies
        self._undo: list[Callable[[], object]] = []
        self._tensors = TensorCopies(trained, self._undo)
        # Objects by their id, which stays theirs while they are held here.
        self.seen: dict[int, object] = {}
        self._iterators: dict[int, Replayed] = {}
        self.visits: list[Callable[[], None]] = []

    def keep(self, roots: Iterable[object]) -> None:
        """Visit all that is reached from ``roots``."""
        for root in roots:
            self.copy_of(root)
        while self.visits:
            self.visits.pop()()

    def restore(self) -> None:
        """Restore everything that was visited."""
        while self._undo:
            self._undo.pop()()

    def copy_of(self, value: Any) -> Any:
        """Return what replaces a value: the copy of a tensor, a tuple with such copies, else the value itself."""
        handler = _handler(type(value))  # type: ignore[arg-type]
        return value if handler is None else handler(self, value)

    def _leads_on(self, values: Iterable[Any]) -> bool:
        """Return True unless all values are such as cannot change: most containers hold nothing else."""
        kinds = set(map(type, values))
        if not self._copies:
            kinds.discard(Tensor)
        return any(map(_handler, kinds))

    # ---- containers

    def _list(self, value: list[Any]) -> None:
        saved = list(value)
        self._undo.append(partial(list.__setitem__, value, slice(None), saved))
        if self._leads_on(saved) and not (self._copies and self._tensors.keep_many(saved)):
            self._replace(dict(enumerate(saved)), partial(list.__setitem__, value), saved)

    def _deque(self, value: deque[Any]) -> None:
        saved = list(value)
        self._undo.append(partial(_refill, value, deque.extend, saved))
        if self._leads_on(saved):
            _refill(value, deque.extend, list(map(self.copy_of, saved)))

    def _set(self, value: set[Any]) -> None:
        saved = list(value)
        self._undo.append(partial(_refill, value, set.update, saved))
        # Not replaced: a tensor in a set is found by its identity.
        for each in saved if self._leads_on(saved) else ():
            self.copy_of(each)

    def _dict(self, value: dict[Any, Any]) -> None:
        saved = dict(value)
        kind = OrderedDict if isinstance(value, OrderedDict) else dict
        self._undo.append(partial(_refill, value, kind.update, saved))
        self._replace(saved, partial(kind.__setitem__, value))

    def _tuple(self, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if not self._leads_on(value):
            return value
        copies = tuple(map(self.copy_of, value))
        if not any(map(operator.is_not, copies, value)):
            return value
        if type(value) is tuple:
            return copies
        make = getattr(value, "_make", None)
        return value if make is None else make(copies)

    def _replace(
        self, held: dict[Any, Any], put: Callable[[Any, Any], object], saved: Any | None = None
    ) -> None:
        """Put copies in the place of values; ``saved`` is what will be restored, ``held`` itself unless it is given."""
        if not self._leads_on(held.values()):
            return
        for key, each in list(held.items()):
            copy = self.copy_of(each)
            if copy is not each:
                put(key, copy)
                # Stays in the place of the iterator, whose items it may hold.
                if isinstance(copy, Replayed):
                    (held if saved is None else saved)[key] = copy

    # ---- objects

    def _attributes(self, value: Any) -> None:
        """Visit an object of a user's class, unless other threads or processes may use it too."""
        if is_shared(value):
            return
        if hasattr(value, "__dict__"):
            self._namespace(value.__dict__)
        names = slots(type(value))  # type: ignore[arg-type]
        if names:
            saved = {name: getattr(value, name) for name in names if hasattr(value, name)}
            self._undo.append(partial(_restore_slots, value, names, saved))
            self._replace(saved, partial(object.__setattr__, value))
        self._class_of(value)

    def _module(self, value: nn.Module) -> None:
        if isinstance(value, torch.jit.ScriptModule):
            # Its attributes are not Python's.
            numbers: tuple[Any, ...] = value._buffers, value._parameters
            for held in numbers:
                saved = dict(held.items())
                self._undo.extend(partial(held.__setitem__, key, each) for key, each in saved.items())
                self._replace(saved, held.__setitem__)
            return
        # A model has very many dictionaries that are empty and stay so.
        self._namespace(value.__dict__, _OF_EVERY_MODULE if is_foreign(type(value)) else _HOOKS)
        self._class_of(value)

    def _namespace(self, held: dict[str, Any], unless_empty: Collection[str] = ()) -> None:
        saved = dict(held)
        self._undo.append(partial(_restore_names, held, saved))
        reached = {k: v for k, v in saved.items() if k not in unless_empty or v}
        self._replace(reached, held.__setitem__, saved)

    def _class_of(self, value: object) -> None:
        """Visit the class attributes of the user's own classes."""
        if id(type(value)) in self.seen:
            return
        for kind in type(value).__mro__:
            if id(kind) in self.seen:
                continue
            self.seen[id(kind)] = kind
            if is_foreign(kind):
                continue
            saved = {k: v for k, v in vars(kind).items() if is_data(k, v)}
            self._undo.append(partial(_restore_class, kind, saved))
            self._replace(saved, partial(setattr, kind))

    def _function(self, value: FunctionType) -> None:
        for each in (value.__defaults__, value.__kwdefaults__):
            self.copy_of(each)
        for cell in value.__closure__ or ():
            self.copy_of(cell)

    def _cell(self, value: CellType) -> None:
        try:
            saved = value.cell_contents
        # A name that is not assigned yet.
        except ValueError:
            return
        self._undo.append(partial(setattr, value, "cell_contents", saved))
        value.cell_contents = self.copy_of(saved)

    def _method(self, value: MethodType) -> None:
        self.copy_of(value.__self__)
        self.copy_of(value.__func__)

    def _partial(self, value: partial[Any]) -> None:
        for each in (value.func, value.args, value.keywords):
            self.copy_of(each)

    def _iterator(self, value: Iterator[Any]) -> Iterator[Any]:
        if not self._copies:
            return value
        known = self._iterators.get(id(value))
        if known is None:
            known = self._iterators[id(value)] = value if isinstance(value, Replayed) else Replayed(value)
            known.begin()
            self._undo.append(known.give_back)
        return known

    # ---- numbers

    def _tensor(self, value: Tensor) -> Tensor:
        return self._tensors.copy_of(value) if self._copies else value

    def _array(self, value: np.ndarray[Any, Any]) -> None:
        if not (self._copies and value.flags.writeable):
            return
        if value.nbytes <= _DATA:
            self._undo.append(partial(np.copyto, value, value.copy()))
        elif value.flags.owndata:
            value.flags.writeable = False
            self._undo.append(partial(setattr, value.flags, "writeable", True))

    def _bytes(self, value: bytearray | array.array[Any]) -> None:
        self._undo.append(partial(operator.setitem, value, slice(None), value[:]))

    def _generator(self, value: torch.Generator) -> None:
        self._undo.append(partial(value.set_state, value.get_state()))

    def _numpy_generator(self, value: np.random.Generator) -> None:
        bits = value.bit_generator
        self._undo.append(partial(setattr, bits, "state", bits.state))

    def _numpy_random(self, value: np.random.RandomState) -> None:
        self._undo.append(partial(value.set_state, value.get_state()))

    def _random(self, value: random.Random) -> None:
        self._undo.append(partial(value.setstate, value.getstate()))

    HANDLERS: ClassVar[tuple[tuple[type | tuple[type, ...], Handler], ...]] = (
        (Tensor, _tensor),
        (nn.Module, _once(_module)),
        (list, _once(_list)),
        (dict, _once(_dict)),
        (tuple, _tuple),
        (deque, _once(_deque)),
        (set, _once(_set)),
        (np.ndarray, _once(_array)),
        ((bytearray, array.array), _once(_bytes)),
        (torch.Generator, _once(_generator)),
        (np.random.Generator, _once(_numpy_generator)),
        (np.random.RandomState, _once(_numpy_random)),
        (random.Random, _once(_random)),
        (FunctionType, _once(_function)),
        (MethodType, _once(_method)),
        (CellType, _once(_cell)),
        (partial, _once(_partial)),
        (Replayed, _iterator),
    )
    ITERATOR: ClassVar[Handler] = _iterator
    ATTRIBUTES: ClassVar[Handler] = _once(_attributes)


@cache
def _handler(kind: type[Any]) -> Handler | None:
    if issubclass(kind, Tensor):
        # Other subclasses hold more than their numbers.
        return ReachableState.HANDLERS[0][1] if kind in (Tensor, nn.Parameter) else None
    for kinds, handler in ReachableState.HANDLERS:
        if issubclass(kind, kinds):
            return handler
    if is_plain_iterator(kind):
        return ReachableState.ITERATOR
    return ReachableState.ATTRIBUTES if has_own_attributes(kind) else None


def _refill(value: Any, add: Callable[[Any, Any], object], content: Any) -> None:
    value.clear()
    add(value, content)


def _restore_names(held: dict[str, Any], saved: dict[str, Any]) -> None:
    for key in held.keys() - saved.keys():
        del held[key]
    held.update(saved)


def _restore_slots(value: object, names: Iterable[str], saved: dict[str, Any]) -> None:
    for name in names:
        if name in saved:
            object.__setattr__(value, name, saved[name])
        elif hasattr(value, name):
            object.__delattr__(value, name)


def _restore_class(kind: type, saved: dict[str, Any]) -> None:
    for key in [k for k, v in vars(kind).items() if is_data(k, v) and k not in saved]:
        delattr(kind, key)
    for key, value in saved.items():
        if vars(kind).get(key) is not value:
            setattr(kind, key, value)
