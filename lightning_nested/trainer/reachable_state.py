"""Copies of all that can be reached from a module, so that an evaluation of a user's code leaves nothing behind."""

from __future__ import annotations

import array
import io
import operator
import random
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import lru_cache, partial
from types import CellType, FunctionType, MethodType
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchmetrics import Metric

# Libraries whose plain objects an evaluation may share with the rest of the run. Their modules are looked into.
_FOREIGN = frozenset(
    "builtins asyncio concurrent dask jax lightning lightning_fabric lightning_nested lightning_utilities logging "
    "matplotlib mlflow multiprocessing neptune pandas pytorch_lightning queue ray socket subprocess tensorboard "
    "threading torch tqdm wandb weakref".split()
)
_ELSEWHERE = (Callback, LightningDataModule, Logger, Dataset, DataLoader, Sampler, Enum, BaseException, type)
# An object that holds one of these belongs to other threads or processes too.
_SHARED = (
    io.IOBase,
    threading.Thread,
    threading.Event,
    threading.Condition,
    type(threading.Lock()),
    type(threading.RLock()),
)
_HOOKS_OF_EVERY_MODULE = frozenset(k for k, v in nn.Module().__dict__.items() if k.endswith("hooks"))
# Bytes from which a tensor is copied only when it is written to.
_LAZY = 2**16
# A list of many small tensors is copied in one piece: entries from, bytes up to.
_MANY, _FEW_BYTES = 64, 2**24
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
        self._trained, self._copies = set(map(id, trained)), copies
        self._undo: list[Callable[[], object]] = []
        # Objects by their id, which stays theirs while they are held here.
        self.seen: dict[int, object] = {}
        self._tensors: dict[int, tuple[Tensor, Tensor]] = {}
        self._storages: dict[int, torch.UntypedStorage] = {}
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
        handler = _handler(type(value))
        return value if handler is None else handler(self, value)

    # ---- containers

    def _list(self, value: list[Any]) -> None:
        saved = list(value)
        self._undo.append(partial(list.__setitem__, value, slice(None), saved))
        if not (_worth_a_look(saved) and not self._many(saved)):
            return
        copies = list(map(self.copy_of, saved))
        if any(map(operator.is_not, copies, saved)):
            list.__setitem__(value, slice(None), copies)

    def _deque(self, value: deque[Any]) -> None:
        saved = list(value)
        self._undo.append(partial(_refill, value, deque.extend, saved))
        if _worth_a_look(saved):
            _refill(value, deque.extend, list(map(self.copy_of, saved)))

    def _set(self, value: set[Any]) -> None:
        saved = list(value)
        self._undo.append(partial(_refill, value, set.update, saved))
        # Not replaced: a tensor in a set is found by its identity.
        for each in saved if _worth_a_look(saved) else ():
            self.copy_of(each)

    def _dict(self, value: dict[Any, Any]) -> None:
        saved = dict(value)
        kind = OrderedDict if isinstance(value, OrderedDict) else dict
        self._undo.append(partial(_refill, value, kind.update, saved))
        self._replace(saved, partial(kind.__setitem__, value))

    def _tuple(self, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if not _worth_a_look(value):
            return value
        copies = tuple(map(self.copy_of, value))
        if not any(map(operator.is_not, copies, value)):
            return value
        if type(value) is tuple:
            return copies
        make = getattr(value, "_make", None)
        return value if make is None else make(copies)

    def _replace(self, held: dict[Any, Any], put: Callable[[Any, Any], object]) -> None:
        if not _worth_a_look(held.values()):
            return
        for key, each in held.items():
            copy = self.copy_of(each)
            if copy is not each:
                put(key, copy)

    # ---- objects

    def _attributes(self, value: Any) -> None:
        """Visit an object of a user's class, unless other threads or processes may use it too."""
        held = getattr(value, "__dict__", {})
        if any(issubclass(kind, _SHARED) for kind in set(map(type, held.values()))):
            return
        if held:
            self._namespace(held)
        slots = {name: getattr(value, name) for name in _slots(type(value)) if hasattr(value, name)}
        for name, each in slots.items():
            self._undo.append(partial(object.__setattr__, value, name, each))
        self._replace(slots, partial(object.__setattr__, value))
        self._class_of(value)

    def _module(self, value: nn.Module) -> None:
        if isinstance(value, torch.jit.ScriptModule):
            # Its attributes are not Python's.
            for held in (value._buffers, value._parameters):
                saved = dict(held.items())
                self._undo.extend(partial(held.__setitem__, key, each) for key, each in saved.items())
                self._replace(saved, held.__setitem__)
            return
        self._namespace(value.__dict__)
        self._class_of(value)

    def _namespace(self, held: dict[str, Any]) -> None:
        saved = dict(held)
        self._undo.append(partial(_restore_names, held, saved))
        # A model has very many empty dictionaries of hooks.
        reached = {k: v for k, v in saved.items() if k not in _HOOKS_OF_EVERY_MODULE or v}
        self._replace(reached, held.__setitem__)

    def _class_of(self, value: object) -> None:
        """Visit the class attributes of the user's own classes."""
        for kind in type(value).__mro__:
            if id(kind) in self.seen or _is_foreign(kind):
                continue
            self.seen[id(kind)] = kind
            saved = {k: v for k, v in vars(kind).items() if _is_data(k, v)}
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

    # ---- numbers

    def _tensor(self, value: Tensor) -> Tensor:
        if not self._copies:
            return value
        known = self._tensors.get(id(value))
        if known is None:
            known = self._tensors[id(value)] = value, self._copy_of_tensor(value)
        return known[1]

    def _copy_of_tensor(self, value: Tensor) -> Tensor:
        if value.requires_grad:
            if not value.is_leaf:
                with torch.enable_grad():
                    return value.clone()
            gradient = value.grad
            # A graph needs the tensor itself.
            before = None if id(value) in self._trained else self._copied_when_written(value)
            self._undo.append(partial(_restore_leaf, value, gradient, before))
            if gradient is not None:
                value.grad = self._tensor(gradient)
            return value
        copy = self._copied_when_written(value)
        if isinstance(value, nn.Parameter):
            copy = nn.Parameter(copy, requires_grad=False)
        if value.__dict__:
            copy.__dict__.update(value.__dict__)
        return copy

    def _copied_when_written(self, value: Tensor) -> Tensor:
        lazily = getattr(torch, "_lazy_clone", None)
        value = value.detach()
        if lazily is None or value.layout != torch.strided or value.is_conj() or value.is_neg():
            return value.clone()
        storage = value.untyped_storage()
        if storage.nbytes() < _LAZY:
            return value.clone()
        # Tensors that share memory share it in their copies too: a view, or the weights of an RNN on a GPU.
        shared = self._storages.get(storage._cdata)
        if shared is None:
            copy: Tensor = lazily(value)
            self._storages[storage._cdata] = copy.untyped_storage()
            return copy
        return value.new_empty(0).set_(shared, value.storage_offset(), value.size(), value.stride())

    def _many(self, values: list[Any]) -> bool:
        """Copy many small tensors of one shape at once; return False if the values are not such."""
        if not self._copies or len(values) < _MANY or set(map(type, values)) != {Tensor}:
            return False
        size = len(values) * values[0].nbytes
        if size > _FEW_BYTES or len({t.dtype for t in values}) > 1 or any(t.requires_grad for t in values):
            return False
        if not self._tensors.keys().isdisjoint(map(id, values)):
            return False
        try:
            saved = torch.stack(values)
        # Other shapes or devices.
        except RuntimeError:
            return False
        self._tensors.update((id(t), (t, t)) for t in values)
        self._undo.append(partial(_restore_many, values, saved))
        return True

    def _array(self, value: np.ndarray[Any, Any]) -> None:
        if not (self._copies and value.flags.writeable):
            return
        if value.nbytes <= _DATA:
            self._undo.append(partial(np.copyto, value, value.copy()))
        elif value.flags.owndata:
            value.flags.writeable = False
            self._undo.append(partial(setattr, value.flags, "writeable", True))

    def _bytes(self, value: bytearray | array.array[Any]) -> None:
        self._undo.append(partial(operator.setitem, value, slice(None), value[:]))  # type: ignore[misc]

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
    )
    ATTRIBUTES: ClassVar[Handler] = _once(_attributes)


