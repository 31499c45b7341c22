"""What is tuned: an unconstrained tensor, a transform, and a name to log under."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_nested.hyperparameters.transforms import Transform


class Hyperparameter(ABC):
    """A named group of tensors that an outer optimizer moves.

    ``tensors`` are unconstrained leaves; ``values()`` reads them in natural units. A hyperparameter is built once
    its sizes and device are known (:meth:`build`), and is no ``torch.nn.Module``: it stays out of the user's
    parameters, optimizers and data-parallel buckets.

    Attributes:
        name: Key of its values in logs and checkpoints.
        tensors: Unconstrained leaves by name, empty until built.
        per_example: Whether it can be read at one value of each example of a batch.
    """

    name: str
    transform: Transform
    per_example = False  # whether a tensor may get a leading dimension: one value of each example
    sets_rate = False  # whether it is the inner optimizer's learning rate, which no loss depends on
    usage = ""  # lines to add to a module that does not read it, shown in errors

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    @property
    def built(self) -> bool:
        """Whether :meth:`build` has run."""
        return bool(self.tensors)

    @abstractmethod
    def build(self, parameters: Mapping[str, Tensor], device: torch.device | str = "cpu") -> None:
        """Create the tensors. A second call keeps the values of those that stay; :meth:`reset` forgets them.

        Args:
            parameters: Inner parameters by name.
            device: Where the tensors live.
        """

    @property
    def attribute(self) -> str | None:
        """Name of the module's attribute through which the training loss reads this object; None: it does not."""
        return None

    def attach_module(self, module: nn.Module) -> None:  # noqa: B027 - optional
        """Find tensors that the module has already; called at the start of ``fit``, before :meth:`build`."""

    def attach_optimizer(self, optimizer: Optimizer) -> None:  # noqa: B027 - optional
        """Read starting values from the inner optimizer; called before the first :meth:`build`."""

    def rates(self) -> tuple[Tensor, ...] | None:
        """Learning rate of each group of the inner optimizer, with its graph; None: it is not tuned by this."""
        return None

    def reset(self) -> None:
        """Forget the tensors: the next :meth:`build` begins anew."""
        self.tensors = {}

    def entries(self) -> tuple[str, ...] | None:
        """Names of the entries of its one tensor, where they come and go with the inner parameters; else None."""
        return None

    def values(self) -> dict[str, Tensor]:
        """Detached values in natural units, by the names of ``tensors``."""
        with torch.no_grad():
            return {key: self.natural(key, raw).clone() for key, raw in self.tensors.items()}

    def natural(self, key: str, raw: Tensor) -> Tensor:
        """Value in natural units of the unconstrained ``raw`` in place of ``tensors[key]``, with its graph."""
        return self.transform.forward(raw)

    def unconstrained(self, key: str, value: Tensor) -> Tensor:
        """The inverse of :meth:`natural`.

        Raises:
            ValueError: ``value`` lies outside the transform's range.
        """
        return self.transform.inverse(value)

    @torch.no_grad()
    def project_(self) -> None:
        """Move the tensors into the transform's range, in place; to be called after each outer step."""
        for raw in self.tensors.values():
            self.transform.project_(raw)

    def state_dict(self) -> dict[str, Tensor]:
        """Unconstrained tensors, detached copies on the CPU."""
        return {key: raw.detach().cpu().clone() for key, raw in self.tensors.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the unconstrained tensors in place.

        Raises:
            ValueError: Names or shapes differ.
        """
        if set(state) != set(self.tensors):
            raise ValueError(
                f"The saved {self.name} must have the tensors {sorted(self.tensors)}. Got {sorted(state)}: the "
                "checkpoint belongs to other settings."
            )
        for key, raw in self.tensors.items():
            if raw.shape != state[key].shape:
                raise ValueError(
                    f"The saved {self.name}[{key!r}] must have shape {tuple(raw.shape)}. "
                    f"Got {tuple(state[key].shape)}: the checkpoint belongs to other settings."
                )
            raw.copy_(state[key])

    @staticmethod
    def _dtype(parameters: Mapping[str, Tensor]) -> torch.dtype:
        """Return the type of unconstrained tensors: the widest of the parameters, at least float32.

        An outer step changes a log-decay of −9 by some 0.05, which bfloat16 rounds to nothing.
        """
        dtypes = [p.dtype for p in parameters.values() if p.is_floating_point()]
        return reduce(torch.promote_types, dtypes or [torch.get_default_dtype()], torch.float32)

    def _create(self, values: Mapping[str, Tensor], device: torch.device | str) -> None:
        """Leaves at natural ``values``; an earlier tensor of that name and shape stays, with its own."""
        earlier, self.tensors = self.tensors, {}
        for key, value in values.items():
            old = earlier.get(key)
            if old is None or old.shape != value.shape:
                self.tensors[key] = self._leaf(value, device)
            elif old.dtype == value.dtype and old.device == torch.empty(0, device=device).device:
                self.tensors[key] = old
            else:
                self.tensors[key] = old.detach().to(device, value.dtype).requires_grad_(True)

    def _leaf(self, value: Tensor, device: torch.device | str) -> Tensor:
        """An unconstrained leaf whose natural value is ``value``."""
        return self.transform.start(value.detach()).to(device).clone().requires_grad_(True)

    def __getstate__(self) -> dict[str, Any]:
        # A module that holds this object can be deep-copied or pickled: leaves are stored as plain tensors.
        return {**self.__dict__, "tensors": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.tensors = {key: raw.requires_grad_(True) for key, raw in state["tensors"].items()}
