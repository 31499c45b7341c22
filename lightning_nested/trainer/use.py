"""Use of a callback or module by one Trainer at a time, undone however the run ends."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_nested.hyperparameters.constructed import Constructed
from lightning_nested.trainer.requirements import refuse_other_lightning
from lightning_nested.trainer.stand_ins import StandIns


class Use:
    """Use of one object by one Trainer.

    :meth:`begin` opens it; :meth:`end` calls all that was given to :meth:`at_end`, the last one first. An exception,
    SIGTERM or Ctrl-C ends it too, after the hooks ``on_exception`` of callbacks, so that a checkpoint written there is
    of the object in use. Copies and pickles of the object begin unused.

    Attributes:
        changed: Which of ``"module"``, ``"datamodule"`` and ``"trainer"`` differ from those of the use before; empty
            in the first one.
        searched: True if the Trainer may train before ``on_fit_start`` of the module, in a search for a setting.
    """

    def __init__(self) -> None:
        self.changed: frozenset[str] = frozenset()
        self.searched = False
        self._last: dict[str, Callable[[], object]] = {}  # weak references
        self._undo = ExitStack()
        self._open = False

    def begin(self, owner: object, trainer: Trainer, module: LightningModule) -> None:
        """Open the use of ``owner``.

        Raises:
            MisconfigurationException: Another Trainer that is still running uses the object, or the Trainer is of the
                package ``pytorch_lightning``.
        """
        name = type(owner).__name__
        refuse_other_lightning(trainer, name)
        holder: Any = self._last["trainer"]() if self._open else None
        if holder not in (None, trainer) and holder.state.status == TrainerStatus.RUNNING:
            raise MisconfigurationException(
                f"{name} must be used by one Trainer at a time. Got an object that is in use by another Trainer, whose "
                f"{holder.state.fn.value} has not ended; give each Trainer a {name} of its own."
            )
        self.end()  # where a subclass's teardown did not
        now = {"module": module, "datamodule": getattr(trainer, "datamodule", None), "trainer": trainer}
        of = {key: _NOTHING if value is None else value for key, value in now.items()}
        self.changed = frozenset(key for key, last in self._last.items() if last() is not of[key])
        self._last = {key: weakref.ref(value) for key, value in of.items()}
        self._open = True
        callbacks: list[Callback] = getattr(trainer, "callbacks", [])
        self.searched = any(isinstance(c, LearningRateFinder | BatchSizeFinder) for c in callbacks)
        exceptions = _Exceptions.of(trainer.strategy)
        exceptions.uses.append(self)
        self.at_end(lambda: exceptions.remove(self))

    @property
    def is_open(self) -> bool:
        """True from :meth:`begin` to :meth:`end`."""
        return self._open

    def at_end(self, *undo: Callable[[], object]) -> None:
        """Call these when the use ends, the last one first."""
        for each in undo:
            self._undo.callback(each)

    def end(self, trainer: Trainer | None = None) -> None:
        """Undo all that was done for the use; do nothing if ``trainer`` is given and is not the one that uses it."""
        if trainer is not None and self._open and self._last["trainer"]() is not trainer:
            return
        undo, self._undo, self._open = self._undo, ExitStack(), False
        undo.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return Use, ()


class OneFitCallback(Constructed, Callback):
    """Base of the package's callbacks: one ``fit`` uses it at a time, and it prints as its constructor call.

    A subclass calls ``super()`` in ``setup`` and ``teardown``. ``use.at_end`` takes what is to be undone when the fit
    ends, and ``use.changed`` tells in ``setup`` whether this fit is of another run.
    """

    @property
    def use(self) -> Use:
        """The use by the running fit, or by the last one."""
        found: Use = self.__dict__.setdefault("_use", Use())
        return found

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_other_lightning(trainer, type(self).__name__)
        if stage == "fit":
            self.use.begin(self, trainer, pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.use.end(trainer)


class OneFitModule:
    """Base of the package's modules, beside ``LightningModule``: ends the use that ``setup`` has begun."""

    # TorchScript would read annotations of the class.
    if TYPE_CHECKING:
        trainer: Trainer
        _use: Use

    def teardown(self, stage: str) -> None:
        """End the use by a fit."""
        if stage == "fit":
            self._use.end(self.trainer)


class _Exceptions:
    """Replacement of a strategy's ``on_exception`` that ends uses afterwards; they share one.

    A callback's ``on_exception`` would not do: modules have none, and a search for the learning rate that fails leaves
    the Trainer without its callbacks.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.original, self.uses = strategy.on_exception, list[Use]()
        self._stand_ins = StandIns()
        self._stand_ins.put(strategy, "on_exception", self)

    @classmethod
    def of(cls, strategy: Strategy) -> _Exceptions:
        """Return the replacement that the strategy has already, or replace now."""
        found = vars(strategy).get("on_exception")
        return found if isinstance(found, cls) else cls(strategy)

    def __call__(self, exception: BaseException) -> None:
        with ExitStack() as stack:
            for use in self.uses:
                stack.callback(use.end)
            self.original(exception)

    def remove(self, use: Use) -> None:
        """Forget a use, whatever the order; the last one restores the strategy."""
        self.uses.remove(use)
        if not self.uses:
            self._stand_ins.put_back()


class _Nothing:
    """Stands for the datamodule of a Trainer that has none: None has no weak references."""


_NOTHING = _Nothing()