@lru_cache(maxsize=None)
def _handler(kind: type) -> Handler | None:
    if issubclass(kind, Tensor):
        # Other subclasses hold more than their numbers.
        return ReachableState.HANDLERS[0][1] if kind in (Tensor, nn.Parameter) else None
    for kinds, handler in ReachableState.HANDLERS:
        if issubclass(kind, kinds):
            return handler
    if issubclass(kind, (*_ELSEWHERE, *_SHARED)):
        return None
    if _is_foreign(kind) and not issubclass(kind, torch.optim.Optimizer):
        return None
    has_attributes = kind.__dictoffset__ != 0 or bool(_slots(kind))
    return ReachableState.ATTRIBUTES if has_attributes else None


def _is_foreign(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in _FOREIGN


@lru_cache(maxsize=None)
def _slots(kind: type) -> tuple[str, ...]:
    found = (vars(base).get("__slots__", ()) for base in kind.__mro__ if not _is_foreign(base))
    names = (name for slots in found for name in ([slots] if isinstance(slots, str) else slots))
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def _worth_a_look(values: Iterable[Any]) -> bool:
    return any(_handler(kind) is not None for kind in set(map(type, values)))


def _is_data(name: str, value: object) -> bool:
    """Return True for a class attribute that is neither a method nor Python's own."""
    return not name.startswith("__") and not callable(value) and not hasattr(value, "__get__")


def _refill(value: Any, add: Callable[[Any, Any], object], content: Any) -> None:
    value.clear()
    add(value, content)


def _restore_names(held: dict[str, Any], saved: dict[str, Any]) -> None:
    for key in held.keys() - saved.keys():
        del held[key]
    held.update(saved)


def _restore_class(kind: type, saved: dict[str, Any]) -> None:
    for key in [k for k, v in vars(kind).items() if _is_data(k, v) and k not in saved]:
        delattr(kind, key)
    for key, value in saved.items():
        if vars(kind).get(key) is not value:
            setattr(kind, key, value)


def _restore_leaf(value: Tensor, gradient: Tensor | None, before: Tensor | None) -> None:
    if value.grad is not gradient:
        value.grad = gradient
    if before is not None and not torch.equal(value.detach(), before):
        with torch.no_grad():
            value.copy_(before)
    value.requires_grad_(True)


def _restore_many(values: list[Tensor], saved: Tensor) -> None:
    if torch.equal(torch.stack(values), saved):
        return
    for value, before in zip(values, saved, strict=True):
        if not torch.equal(value, before):
            with torch.no_grad():
                value.copy_(before)
