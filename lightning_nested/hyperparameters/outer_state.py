"""All that outer steps change: tuned values, the outer optimizer and the solver's state; built, reset and saved."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_nested.hyperparameters.carry_over import Names
from lightning_nested.hyperparameters.hyperparameter import Hyperparameter
from lightning_nested.hyperparameters.optimizer_options import OptimizerOption
from lightning_nested.hyperparameters.outer_optimizer import OptimizerPair, OuterOptimizer, OuterScheduler
from lightning_nested.hyperparameters.outer_report import LossTrend, Spread, spread
from lightning_nested.hyperparameters.saved_values import (
    Placed,
    load_hyperparameters,
    saved_hyperparameters,
    saved_parameters,
)
from lightning_nested.hyperparameters.vector import labelled
from lightning_nested.hyperparameters.weight_decay import WeightDecay
from lightning_nested.linalg.saved import require_keys
from lightning_nested.linalg.solvers.base import SolverState
from lightning_nested.linalg.vectors import Vector


class OuterState:
    """Base of :class:`OuterStep`: its hyperparameters and all that its steps change, for the parameters in ``build``.

    Raises:
        ValueError: No hyperparameters, or equal names.
    """

    def __init__(
        self,
        hyperparameters: Sequence[Hyperparameter],
        *,
        optimizer: OuterOptimizer,
        scheduler: OuterScheduler | None,
    ) -> None:
        names = [h.name for h in hyperparameters]
        if not names:
            raise ValueError("hyperparameters must hold at least one. Got none; give [WeightDecay()], say.")
        if len(set(names)) != len(names):
            raise ValueError(f"hyperparameters must have different names. Got {names}; set name=...")
        self.hyperparameters = tuple(hyperparameters)
        # A decay's derivatives are known in closed form: it needs no place in the graph of the inner loss.
        self.decays = tuple(h for h in hyperparameters if isinstance(h, WeightDecay))
        # No loss depends on them.
        self.options = tuple(h for h in hyperparameters if isinstance(h, OptimizerOption))
        self.in_graph = tuple(h for h in hyperparameters if h not in self.decays and h not in self.options)
        # In the order of the outer optimizer's tensors.
        self._ordered = (*(h for h in hyperparameters if h not in self.decays), *self.decays)
        self.solver_state = SolverState()
        self.unreached: list[str] = []
        self._optimization = OptimizerPair(optimizer, scheduler)
        self._pending: Vector | None = None  # hypergradients for the next move
        self._moved: set[str] = set()  # labels of tensors with a hypergradient that was not zero
        self.first: dict[str, Spread] = {}  # of the values that each hyperparameter started from
        self.trend = LossTrend()
        self._inner: dict[str, Placed] = {}  # the parameters in `build`

    def labels(self) -> list[str]:
        """Return the name of each of :attr:`tensors`, as in :meth:`values`."""
        return [label for h in self._ordered for label in labelled(h.name, h.tensors)]

    def graph_labels(self) -> list[str]:
        """Return the name of each of :attr:`in_graph_tensors`, as in :meth:`values`."""
        return [label for h in self.in_graph for label in labelled(h.name, h.tensors)]

    @property
    def optimizer(self) -> Optimizer:
        """The outer optimizer, once built."""
        return self._optimization.optimizer

    @property
    def scheduler(self) -> LRScheduler | None:
        """The outer scheduler, once built, if there is one."""
        return self._optimization.scheduler

    def set_optimizer(self, optimizer: OuterOptimizer, scheduler: OuterScheduler | None) -> None:
        """Take another optimizer and schedule; one that runs goes on with its state, at the new rate."""
        self._optimization.replace(optimizer, scheduler)

    def build(self, parameters: Mapping[str, Tensor], device: torch.device | str) -> None:
        """Create the tensors and the optimizer over all of them, or continue with those there are.

        A second call with the same parameters changes nothing. Where parameters were added (a layer was unfrozen) or
        removed, hyperparameters of those that stay keep their values and the optimizer's state, the rest starts at
        its initial value, and the solver's state is dropped. Where none stays, or one has another shape, the
        parameters are those of another model: all of this object starts again, as after :meth:`reset`.

        Raises:
            ValueError: A parameter is complex.
        """
        if complex_ones := [f"{name} ({p.dtype})" for name, p in parameters.items() if p.is_complex()]:
            raise ValueError(
                f"Inner parameters must be real. Got {', '.join(complex_ones)}: freeze them, or make the parameter "
                "of their real and imaginary parts (torch.view_as_real), and use torch.view_as_complex on it."
            )
        inner = {name: (p.shape, p.dtype, p.device) for name, p in parameters.items()}
        shared = inner.keys() & self._inner.keys()
        if self._inner and (not shared or any(inner[name][0] != self._inner[name][0] for name in shared)):
            self.reset()
        if list(inner.items()) != list(self._inner.items()):  # another space, if only by the order
            self.solver_state = SolverState()
        self._inner = inner
        earlier = self._located()
        for hyperparameter in self.hyperparameters:
            hyperparameter.build(parameters, device)
        if not self._optimization.holds(self.tensors):
            self._pending = None
            located = self._located()
            origins = {t: (*earlier[at], names) for at, (t, names) in located.items() if at in earlier}
            self._optimization.carry_over(self.tensors, origins)
        self.first = {h.name: self.first.get(h.name) or spread(h.values()) for h in self.hyperparameters}

    def is_built_for(self, parameters: Mapping[str, Tensor]) -> bool:
        """Return True if the last :meth:`build`, or what was loaded, is of parameters with these names."""
        return len(parameters) == len(self._inner) and all(map(operator.eq, parameters, self._inner))

    def _located(self) -> dict[tuple[str, str], tuple[Tensor, Names]]:
        """Return each tensor and the names of its entries, by its hyperparameter and key."""
        return {(h.name, key): (t, h.entries()) for h in self.hyperparameters for key, t in h.tensors.items()}

    def remember_first(self, hyperparameter: Hyperparameter) -> None:
        """Let the present values of a hyperparameter be those that the tuning began with."""
        self.first[hyperparameter.name] = spread(hyperparameter.values())

    def reset(self) -> None:
        """Forget all values, the optimizer and the solver's state: the next :meth:`build` starts from the beginning."""
        for hyperparameter in self.hyperparameters:
            hyperparameter.reset()
        self._optimization.forget()
        self.solver_state, self._pending, self._inner, self.first = SolverState(), None, {}, {}
        self.trend = LossTrend()
        self.unreached, self._moved = [], set()

    @property
    def tensors(self) -> Vector:
        """All unconstrained tensors, those of the decays last."""
        return tuple(t for h in self._ordered for t in h.tensors.values())

    @property
    def in_graph_tensors(self) -> Vector:
        """Unconstrained tensors that losses depend on through their graphs."""
        return tuple(t for h in self.in_graph for t in h.tensors.values())

    def values(self) -> dict[str, Tensor]:
        """Values in natural units: ``name``, or ``name/key`` where a hyperparameter has several tensors."""
        return {label: v for h in self.hyperparameters for label, v in labelled(h.name, h.values()).items()}

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next outer step depends on, with values in natural units; loads with ``weights_only``."""
        return {
            **saved_hyperparameters(self.hyperparameters),
            "first": self.first,
            "losses": self.trend.state_dict(),
            "inner": {name: list(shape) for name, (shape, _, _) in self._inner.items()},
            **self._optimization.state_dict(),
            "solver": self.solver_state.state_dict(),
        }

    def load_state_dict(
        self, state: Mapping[str, Any], parameters: Mapping[str, Tensor], *, convert: bool = True
    ) -> list[str]:
        """Restore; :meth:`build` must have run, with the hyperparameters of the state.

        Values saved under another range or transform are converted, an outer optimizer or scheduler of another class
        starts again. Where layers were frozen or unfrozen since :meth:`build`, this object takes the saved
        parameters' hyperparameters: :meth:`is_built_for` returns False, and the next :meth:`build` carries over.

        Args:
            state: What :meth:`state_dict` returned.
            parameters: Inner parameters by name.
            convert: Convert values; False: refuse another range or transform, and another order.

        Returns:
            Messages for the user: all that was converted, or started again.

        Raises:
            ValueError: Other hyperparameters, or of another kind, out of range, or of another model.
        """
        require_keys(state, ("hyperparameters", "optimizer", "scheduler", "solver"), "the outer steps")
        saved = state["hyperparameters"]
        own = {h.name: h for h in self.hyperparameters}
        if set(saved) != set(own) or (not convert and list(saved) != list(own)):
            raise ValueError(
                f"The saved hyperparameters must be {list(own)}. Got {list(saved)}: the checkpoint was written with "
                "others."
            )
        inner = saved_parameters(state.get("inner"), self._inner)
        self._pending = None
        messages, converted = load_hyperparameters(self.hyperparameters, state, convert=convert)
        ordered = sorted((own[name] for name in saved), key=self.decays.__contains__)
        tensors = [h.tensors[key] for h in ordered for key in saved[h.name]]
        messages += self._optimization.load_state_dict(state, tensors, converted)
        self._inner, self.first = inner, {**self.first, **state.get("first", {})}
        if "losses" in state:  # earlier versions saved none
            self.trend.load_state_dict(state["losses"])
        like = tuple(torch.empty(0, device=device) for _, _, device in inner.values())
        self.solver_state.load_state_dict(state["solver"], like or tuple(parameters.values()))
        return messages

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._optimization.resume(self.tensors)
