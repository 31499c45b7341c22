"""What a running training knows of where it is heading: mean gradient, curvature of its layers, steps that remain."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_nested.hypergradient.evaluation_point import LookAhead, placed_at
from lightning_nested.hyperparameters import WeightDecay
from lightning_nested.linalg.finite import check_finite
from lightning_nested.linalg.kronecker import KroneckerFisher, KroneckerInverse
from lightning_nested.linalg.operators import DiagonalOperator, LinearOperator
from lightning_nested.linalg.processes import Reduce, agreed_number
from lightning_nested.linalg.vectors import Vector, norm
from lightning_nested.optim.step_dynamics import decay_factors, decoupled_rates, inverse_rates

# Every second gradient of so many steps before an outer step is averaged; earlier ones would hardly count.
WATCHED_STEPS = 20
# In that window, the curvature of the layers is observed every so many steps.
_OBSERVED_EVERY = 10


class Forecast:
    """Running statistics of a training, for :class:`LookAhead` and the solvers that a run provides.

    Args:
        module: Module that is trained.
        parameters: Inner parameters by name.
        optimizer: Inner optimizer.
        decays: Tuned weight decays.
        point: Options of the look ahead; None: the outer loss is taken at the current weights.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        optimizer: Optimizer,
        decays: Sequence[WeightDecay],
        *,
        point: LookAhead | None,
    ) -> None:
        self._names, self._parameters = tuple(parameters), tuple(parameters.values())
        self._optimizer, self._decays, self._point = optimizer, decays, point or LookAhead()
        self.fisher = KroneckerFisher(module, parameters, max_size=self._point.max_size)
        self.radius = self._point.start_radius
        self.remaining = math.inf  # inner steps up to the end of the run
        self._mean: Vector | None = None
        self._means = 0
        self._inverses: dict[float | str | None, KroneckerInverse] = {}  # by their damping
        # Outer steps so far, and at the last factorization.
        self._solved = self._factorized = 0
        self._factors: dict[str, Tensor] | None = None  # of the current outer step

    # ---- the inner steps before an outer one

    def watch(self, ahead: int) -> None:
        """Prepare for an inner step ``ahead`` steps before an outer one."""
        if ahead <= WATCHED_STEPS and ahead % _OBSERVED_EVERY == 1:
            self.fisher.start()

    def averages(self, ahead: int) -> bool:
        """Return True if :meth:`gradient` takes the gradient ``ahead`` steps before an outer step."""
        # Every second gradient serves the mean as well.
        return ahead <= WATCHED_STEPS and ahead % 2 == 1

    @torch.no_grad()
    def gradient(
        self,
        ahead: int,
        *,
        scale: float = 1.0,
        hook_scale: float = 1.0,
        reduce: Reduce | None = None,
        batches: int = 1,
        processes: int = 1,
    ) -> None:
        """Take the inner gradient, tuned decays included, that lies in ``.grad`` after the backward passes.

        Args:
            ahead: Inner steps up to the next outer one.
            scale: Factor that ``.grad`` carries.
            hook_scale: Factor that the loss carried in the backward passes.
            reduce: Averages a tensor over processes.
            batches: Accumulated batches.
            processes: Their number.
        """
        if not self.averages(ahead):
            return
        if ahead % _OBSERVED_EVERY == 1:
            self.fisher.update(
                scale, hook_scale=hook_scale, reduce=reduce, batches=batches, processes=processes
            )
        gradients = [_dense(p.grad) for p in self._parameters]
        # A step that a GradScaler is about to skip.
        if hook_scale != 1.0 and not math.isfinite(float(norm(tuple(g for g in gradients if g is not None)))):
            return
        if self._mean is None:
            self._mean = tuple(torch.zeros_like(p) for p in self._parameters)
        pairs = [(m, g.to(m.dtype)) for m, g in zip(self._mean, gradients, strict=True) if g is not None]
        # As after a training_step that returned None.
        if not pairs:
            return
        self._means += 1
        weight = max(0.2, 1 / self._means)
        if scale == 1.0:
            # One pass over memory instead of two.
            torch._foreach_lerp_([m for m, _ in pairs], [g for _, g in pairs], weight)
            return
        torch._foreach_mul_([m for m, _ in pairs], 1 - weight)
        torch._foreach_add_([m for m, _ in pairs], [g for _, g in pairs], alpha=weight / scale)

    def is_of(self, state: Mapping[str, Any] | None) -> bool:
        """Return True if a state is of these parameters."""
        return state is not None and state["names"] == list(self._names)

    def stop(self) -> None:
        """Remove all hooks."""
        self.fisher.stop()

    # ---- the outer step

    def decay_factors(self) -> dict[str, Tensor]:
        """Return by name the factors that make coupled decays of decoupled ones, found once an outer step."""
        if self._factors is None:
            parameters = dict(zip(self._names, self._parameters, strict=True))
            self._factors = decay_factors(self._optimizer, parameters)
        return self._factors

    def _coupled_decays(self) -> list[Tensor | float]:
        """Return D, the tuned decays as coupled ones, for each parameter."""
        factors = self.decay_factors()
        total: dict[str, Any] = dict.fromkeys(self._names, 0.0)
        for decay in self._decays:
            for name, value in decay.decays().items():
                total[name] = total[name] + value.detach() * factors.get(name, 1.0)
        return [total[name] for name in self._names]

    def _reach(self, damping: float | None) -> list[Tensor | float]:
        """Return the damping of each parameter: 1/(R·t), or the number given."""
        if damping is not None:
            return [damping] * len(self._parameters)
        steps = min(max(self.remaining, float(WATCHED_STEPS)), 1e6)
        return [r / steps for r in inverse_rates(self._optimizer, self._parameters, steps)]

    def kronecker_inverse(
        self, damping: float | None = None, relative: float | None = None
    ) -> LinearOperator:
        """Return (F + D + damping)⁻¹, factorized again at every ``refresh_every``-th outer step."""
        key = damping if relative is None else f"relative {relative}"
        due = self._solved - self._factorized >= self._point.refresh_every
        if due or not self._inverses:
            self._factorized, self._inverses = self._solved, {}
        if key not in self._inverses:
            if relative is not None:
                # Before the first observation there is no curvature: what is left of the run damps.
                damping = relative * self.fisher.mean_diagonal() or None
            amounts = [d + r for d, r in zip(self._coupled_decays(), self._reach(damping), strict=True)]
            self._inverses[key] = self.fisher.inverse(amounts)
        return self._inverses[key]

    def diagonal_inverse(self, damping: float | None = None) -> LinearOperator:
        """Return (D + 1/(R·t))⁻¹; ``damping`` is relative to the mean of 1/R."""
        reach = self._reach(None)
        if damping is not None:
            inverse = inverse_rates(self._optimizer, self._parameters)
            reach = [damping * r / r.mean().clamp_min(1e-30) for r in inverse]
        return DiagonalOperator([1.0 / (d + r) for d, r in zip(self._coupled_decays(), reach, strict=True)])

    def weights(self, loss: float, evaluate: Callable[[], float], reduce: Reduce | None) -> Vector:
        """Return w′, the weights that the training is heading to.

        Args:
            loss: Training loss of the current batch at w, without the decays.
            evaluate: Evaluates it again at the values that the parameters have when called; NaN if that cannot be done.
            reduce: Averages a tensor over processes.

        Raises:
            FloatingPointError: The gradient or the curvature is not finite.
        """
        weights = tuple(p.detach() for p in self._parameters)
        mean = self._mean
        if mean is None:
            return weights
        decays = self._coupled_decays()
        # Coupled decays are part of the gradients already.
        decoupled = decoupled_rates(self._optimizer)
        mean = tuple(
            m + d * w if id(p) in decoupled else m
            for p, m, d, w in zip(self._parameters, mean, decays, weights, strict=True)
        )
        if not math.isfinite(agreed_number(norm(mean), reduce)):
            self._mean, self._means = None, 0
            raise FloatingPointError("The mean of the inner gradient must be finite. Got one that is not.")
        direction = self.kronecker_inverse() @ mean
        check_finite(agreed_number(norm(direction), reduce), "The direction of the inner training")
        moved = self._point.weights(weights, direction, self.radius)
        with placed_at(self._parameters, moved):
            after = evaluate()
        change = after - loss + _penalty_change(decays, moved, weights)
        agreed = agreed_number(torch.tensor(change, dtype=torch.float64), reduce)
        if math.isnan(agreed):
            return moved
        fell = agreed < 0
        self.radius = self._point.next_radius(self.radius, fell=fell)
        return moved if fell else self._point.weights(weights, direction, self.radius)

    def count(self) -> None:
        """Begin an outer step, and count it."""
        self._solved += 1
        self._factors = None

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next outer step depends on."""
        return {
            "names": list(self._names),
            "radius": self.radius,
            "mean": self._mean,
            "means": self._means,
            "solved": (self._solved, self._factorized),
            "fisher": self.fisher.state_dict(),
            "inverses": [(damping, inverse.state_dict()) for damping, inverse in self._inverses.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore; the statistics of another model begin again."""
        self.radius, self._means = state["radius"], state["means"]
        self._solved, self._factorized = state["solved"]
        self._factors, mean = None, state["mean"]
        fits = mean is not None and [m.shape for m in mean] == [p.shape for p in self._parameters]
        self._mean = (
            tuple(m.to(p.device) for m, p in zip(mean, self._parameters, strict=True)) if fits else None
        )
        self.fisher.load_state_dict(state["fisher"])
        restored = {damping: self.fisher.restored_inverse(saved) for damping, saved in state["inverses"]}
        self._inverses = {damping: inverse for damping, inverse in restored.items() if inverse is not None}


def expect_loss(forecast: Forecast | None, loss: Tensor, batches: int) -> None:
    """Tell a forecast, if there is one, of the loss whose backward pass comes: that of one of so many ``batches``."""
    if forecast is not None:
        forecast.fisher.expect(loss, batches)


def _penalty_change(decays: Sequence[Tensor | float], moved: Vector, weights: Vector) -> float:
    """Return ½ Σ d (w′² − w²) = ½ Σ d (w′ − w)(w′ + w): no small difference of large sums."""
    total = 0.0
    for d, new, old in zip(decays, moved, weights, strict=True):
        if isinstance(d, Tensor) or d:
            wide = torch.promote_types(new.dtype, torch.float32)
            change = (new.to(wide) - old).mul_(new.to(wide) + old).mul_(d)
            total += 0.5 * float(change.sum(dtype=torch.float64))
    return total


def _dense(gradient: Tensor | None) -> Tensor | None:
    return gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient
