"""What all optimizers here share: the contract of ``torch.optim`` around one ``_update`` per parameter group."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_nested.optim.options import Check, checked

Closure = Callable[[], float]


class GameOptimizer(Optimizer, ABC):
    """Base of the family. A subclass names its options and their checks, and writes ``_update``.

    Every option may differ between parameter groups and may change between steps (schedulers do so); it is checked
    when a group is added and again at every step, before anything is changed.

    Args:
        params: Parameters, named parameters, or groups of them, as for every ``torch.optim.Optimizer``.
        defaults: Options of the groups that do not give them.

    Attributes:
        num_gradients: Gradients of the game that one update needs.
    """

    num_gradients: ClassVar[int] = 1
    checks: ClassVar[Mapping[str, Check]]
    since: ClassVar[Mapping[str, Any]] = {}  # values of options that a state saved by an older version lacks

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        super().__init__(params, checked(self.checks, defaults))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, also late in a run; nothing is added where an option is out of range.

        Raises:
            ValueError: An option out of range, or a complex parameter.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"A parameter group must be a dict. Got {type(param_group).__name__}.")
        group = dict(param_group)
        group.update(checked(self.checks, {**self.defaults, **group}))
        if not isinstance(group["params"], (Tensor, set)):  # torch refuses sets itself, with a good message
            group["params"] = list(group["params"])
            for entry in group["params"]:
                self._check_parameter(entry[1] if isinstance(entry, tuple) else entry)
        elif isinstance(group["params"], Tensor):
            self._check_parameter(group["params"])
        super().add_param_group(group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Closure) -> float: ...

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:
        """One update from the gradients in ``.grad``; parameters without one are left alone.

        Args:
            closure: Recomputes the gradients and returns the loss.

        Returns:
            The loss of the closure; None without one.

        Raises:
            ValueError: An option was set out of range.
            RuntimeError: A sparse gradient. No parameter has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for _, options, params, grads in list(self._gradients()):
            if params:
                self._update(options, params, grads, [self.state[p] for p in params])
        return loss

    @abstractmethod
    def _update(
        self, options: dict[str, Any], params: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]]
    ) -> None:
        """Change ``params`` in place. ``options`` are those of their group, checked."""

    def _gradients(self) -> Iterator[tuple[dict[str, Any], dict[str, Any], list[Tensor], list[Tensor]]]:
        """Each group, its checked options, and its parameters that have a gradient."""
        for group in self.param_groups:
            options = checked(self.checks, group)
            params = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in params]
            for grad in grads:
                if grad.layout is not torch.strided:
                    raise RuntimeError(
                        f"{type(self).__name__} needs dense gradients. Got one of layout {grad.layout}; "
                        "give sparse=False to the embedding, or torch.optim.SparseAdam its parameters."
                    )
            yield group, options, params, grads

    def _check_parameter(self, p: Any) -> None:
        if isinstance(p, Tensor) and p.is_complex():
            raise ValueError(
                f"{type(self).__name__} needs real parameters. Got one of {p.dtype}; hold its real and imaginary "
                "parts as real parameters (torch.view_as_real) and form the complex tensor in forward."
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in {**self.since, **self.defaults}.items():
                if name in self.checks:
                    group.setdefault(name, value)


def buffers(name: str, params: list[Tensor], states: list[dict[str, Any]]) -> list[Tensor]:
    """The state of that name for each parameter; zeros where there is none yet."""
    for p, state in zip(params, states, strict=True):
        if state.get(name) is None:
            state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
    return [state[name] for state in states]


def by_step(states: list[dict[str, Any]]) -> list[tuple[int, list[int]]]:
    """Count the step; parameters that joined late, or once had no gradient, come apart from the others.

    Returns:
        Each number of steps with the places of the parameters that have taken as many.
    """
    places: dict[int, list[int]] = {}
    for i, state in enumerate(states):
        state["step"] = int(state.get("step", 0)) + 1
        places.setdefault(state["step"], []).append(i)
    return list(places.items())
