"""Hyperparameters tuned without a plan: HypergradientCallback chooses nothing by the length of a run."""

from __future__ import annotations

from typing import Any, TypeVar

from lightning_nested.callbacks import HypergradientCallback
from lightning_nested.hypergradient import Current, Neumann
from lightning_nested.hyperparameters import WeightDecay
from lightning_nested.hyperparameters.outer_optimizer import default_outer_optimizer

Tuner = TypeVar("Tuner", bound=HypergradientCallback)


def exact(hyperparameters: Any, kind: type[Tuner] = HypergradientCallback, **options: Any) -> Tuner:  # type: ignore[assignment]
    """Return a callback with an outer step after every inner one, by the gradient at the current weights.

    Args:
        hyperparameters: What is tuned.
        kind: Class of the callback.
        options: Arguments that replace those defaults.
    """
    defaults: dict[str, Any] = {
        "at": Current(),
        "every_n_steps": 1,
        "warmup_steps": 0,
        "solver": Neumann(),
        "optimizer": default_outer_optimizer,
    }
    return kind(hyperparameters, **{**defaults, **options})


def decay_all(*arguments: Any, **options: Any) -> WeightDecay:
    """Return a decay of every parameter, biases too, that starts at 1e-4 in runs of any length."""
    return WeightDecay(*arguments, **{"init": 1e-4, "include": ("*",), **options})
