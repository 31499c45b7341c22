"""All hyperparameters as one vector, which can be replaced by another point for the time of a block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_nested.hyperparameters.hyperparameter import Hyperparameter

T = TypeVar("T")


def labelled(name: str, values: Mapping[str, T]) -> dict[str, T]:
    """Label the values of a hyperparameter: ``name`` for a single one, else ``name/key``."""
    return {name if len(values) == 1 else f"{name}/{key}": value for key, value in values.items()}


class HyperparameterVector:
    """The unconstrained tensors of built hyperparameters, end to end: h of shape (n,)."""

    def __init__(self, hyperparameters: Sequence[Hyperparameter]) -> None:
        for hyperparameter in hyperparameters:
            if not hyperparameter.built:
                raise ValueError(f"hyperparameters must be built. Got {hyperparameter.name!r}, which is not.")
        self.hyperparameters = tuple(hyperparameters)
        self._held: dict[str, dict[str, Tensor]] | None = None  # the leaves, while others replace them
        self.sizes = [t.numel() for t in self.tensors]

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def _leaves(self) -> dict[str, dict[str, Tensor]]:
        return self._held if self._held is not None else {h.name: h.tensors for h in self.hyperparameters}

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The leaves, in the vector's order."""
        return tuple(t for h in self.hyperparameters for t in self._leaves[h.name].values())

    def flat(self) -> Tensor:
        """h (n,), with its graph to the leaves."""
        return torch.cat([t.reshape(-1) for t in self.tensors])

    def at_values(self, values: Mapping[str, Any]) -> Tensor:
        """Return h for values in natural units, detached; hyperparameters that are not named keep theirs.

        Args:
            values: Values by ``name`` or ``name/key``, as :meth:`bound` yields them.

        Raises:
            ValueError: A name is unknown, a value lies outside its interval, or has another shape.
        """
        given, pieces = dict(values), []
        for hyperparameter in self.hyperparameters:
            leaves = self._leaves[hyperparameter.name]
            labels = labelled(hyperparameter.name, leaves)
            for label, (key, leaf) in zip(labels, leaves.items(), strict=True):
                if label not in given:
                    pieces.append(leaf.detach().reshape(-1))
                    continue
                value = torch.as_tensor(given.pop(label), dtype=leaf.dtype, device=leaf.device)
                try:
                    raw = hyperparameter.unconstrained(key, value)
                except ValueError as error:
                    raise ValueError(f"The value of {label!r} must lie in its interval: {error}") from error
                if raw.numel() not in (1, leaf.numel()):
                    raise ValueError(f"{label!r} must be {tuple(leaf.shape)}. Got {tuple(value.shape)}.")
                pieces.append(raw.expand(leaf.shape).reshape(-1))
        if given:
            known = ", ".join(h.name for h in self.hyperparameters)
            raise ValueError(f"values must be of {known}. Got {', '.join(given)}.")
        return torch.cat(pieces)

    @contextmanager
    def bound(self, h: Tensor) -> Iterator[dict[str, Tensor]]:
        """Give every hyperparameter the values of ``h``, (n,) or (batch, n), until the block ends.

        Yields:
            Values in natural units, with their graph to h: by ``name``, or ``name/key`` where there are several.

        Raises:
            ValueError: h has another length, or one row per example where a hyperparameter acts on the whole batch.
        """
        n = len(self)
        if h.dim() not in (1, 2) or h.shape[-1] != n:
            raise ValueError(f"h must have shape ({n},) or (batch, {n}). Got {tuple(h.shape)}.")
        if h.dim() == 2:
            batch = [x.name for x in self.hyperparameters if not x.per_example]
            if batch:
                raise ValueError(
                    f"One h of each example needs hyperparameters that act on examples. Got {', '.join(batch)}, which "
                    f"act on the whole batch; give one h of shape ({n},)."
                )
        pieces = iter(h.split(self.sizes, dim=-1))  # type: ignore[no-untyped-call]
        lead = h.shape[:-1]
        before = [h.tensors for h in self.hyperparameters]
        held, self._held = self._held, self._leaves
        natural = {}
        for hyperparameter in self.hyperparameters:
            leaves = self._held[hyperparameter.name]
            moved = {key: next(pieces).reshape((*lead, *leaf.shape)) for key, leaf in leaves.items()}
            hyperparameter.tensors = moved
            values = {key: hyperparameter.natural(key, raw) for key, raw in moved.items()}
            natural.update(labelled(hyperparameter.name, values))
        try:
            yield natural
        finally:
            self._held = held
            for hyperparameter, tensors in zip(self.hyperparameters, before, strict=True):
                hyperparameter.tensors = tensors
