"""The contract of ``torch.optim`` around one ``_update`` per parameter group, for all optimizers of this package."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypeAlias, cast, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_nested.arguments import shown
from lightning_nested.optim.options import Check, checked, flag, non_negative

Closure = Callable[[], float]
# options of torch's optimizers that would change a step; foreach and fused only choose an implementation
OF_TORCH = ("amsgrad", "capturable", "dampening", "decoupled_weight_decay", "differentiable", "nesterov")
Step: TypeAlias = float | Tensor
"""A number of steps; a float64 vector of them, one for each parameter, while ``torch.compile`` traces."""


class GameOptimizer(Optimizer, ABC):
    """Base of the optimizers here. A subclass names its options and their checks, and writes ``_update``.

    Every option may differ between parameter groups and may change between steps (schedulers do so); it is checked
    when a group is added and again at every step, before anything is changed.

    ``torch.compile(optimizer.step)`` makes one graph of a step, also with ``fullgraph=True``; of ``Extragradient``
    compile ``extrapolate`` too. The learning rate is a float, also where a tensor is given. When it changes for the
    first time the step is compiled once more, with the rate as an input; later changes do not compile again. A change
    of another option, of the parameters that have a gradient, or of the state by ``load_state_dict`` does. Compile
    before a scheduler is created: it replaces ``step`` by a function that torch does not trace, and the graph breaks.

    Numbers may be 0-dimensional tensors. They are stored as floats, so a tensor that is changed later has no effect:
    set ``group["lr"]``, as schedulers do. Of the options that torch's optimizers share, only ``maximize`` is one here.
    The device chooses the implementation, so ``foreach`` and ``fused`` in a group are ignored; ``capturable`` and
    ``differentiable`` are refused.

    Args:
        params: Parameters, named parameters, or groups of them, as for every ``torch.optim.Optimizer``.
        defaults: Options of the groups that do not give them.

    Attributes:
        num_gradients: Gradients of the game that one update needs.
    """

    num_gradients: ClassVar[int] = 1
    checks: ClassVar[Mapping[str, Check]]
    # names of the tensors in a parameter's state, as _update takes them
    slots: ClassVar[tuple[str, ...]] = ()

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        if not isinstance(params, Iterable):
            raise TypeError(f"params must be a list of parameters or of groups. Got {shown(params)}.")
        # torch itself refuses tensors and sets, with a good message
        if not isinstance(params, Tensor | set):
            params = cast("ParamsT", list(params))
            if not params:
                raise ValueError("params must hold a parameter or a group. Got an empty parameter list.")
        super().__init__(params, checked(self.checks, defaults))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, also late in a run; nothing is added if an option is out of range.

        Raises:
            ValueError: An option is out of range, or one of torch that is not supported; or a parameter is complex.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"A parameter group must be a dict. Got {type(param_group).__name__}.")
        group = dict(param_group)
        if "params" not in group:
            raise ValueError(
                f"A parameter group must have the entry 'params'. Got {sorted(map(str, group))}."
            )
        group.update(checked(self.checks, {**self.defaults, **group}))
        for name in OF_TORCH:
            if group.get(name):
                raise ValueError(
                    f"{type(self).__name__} has no option {name}. Got {name}={group[name]!r}; leave it out."
                )
        params = group["params"]
        if not isinstance(params, (Tensor, set)):  # torch refuses sets itself, with a good message
            params = group["params"] = list(params)
        for entry in [params] if isinstance(params, Tensor) else params:
            p = entry[1] if isinstance(entry, tuple) else entry
            if isinstance(p, Tensor) and p.is_complex():
                raise ValueError(
                    f"{type(self).__name__} needs real parameters. Got one of {p.dtype}; hold its real and imaginary "
                    "parts as real parameters (torch.view_as_real) and form the complex tensor in forward."
                )
        super().add_param_group(group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Closure) -> float: ...

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:
        """Update the parameters from the gradients in ``.grad``; those without one stay as they are.

        Args:
            closure: Recomputes the gradients and returns the loss.

        Returns:
            The loss of the closure; None without one.

        Raises:
            ValueError: An option was set out of range.
            RuntimeError: A gradient is sparse. No parameter has been changed then.
        """
        loss = evaluated(closure)
        self._update_groups(self._update, len(self.slots))
        return loss

    def _update_groups(self, update: Callable[..., None], num_slots: int) -> None:
        """Call ``update`` for each group that has gradients."""
        for group, options in zip(self.param_groups, self._checked(), strict=True):
            columns: list[list[Any]] = [[] for _ in range(2 + num_slots)]
            self._init_group(group, *columns)
            if columns[0]:
                update(options, *columns)

    @abstractmethod
    def _update(self, options: dict[str, Any], *columns: list[Any]) -> None:
        """Change the parameters of one group in place.

        Args:
            options: The checked options of the group.
            columns: Parameters that have a gradient, their gradients, and for each of ``slots`` the tensors of that
                name, or None where a parameter has none.
        """

    def _init_group(self, group: dict[str, Any], *columns: list[Any]) -> None:
        """Append the parameters that have a gradient, their gradients and their state, which may begin here.

        The name is that of ``torch.optim``: ``torch.compile`` runs a method of this name while it traces a step, so
        that the state exists before the first graph does.
        """
        params, grads, *slots = columns
        for p in group["params"]:
            g = p.grad
            if g is not None:
                params.append(p)
                grads.append(g)
        states = [self.state[p] for p in params] if slots else []
        for name, column in zip(self.slots, slots, strict=True):
            column += [state.get(name) for state in states]
            for i, value in enumerate(column):
                if value is None:
                    column[i] = value = self._begin(name, params[i], group)
                    if value is not None:
                        states[i][name] = value

    def _begin(self, name: str, p: Tensor, group: dict[str, Any]) -> Tensor | None:
        """Return the first value of a slot; None: the parameter needs none for now."""
        if name == "step":
            return torch.zeros((), dtype=torch.float32, device="cpu")
        return torch.zeros_like(p, memory_format=torch.preserve_format)

    def _checked(self) -> list[dict[str, Any]]:
        """Return the checked options of each group; refuse sparse gradients."""
        for group in self.param_groups:
            for p in group["params"]:
                g = p.grad
                if g is not None and g.layout is not torch.strided:
                    raise RuntimeError(
                        f"{type(self).__name__} needs dense gradients. Got one of layout {g.layout}; "
                        "give sparse=False to the embedding, or torch.optim.SparseAdam its parameters."
                    )
        return [checked(self.checks, group) for group in self.param_groups]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                if name in self.checks:
                    group.setdefault(name, value)
        for kept in self.state.values():
            if "step" in kept and not isinstance(kept["step"], Tensor):  # older versions kept a number
                kept["step"] = torch.tensor(float(kept["step"]), dtype=torch.float32, device="cpu")


class PlainOptimizer(GameOptimizer):
    """Base of those whose only options are a learning rate, weight decay and the direction."""

    checks = {"lr": non_negative, "weight_decay": non_negative, "maximize": flag}  # noqa: RUF012

    def __init__(
        self, params: ParamsT, lr: float, weight_decay: float = 0.0, *, maximize: bool = False
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "maximize": maximize})


def evaluated(closure: Closure | None) -> float | None:
    """Return the closure's loss; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def by_step(steps: list[Tensor], *columns: list[Any]) -> list[tuple[Step, tuple[list[Any], ...]]]:
    """Count the step, and split the columns by the number of steps that parameters have taken.

    Returns:
        Numbers of steps with their columns: parameters that joined late have taken fewer. While ``torch.compile``
        traces, one entry with all counts as a float64 vector: a graph must not depend on their values.
    """
    if torch.compiler.is_compiling():
        torch._foreach_add_(steps, 1)
        return [(torch.stack(steps).double(), columns)]
    # on CPU a number would become a tensor again for each count
    torch._foreach_add_(steps, torch.ones((), device=steps[0].device), alpha=1)
    return by_key([step.item() for step in steps], *columns)


def by_key(keys: list[Any], *columns: list[Any]) -> list[tuple[Any, tuple[list[Any], ...]]]:
    """Split the columns by the keys, one for each place."""
    found = set(keys)
    if len(found) == 1:
        return [(keys[0], columns)]
    return [
        (key, tuple([x for x, k in zip(column, keys, strict=True) if k == key] for column in columns))
        for key in found
    ]
