"""Options of the inner optimizer's groups: what no loss depends on, and every step does."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_nested.arguments import at_least, checked
from lightning_nested.hyperparameters.hyperparameter import Hyperparameter
from lightning_nested.hyperparameters.transforms import Interval, Transform

GroupOptions: TypeAlias = tuple[Mapping[str, Tensor], ...]
"""Options of each group, by the names of the fields of ``lightning_nested.optim.update_rules``."""


class OptimizerOption(Hyperparameter):
    """Base of options of the optimizer's groups: a row of a tensor for each group.

    Attributes:
        horizon: Steps of the optimizer that HypergradientCallback differentiates through.
        fields: Names of the options, as in the optimizer's update rule.
    """

    sets_option = True
    fields: ClassVar[tuple[str, ...]]

    def __init__(self, name: str, init: object, transform: Transform, horizon: int) -> None:
        super().__init__()
        at_least(1, horizon=horizon)
        self.name, self.horizon, self.init = name, horizon, init
        if init is not None:
            self._use(transform, init)  # type: ignore[arg-type]
        self.transform = transform
        self._starts: tuple[Any, ...] = ()  # a row for each group
        self.references: tuple[
            float, ...
        ] = ()  # what a scheduler's rates are relative to; empty for other options

    @property
    def count(self) -> int:
        """Number of tuned numbers, once the optimizer is known; before, 1."""
        return torch.tensor(self._starts).numel() or 1

    def attach(self, starts: Sequence[Any]) -> None:
        """Take the starting values of the optimizer's groups."""
        self._starts = tuple(starts if self.init is None else [self.init] * len(starts))

    def attach_optimizer(self, optimizer: Optimizer) -> None:
        """Take the starting values of the optimizer's groups."""
        self.attach([self._read(group) for group in optimizer.param_groups])

    def only_fall(self) -> None:
        """Bound the option by its start, where a short horizon cannot be trusted to raise it; by default not."""

    @abstractmethod
    def _read(self, group: Mapping[str, Any]) -> Any:
        """Return the option of a group."""

    def _initial(self, dtype: torch.dtype) -> dict[str, Tensor]:
        if not self._starts:
            kind = type(self).__name__
            raise ValueError(
                f"{kind} must know the inner optimizer's groups. Got none: it is tuned by HypergradientCallback, and "
                "a learning rate by NestedModule(gradient=Unrolled(...)) too; elsewhere call attach([...]) first."
            )
        return {self._key: torch.tensor(self._starts, dtype=dtype)}

    _key: ClassVar[str]  # of its tensor

    def options(self, groups: Sequence[Mapping[str, Any]]) -> GroupOptions:
        """Return the tuned options of each group with their graph, for groups that have the user's own options.

        Raises:
            ValueError: There are other groups than at the start of the fit.
        """
        raw = self.tensors[self._key]
        if len(raw) != len(groups):
            raise ValueError(
                f"{self.name} has values for the {len(raw)} group(s) that the optimizer had when the fit began. Got "
                f"{len(groups)} now; give the optimizer all its groups in configure_optimizers."
            )
        rows = self.transform.forward(raw).unbind()
        return tuple(
            self._of_group(i, group, row) for i, (group, row) in enumerate(zip(groups, rows, strict=True))
        )

    def _of_group(self, index: int, group: Mapping[str, Any], row: Tensor) -> Mapping[str, Tensor]:
        return dict(zip(self.fields, row.reshape(-1).unbind(), strict=True))


def _inside(name: str, value: Any, cure: str) -> None:
    numbers = value if isinstance(value, Sequence) else [value]
    if not all(0 < float(x) < 1 for x in numbers):
        raise ValueError(f"A tuned {name} must start inside (0, 1). Got {value}; {cure}.")


@checked
class Momentum(OptimizerOption):
    """The momentum μ of each group of SGD or :class:`ComplexSGD`, tuned through the optimizer's own steps.

    See :class:`LearningRate` for how, and for what a short horizon does to it: the direct effect of μ on one step is
    −α times the momentum buffer, so that the hypergradient says whether older gradients still point downhill.

    Args:
        init: Initial momentum; None: the optimizer's own.
        transform: Map from the unconstrained tensor to the momentum; default ``Interval(0, 1)``, in which 1 − μ moves
            by a factor.
        name: Key in logs and checkpoints.
        horizon: Steps of the optimizer that are differentiated, see :class:`LearningRate`.

    Raises:
        ValueError: The horizon is below 1; at the start of ``fit``, the optimizer has no momentum.
    """

    fields = ("momentum",)
    _key = "momenta"

    def __init__(
        self,
        init: float | None = None,
        transform: Transform | None = None,
        name: str = "momentum",
        horizon: int = 1,
    ) -> None:
        super().__init__(name, init, transform or Interval(lower=0.0, upper=1.0), horizon)

    def _read(self, group: Mapping[str, Any]) -> float:
        if "momentum" not in group:
            raise ValueError(
                "Momentum tunes an option momentum, as SGD has. Got an optimizer without it; use Betas() for Adam."
            )
        value = float(group["momentum"])
        if self.init is None:
            _inside("momentum", value, "give the optimizer momentum=0.9, or Momentum(init=0.5)")
        return value


@checked
class Betas(OptimizerOption):
    """Adam's decay rates β₁ and β₂ of each group, tuned through the optimizer's own steps.

    See :class:`LearningRate` for how, and for what a short horizon does to them.

    Args:
        init: Initial (β₁, β₂); None: the optimizer's own.
        transform: Map from the unconstrained tensor to the rates; default ``Interval(0, 1)``, in which 1 − β moves by a
            factor.
        name: Key in logs and checkpoints.
        horizon: Steps of the optimizer that are differentiated, see :class:`LearningRate`.

    Raises:
        ValueError: The horizon is below 1; at the start of ``fit``, the optimizer has no betas, or one of them is 0.
    """

    fields = ("beta1", "beta2")
    _key = "betas"

    def __init__(
        self,
        init: tuple[float, float] | None = None,
        transform: Transform | None = None,
        name: str = "betas",
        horizon: int = 1,
    ) -> None:
        super().__init__(name, init, transform or Interval(lower=0.0, upper=1.0), horizon)

    def _read(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        if "betas" not in group:
            raise ValueError(
                "Betas tunes an option betas, as Adam has. Got an optimizer without it; use Momentum() for SGD."
            )
        values = tuple(float(beta) for beta in group["betas"])
        if self.init is None:
            _inside("beta", values, "give the optimizer betas inside it, or Betas(init=(0.5, 0.99))")
        return values


def set_options(group: dict[str, Any], values: Mapping[str, float]) -> dict[str, Any]:
    """Write options, named as in the update rules, into a group; return those that were there before.

    >>> group = {"lr": 0.1, "betas": (0.9, 0.999)}
    >>> set_options(group, {"beta1": 0.5, "beta2": 0.9})
    {'betas': (0.9, 0.999)}
    >>> group["betas"]
    (0.5, 0.9)
    """
    written: dict[str, Any] = {name: x for name, x in values.items() if not name.startswith("beta")}
    if "beta1" in values:
        written["betas"] = (values["beta1"], values["beta2"])
    before = {}
    for key, value in written.items():
        old = group[key]
        before[key] = old.clone() if isinstance(old, Tensor) else old
        # A captured graph reads the tensor.
        group[key] = old.fill_(value) if isinstance(old, Tensor) else value
    return before
