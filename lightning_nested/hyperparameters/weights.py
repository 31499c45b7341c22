"""Weights of terms in the training loss: of its examples (data cleaning) and of its parts (multi-task)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from lightning_nested.arguments import at_least, checked, is_number
from lightning_nested.hyperparameters.hyperparameter import Hyperparameter
from lightning_nested.hyperparameters.transforms import Interval, Softplus, Transform

_INDICES = (torch.int64, torch.int32, torch.int16, torch.int8)  # uint8 and bool are masks


class BoundHyperparameter(Hyperparameter):
    """A hyperparameter that the user's training loss reads.

    The callback binds it to the attribute ``name`` of the LightningModule, which is ``None`` in untuned runs:

        self.example_weights = None                                   # in __init__
        if self.example_weights is not None:                          # in training_step
            losses = losses * self.example_weights(index)
    """

    @property
    def attribute(self) -> str:
        """Name of the module's attribute through which the training loss reads this object."""
        return self.name


@checked
class ExampleWeights(BoundHyperparameter):
    """One weight per training example: the validation loss finds the ones that hurt.

    ``weights(index)`` returns the weights of a batch, of the shape of ``index``, with their graph. Batches carry the
    index of each example.

    Args:
        num_examples: Size of the training set.
        init: Initial weight.
        transform: Default ``Interval(0, 1)``, or ``Interval(0, 2·init)`` for an ``init`` of 1 and above.
        name: Attribute of the module that it becomes, and key in logs.
    """

    moves_one_batch = weighs_examples = True
    usage = (
        "self.example_weights = None  # in __init__\n"
        "if self.example_weights is not None:  # in training_step, with per-example losses\n"
        "    losses = losses * self.example_weights(index)"
    )

    def __init__(
        self,
        num_examples: int,
        init: float = 0.5,
        transform: Transform | None = None,
        name: str = "example_weights",
    ) -> None:
        super().__init__()
        at_least(1, num_examples=num_examples)
        self.num_examples, self.init, self.name = num_examples, init, name
        self._use(transform or Interval(upper=1.0 if init < 1.0 else 2.0 * init), init)

    def _initial(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"weights": torch.full((self.num_examples,), self.init, dtype=dtype)}

    def __call__(self, index: Tensor) -> Tensor:
        """Return weights of the examples ``index`` (any shape, integers in [0, num_examples)), at least float32.

        Raises:
            ValueError: ``index`` holds no integers; or one out of range, if it is on the CPU (a look at a GPU's
                tensor would wait for the device).
        """
        if not isinstance(index, Tensor) or index.dtype not in _INDICES:
            got = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise ValueError(f"index must be a tensor of integers. Got {got}.")
        if index.device.type == "cpu" and index.numel():
            lowest, highest = (int(i) for i in index.aminmax())
            if lowest < 0 or highest >= self.num_examples:
                raise ValueError(
                    f"index must lie in [0, {self.num_examples}), the {self.num_examples} examples of {self.name}. "
                    f"Got {lowest if lowest < 0 else highest}; num_examples is the size of the training set."
                )
        raw = self.raw("weights", index.device)
        return self.transform.forward(raw[index.to(raw.device)])


@checked
class LossWeights(BoundHyperparameter):
    """One weight per named part of a training loss.

    ``weights({"ce": a, "aux": b})`` returns Σ wᵢ·lossᵢ with its graph.

    Args:
        names: Names of the parts.
        init: Initial weight, one for all or one per name.
        transform: Default ``Softplus()``.
        name: Attribute of the module that it becomes, and key in logs.
    """

    usage = (
        "self.loss_weights = None  # in __init__\n"
        'parts = {"main": main, "auxiliary": auxiliary}  # in training_step\n'
        "loss = sum(parts.values()) if self.loss_weights is None else self.loss_weights(parts)"
    )

    def __init__(
        self,
        names: Sequence[str],
        init: float | Sequence[float] = 1.0,
        transform: Transform | None = None,
        name: str = "loss_weights",
    ) -> None:
        super().__init__()
        if not names or len(set(names)) != len(names):
            raise ValueError(f"names must be a list of different names. Got {names!r}.")
        self.names, self.name = tuple(names), name
        several = [init] * len(self.names) if is_number(init) else init
        self.init = tuple(cast("Sequence[float]", several))
        if len(self.init) != len(self.names):
            raise ValueError(f"init must be finite, one or one per name. Got {init!r} for {list(names)}.")
        self._use(transform or Softplus(), self.init)

    def _initial(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"weights": torch.tensor(self.init, dtype=dtype)}

    def entries(self) -> tuple[str, ...]:
        """Return the names of the parts."""
        return self.names

    def __call__(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Σ wᵢ·lossᵢ, a scalar, at least float32; the names must be those given at construction."""
        if set(losses) != set(self.names):
            raise ValueError(f"losses must have the names {list(self.names)}. Got {list(losses)}.")
        weights = self.transform.forward(self.raw("weights"))
        return torch.stack([w * losses[n] for w, n in zip(weights, self.names, strict=True)]).sum()
