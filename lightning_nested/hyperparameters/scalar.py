"""Single numbers and choices that the training loss reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_nested.arguments import checked
from lightning_nested.hyperparameters.transforms import Interval, Transform, Unconstrained
from lightning_nested.hyperparameters.weights import BoundHyperparameter


@checked
class Scalar(BoundHyperparameter):
    """One number for any use; ``module.name.value()`` returns it with its graph.

    Args:
        name: Attribute of the module that it becomes, and key in logs.
        init: Initial value in natural units.
        transform: Map from the unconstrained tensor; default ``Unconstrained()``.
    """

    per_example = True
    usage = (
        "self.scale = None  # in __init__\n"
        "if self.scale is not None:  # in training_step, or wherever the training loss needs the number\n"
        "    loss = loss * self.scale.value()"
    )

    def __init__(self, name: str, init: float, transform: Transform | None = None) -> None:
        super().__init__()
        self.name, self.init = name, float(init)
        self._use(transform or Unconstrained(), self.init)

    def _initial(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"value": torch.tensor(self.init, dtype=dtype)}

    def value(self) -> Tensor:
        """Return the value in natural units: (), or (batch,) where each example has its own."""
        return self.natural("value", self.raw("value"))


@checked
class Integer(Scalar):
    """A whole number in lower … upper: the floor of a real one in (lower, upper + 1).

    No derivative: tuned by hypernetworks, whose perturbations try its neighbours.

    Args:
        name: Attribute of the module that it becomes, and key in logs.
        lower: Smallest value.
        upper: Largest value.
        init: Initial value.
    """

    def __init__(self, name: str, lower: int, upper: int, init: int) -> None:
        if not lower <= init <= upper:
            raise ValueError(f"lower ≤ init ≤ upper must hold. Got {lower}, {init}, {upper} for {name!r}.")
        super().__init__(name, init + 0.5, Interval(lower=lower, upper=upper + 1))
        self.lower, self.upper = lower, upper

    def natural(self, key: str, raw: Tensor) -> Tensor:
        """Return a whole number, as floating type."""
        return whole(self.transform.forward(raw), self.upper)

    def unconstrained(self, key: str, value: Tensor) -> Tensor:
        """Return the middle of the interval that becomes ``value``."""
        return self.transform.inverse(value + 0.5)


@checked
class Categorical(BoundHyperparameter):
    """Choice of the option with the largest score. Tuned by hypernetworks, whose perturbations try others.

    Args:
        name: Attribute of the module that it becomes, and key in logs.
        options: Objects to choose from.
        init: Index of the initial choice.
    """

    per_example = True
    usage = "self.loss = None  # in __init__\nfunction = self.loss.choice()  # in the training loss"

    def __init__(self, name: str, options: Sequence[Any], init: int = 0) -> None:
        super().__init__()
        if len(options) < 2 or not 0 <= init < len(options):
            raise ValueError(
                f"options must be at least 2 and init the index of one. Got {len(options)} and {init} for {name!r}."
            )
        self.name, self.options, self.init = name, tuple(options), init
        self.transform = Unconstrained()

    def _initial(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"index": functional.one_hot(torch.tensor(self.init), len(self.options)).to(dtype)}

    def kind(self) -> dict[str, Any]:
        """Return the options too, by name or text: an index means another one if they differ."""
        names = [getattr(option, "__name__", None) or repr(option) for option in self.options]
        return {**super().kind(), "options": [name.split(" at 0x")[0] for name in names]}

    def natural(self, key: str, raw: Tensor) -> Tensor:
        """Return the index of the option, as floating type."""
        return raw.argmax(-1).to(raw.dtype)

    def unconstrained(self, key: str, value: Tensor) -> Tensor:
        """Return scores whose largest is that of option ``value``."""
        if not 0 <= int(value) < len(self.options):
            raise ValueError(f"{self.name} must be in 0 … {len(self.options) - 1}. Got {int(value)}.")
        return functional.one_hot(value.long(), len(self.options)).to(self.raw("index").dtype)

    def choice(self) -> Any:
        """Return the chosen option, or a list of one for each example."""
        index = self.natural("index", self.raw("index")).long()
        return self.options[int(index)] if index.dim() == 0 else [self.options[i] for i in index.tolist()]


@checked
class LabelSmoothing(Scalar):
    """Cross-entropy against (1 − ε)·target + ε/classes, with ε tuned; differentiable.

    ``module.label_smoothing(logits, labels)`` is the mean loss of a batch.

    Args:
        init: Initial ε.
        upper: Bound that ε stays below.
        name: Attribute of the module that it becomes, and key in logs.
    """

    usage = (
        "self.label_smoothing = None  # in __init__\n"
        "loss = (F.cross_entropy if self.label_smoothing is None else self.label_smoothing)(logits, labels)"
    )

    def __init__(self, init: float = 0.05, upper: float = 0.5, name: str = "label_smoothing") -> None:
        super().__init__(name, init, Interval(lower=0.0, upper=upper))

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of logits (batch, classes) and labels (batch,)."""
        log = logits.log_softmax(-1)
        smoothing = self.value()
        right = log.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        return -((1 - smoothing) * right + smoothing * log.mean(-1)).mean()


def whole(value: Tensor, upper: float) -> Tensor:
    """Return the floor, without a derivative; not above ``upper`` where rounding reached the interval's end."""
    return value.detach().floor().clamp(max=upper)
