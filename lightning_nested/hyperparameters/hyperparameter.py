"""Base of all that is tuned: unconstrained tensors, a transform, and a name to log under."""

from __future__ import annotations

import re
from abc import ABC
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_nested.hyperparameters.constructed import Constructed
from lightning_nested.hyperparameters.transforms import Transform
from lightning_nested.linalg.saved import require_keys


class Hyperparameter(Constructed, ABC):
    """A named group of tensors that an outer optimizer moves.

    Derive from :class:`~lightning_nested.hyperparameters.weights.BoundHyperparameter` what the training loss reads.

    ``tensors`` are unconstrained leaves; ``values()`` returns them in natural units. A hyperparameter is built once
    its sizes and device are known (:meth:`build`). It is no ``torch.nn.Module``, to stay out of the user's
    parameters, optimizers and data-parallel buckets.
    """

    name: str  # key of its values in logs and checkpoints
    transform: Transform
    moves_one_batch = False  # whether an outer step moves only the entries of its batch's examples
    weighs_examples = False  # whether it says how much examples count: tuned at the current weights
    per_example = False  # whether a tensor may get a leading dimension: one value of each example
    sets_option = False  # whether it is an option of the inner optimizer, which no loss depends on
    sets_rate = False  # whether that is the learning rate
    usage = ""  # lines to add to a module that does not read it; `shown_usage` has the attribute's own name

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}  # unconstrained leaves by name, empty until built

    def shown_usage(self) -> str:
        """Return ``usage`` with this object's attribute in place of the first name after ``self.``; shown in errors.

        >>> from lightning_nested import Scalar
        >>> print(Scalar("temperature", init=1.0).shown_usage().splitlines()[0])
        self.temperature = None  # in __init__
        """
        written, attribute = re.search(r"\bself\.(\w+)", self.usage), self.attribute
        if written is None or attribute is None or re.search(rf"\bself\.{attribute}\b", self.usage):
            return self.usage
        return re.sub(rf"\bself\.{written[1]}\b", f"self.{attribute}", self.usage)

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

    def attach_module(self, module: nn.Module) -> None:
        """Find tensors that the module has already; called at the start of ``fit``, before :meth:`build`."""

    def detach_module(self) -> None:
        """Undo what :meth:`attach_module` changed of the module's tensors; called when ``fit`` ends."""

    def attach_optimizer(self, optimizer: Optimizer) -> None:
        """Read starting values from the inner optimizer; called before the first :meth:`build`."""

    def rates(self) -> tuple[Tensor, ...] | None:
        """Learning rate of each group of the inner optimizer, with its graph; None: it is not tuned by this."""
        return None

    def advice(self, first: float, last: float) -> str | None:
        """Return what the means before and after a run say of the next one, as a line of its summary; None: nothing."""

    def reset(self) -> None:
        """Forget the tensors: the next :meth:`build` starts from the initial values."""
        self.tensors = {}

    def raw(self, key: str, device: torch.device | str = "cpu") -> Tensor:
        """Return an unconstrained tensor; before :meth:`build` its start value on ``device``, not kept.

        So a loss can be evaluated before ``fit`` has built the tensors, as in a search for the learning rate.
        """
        if self.tensors:
            return self.tensors[key]
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        return self._raw_start(key, self._initial(dtype)[key]).to(device)

    def entries(self) -> tuple[str, ...] | None:
        """Return names of the entries of its one tensor, by which values are given and saved; None: they have none."""
        return None

    def values(self) -> dict[str, Tensor]:
        """Return detached values in natural units, by the names of ``tensors``, or of :meth:`entries`."""
        with torch.no_grad():
            values = {key: self.natural(key, raw).clone() for key, raw in self.tensors.items()}
        entries = self.entries()
        if entries is None or not values:
            return values
        (value,) = values.values()
        return dict(zip(entries, value.unbind(), strict=True))

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

    def kind(self) -> dict[str, Any]:
        """Return what saved numbers mean, as plain data: class, transform, names of entries.

        A subclass whose values mean something else under another setting adds that setting: another one is then
        refused when a checkpoint is loaded. Ranges need not be added; natural values are saved too.
        """
        entries = self.entries()
        return {
            "class": type(self).__name__,
            "transform": re.sub(" at 0x[0-9a-f]+", "", repr(self.transform)),
            "entries": None if entries is None else list(entries),
        }

    @torch.no_grad()
    def load_state_dict(
        self,
        state: Mapping[str, Tensor],
        kind: Mapping[str, Any] | None = None,
        values: Mapping[str, Tensor] | None = None,
    ) -> list[str]:
        """Restore in place: unconstrained tensors, or natural values where the saved range or transform was another.

        Args:
            state: Unconstrained tensors, see :meth:`state_dict`.
            kind: What :meth:`kind` returned; None: not known, and not checked.
            values: What :meth:`values` returned; None: the transform is taken to be the same.

        Returns:
            Names of the tensors whose values were converted.

        Raises:
            ValueError: Class, settings, names or shapes differ, or a value lies outside the range.
        """
        if kind is not None:
            self._check_kind(kind)
        state = self._arrange(state, None if kind is None else kind.get("entries"))
        natural = self._arrange_values(values) if values is not None else {}
        restored, converted = {}, []
        for key, raw in self.tensors.items():
            restored[key] = state[key].to(raw)
            if key not in natural:
                continue
            value = natural[key].to(raw)
            if not _agree(self.natural(key, restored[key]), value):
                restored[key] = self._converted(key, value, kind or {})
                converted.append(key)
            self._check_range(key, restored[key], value)
        for key, raw in self.tensors.items():
            raw.copy_(restored[key])
        return converted

    def _check_kind(self, kind: Mapping[str, Any]) -> None:
        now = self.kind()
        for key in (kind.keys() & now.keys()) - {"transform", "entries"}:
            if kind[key] != now[key]:
                raise ValueError(
                    f"The saved {self.name} must have {key}={now[key]!r}. Got {key}={kind[key]!r}: its numbers mean "
                    "something else; build it as it was saved, or start without the checkpoint."
                )

    def _arrange(self, state: Mapping[str, Tensor], entries: Sequence[str] | None) -> Mapping[str, Tensor]:
        """Return saved tensors in the order of this object's entries; refuse other names and shapes."""
        own = self.entries()
        if own is not None and entries is not None and tuple(entries) != own:
            if set(entries) != set(own):
                raise ValueError(
                    f"The saved {self.name} must have the entries {list(own)}. Got {list(entries)}: the checkpoint "
                    "belongs to other settings."
                )
            order = [list(entries).index(name) for name in own]
            state = {key: value[order] for key, value in state.items()}
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
        return state

    def _arrange_values(self, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return saved natural values by the names of ``tensors``."""
        entries = self.entries()
        if entries is None:
            return values
        require_keys(values, entries, self.name)
        return {key: torch.stack([values[name] for name in entries]) for key in self.tensors}

    def _converted(self, key: str, value: Tensor, kind: Mapping[str, Any]) -> Tensor:
        """Return the unconstrained tensor of a natural value that was saved under another transform."""
        try:
            raw = self.unconstrained(key, value)
        except ValueError as error:
            raise ValueError(
                f"The saved {self.name} must lie in the range of {self.transform}. Got a checkpoint written with "
                f"{kind.get('transform')}: {error} Widen the range, or start without the checkpoint."
            ) from error
        raw = raw.to(self.tensors[key]).clone()
        self.transform.project_(raw)
        return raw

    def _check_range(self, key: str, raw: Tensor, value: Tensor) -> None:
        """Refuse a value that the first outer step would move to the end of its range."""
        moved = raw.clone()
        self.transform.project_(moved)
        end = self.natural(key, moved)
        off = (end - value).abs() > self.transform.resolution + 1e-5 * value.abs()
        if bool(off.any()):
            start, bound = (float(v[off].flatten()[0]) for v in (value, end))
            raise ValueError(
                f"The saved {self.name} must lie in the range of {self.transform}. Got {start:g}, which the first "
                f"outer step would move to {bound:g}; widen the range, or start without the checkpoint."
            )

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


def _agree(found: Tensor, saved: Tensor) -> bool:
    """Return True if values are equal but for rounding, which may differ between devices."""
    scale = float(saved.abs().max()) if saved.numel() else 0.0
    return found.shape == saved.shape and torch.allclose(found, saved, rtol=1e-5, atol=1e-7 * scale)
