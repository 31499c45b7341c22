"""The current state and frame of a run that measures Lyapunov exponents."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_nested.dynamics.checks import require_memory
from lightning_nested.dynamics.frames import (
    from_rows,
    oriented,
    orthonormalize,
    random_frame,
    to_rows,
    unoriented,
)
from lightning_nested.dynamics.maps import DifferentiableMap, State, recorded
from lightning_nested.linalg.vectors import Vector

_SELF_CHECK = 32  # coordinates up to which the determinant is computed beside the full spectrum
# Frames of at most so many numbers are oriented and checked so many windows at a time.
_SMALL, _TOGETHER = 4096, 64


class SpectrumRun:
    """Current state and frame of one run, or of a batch of them."""

    rows: Tensor  # (..., k, n)

    def __init__(self, differentiable: DifferentiableMap, x0: State, *, batched: bool, every: int) -> None:
        self.state: Vector = tuple(a.detach() for a in ((x0,) if isinstance(x0, Tensor) else x0))
        self.like = differentiable.coordinates(self.state)
        if not self.like or any(not a.is_floating_point() for a in self.like):
            raise ValueError(
                f"The state x0 must be tensors of real floating-point numbers. Got "
                f"{[a.dtype for a in self.state]}; view complex ones as real (torch.view_as_real)."
            )
        self._every, self._batch_dims = every, int(batched)
        self.batch = tuple(self.like[0].shape[: self._batch_dims])
        self.n = sum(a.numel() for a in self.like) // max(1, math.prod(self.batch))
        self.determinants: list[Tensor] = []  # log |det| of each window, of a small full spectrum
        self.frames: list[Tensor] = []
        self.factors: list[Tensor] = []
        self._steps_done = 0
        self._push = differentiable.push_batch if batched else differentiable.push
        self._step = torch.vmap(differentiable.step) if batched else differentiable.step

    def begin(self, k: int, frame: Tensor | None, generator: torch.Generator | None, records: bool) -> None:
        """Set the first frame, and record the map's operations if that pays."""
        shape = (*self.batch, k, self.n)
        if frame is None:
            self.rows = random_frame(k, self.n, self.like[0], generator, self.batch)
        elif frame.shape == shape:
            self.rows = orthonormalize(frame.to(self.like[0]))[0]
        else:
            raise ValueError(f"frame must have shape {shape}, one tangent per row. Got {tuple(frame.shape)}.")
        if records:
            tangents = from_rows(self.rows, self.like, batch_dims=self._batch_dims)
            self._push = recorded(self._push, self.state, tangents)

    def check_memory(self, frames: int) -> None:
        """Refuse to keep more frames than fit into memory."""
        needed = frames * self.rows.numel() * self.rows.element_size()
        cure = "take fewer steps, fewer exponents, or a larger orthonormalize_every"
        require_memory(needed, "covariant=True keeps every frame of the run:", cure)

    def check_function(self) -> None:
        """Raise ValueError unless two evaluations agree and leave their input unchanged."""
        x = self.state
        before = tuple(a.clone() for a in x)
        try:
            first, second = (tuple(a.clone() for a in self._step(before)) for _ in range(2))
        except RuntimeError as error:
            if "randomness" in str(error):
                raise ValueError(_NOT_A_FUNCTION.format("it draws random numbers")) from error
            raise
        if any(bool(a.isfinite().all()) and not torch.equal(a, b) for a, b in zip(x, before, strict=True)):
            raise ValueError(_NOT_A_FUNCTION.format("it writes to its input"))
        if [a.shape for a in first] != [a.shape for a in x]:
            raise ValueError(
                f"step must return a state of the shapes of its input. Got {[tuple(a.shape) for a in first]} from "
                f"{[tuple(a.shape) for a in x]}."
            )
        if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True)):
            raise ValueError(_NOT_A_FUNCTION.format("two evaluations at the same state differ"))

    def compile(self) -> None:
        """Compile the recorded operations of a step.

        Raises:
            ValueError: They could not be recorded, or not be compiled.
        """
        if not isinstance(self._push, torch.fx.GraphModule):
            raise ValueError(
                "compile=True needs a map whose operations can be recorded, in a run of 30 steps or more. Got one with "
                "Python branches on values, or fewer steps; leave compile out."
            )
        compiled = torch.compile(self._push, dynamic=False)
        frame = from_rows(self.rows, self.like, batch_dims=self._batch_dims)
        try:
            compiled(self.state, frame)
        except Exception as error:
            message = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(
                f"compile=True needs a C++ compiler that torch.compile finds. Got: {message[0]} Leave compile out, or "
                "install one."
            ) from error
        self._push = compiled

    def measure(self, windows: int, *, keep: bool) -> Tensor:
        """Return the growth factors (T, ..., k) in each window; also store frames and factors if asked to."""
        # A look at a number costs as much as a step of a small map, so many are looked at together.
        at_once = _TOGETHER if self.rows.numel() <= _SMALL else 1
        counts = [min(at_once, windows - first) for first in range(0, windows, at_once)]
        growth = [self._advance(count, keep) for count in counts]
        return torch.cat(growth) if growth else self.rows.new_empty(0, *self.rows.shape[:-1])

    def _advance(self, windows: int, keep: bool) -> Tensor:
        """Take windows of ``every`` steps, each with an orthonormalisation, and return their growth factors."""
        states: list[Vector] = []
        pushed: list[Tensor] = []
        raw: list[tuple[Tensor, Tensor]] = []
        try:
            for _ in range(windows):
                x, frame = self.state, from_rows(self.rows, self.like, batch_dims=self._batch_dims)
                for _ in range(self._every):
                    x, frame = self._push(x, frame)
                self.state = tuple(x)
                states.append(self.state)
                pushed.append(to_rows(frame, batch_dims=self._batch_dims))
                # Several are oriented together, below.
                raw.append(unoriented(pushed[-1]) if windows > 1 else orthonormalize(pushed[-1]))
                self.rows = raw[-1][0]
        finally:  # the cause of an error is more often a number that is not finite
            self._check_finite(states, pushed)
        frames, lower = (torch.stack(parts) for parts in zip(*raw, strict=True))
        if windows > 1:
            frames, lower = oriented(frames, lower)
        self._steps_done += windows * self._every
        self.rows = frames[-1]
        if self.rows.shape[-2] == self.n <= _SELF_CHECK:
            self.determinants.append(torch.linalg.slogdet(torch.stack(pushed)).logabsdet)  # |det Q| = 1
        if keep:
            self.frames.append(frames)
            self.factors.append(lower)
        return lower.diagonal(dim1=-2, dim2=-1)

    def _check_finite(self, states: list[Vector], pushed: list[Tensor]) -> None:
        """Raise FloatingPointError for the first window that ends in a number that is not finite."""
        if not pushed:
            return
        columns = [torch.stack(pushed), *(torch.stack(c) for c in zip(*states[: len(pushed)], strict=True))]
        finite = torch.stack([c.isfinite().reshape(len(c), -1).all(dim=1) for c in columns]).all(dim=0)
        if not bool(finite.all()):
            steps = self._steps_done + self._every * (int(finite.long().argmin()) + 1)
            raise FloatingPointError(
                f"The state and its tangents must stay finite. Got a number that is not after {steps} steps: the "
                "dynamics diverges; lower its step size, start elsewhere, or orthonormalise more often."
            )


_NOT_A_FUNCTION = (
    "step must be a function of the state alone. Got one of which {}: turn dropout off or draw its masks before, keep "
    "batches fixed or make them part of the state, and put counters and running statistics into the state."
)
