"""Base of all that is tuned: unconstrained tensors, a transform, and a name to log under."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_nested.hyperparameters.transforms import Transform


class Hyperparameter(ABC):
    """A named group of tensors that an outer optimizer moves.

    ``tensors`` are unconstrained leaves; ``values()`` returns them in natural units. A hyperparameter is built once
    its sizes and device are known (:meth:`build`). It is no ``torch.nn.Module``, to stay out of the user's
    parameters, optimizers and data-parallel buckets.
    """

    name: str  # key of its values in logs and checkpoints
    transform: Transform
    per_example = False  # whether a tensor may get a leading dimension: one value of each example
    sets_rate = False  # whether it is the inner optimizer's learning rate, which no loss depends on
    usage = ""  # lines to add to a module that does not read it, shown in errors

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}  # unconstrained leaves by name, empty until built

    @property
    def built(self) -> bool:
        """True once :meth:`build` has run."""
        return bool(self.tensors)

    def build(self, parameters: Mapping[str, Tensor], device: torch.device | str = "cpu") -> None:
        """Create the tensors. A second call keeps the values of those that stay; :meth:`reset` forgets them.

        Args:
            parameters: Inner parameters by name.
            device: Device of the tensors.
        """
        dtypes = [p.dtype for p in parameters.values() if p.is_floating_point()]
        # At least float32: an outer step changes a log-decay of −9 by some 0.05, which bfloat16 rounds to nothing.
        dtype = reduce(torch.promote_types, dtypes or [torch.get_default_dtype()], torch.float32)
        self._create(self._initial(dtype), device)

    def _initial(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the tensors' initial values in natural units; called by :meth:`build`."""
        raise NotImplementedError(f"{type(self).__name__} must define _initial(dtype), or override build.")

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
        """Forget the tensors: the next :meth:`build` starts from the initial values."""
        self.tensors = {}

    def entries(self) -> tuple[str, ...] | None:
        """Return names of the entries of its one tensor, if they come and go with the inner parameters; else None."""
        return None

    def values(self) -> dict[str, Tensor]:
        """Return detached values in natural units, by the names of ``tensors``."""
        with torch.no_grad():
            return {key: self.natural(key, raw).clone() for key, raw in self.tensors.items()}

    def natural(self, key: str, raw: Tensor) -> Tensor:
        """Return the value in natural units of ``raw`` in place of ``tensors[key]``, with its graph."""
        return self.transform.forward(raw)

    def unconstrained(self, key: str, value: Tensor) -> Tensor:
        """Return the unconstrained tensor of a natural value, the inverse of :meth:`natural`.

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
        """Return detached copies of the unconstrained tensors on the CPU."""
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

    def _use(self, transform: Transform, init: float | Sequence[float]) -> None:
        """Set the transform, and refuse an initial value outside its range at once instead of in ``fit``."""
        self.transform = transform
        try:
            transform.start(torch.tensor(init, dtype=torch.float64))
        except ValueError as error:
            raise ValueError(f"init of {self.name!r} must lie in its transform's range: {error}") from error

    def _create(self, values: Mapping[str, Tensor], device: torch.device | str) -> None:
        """Create leaves at natural ``values``; an earlier tensor of that name and shape keeps its own."""
        earlier, self.tensors = self.tensors, {}
        for key, value in values.items():
            old = earlier.get(key)
            if old is None or old.shape != value.shape:
                self.tensors[key] = self._raw_start(key, value).to(device).clone().requires_grad_(True)
            elif old.dtype == value.dtype and old.device == torch.empty(0, device=device).device:
                self.tensors[key] = old
            else:
                self.tensors[key] = old.detach().to(device, value.dtype).requires_grad_(True)

    def _raw_start(self, key: str, value: Tensor) -> Tensor:
        return self.transform.start(value.detach())

    def __getstate__(self) -> dict[str, Any]:
        # A module that holds this object can be deep-copied or pickled: leaves are stored as plain tensors.
        return {**self.__dict__, "tensors": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.tensors = {key: raw.requires_grad_(True) for key, raw in state["tensors"].items()}
