"""Hyperparameters that a module's losses read become its attributes."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lightning_nested.hyperparameters import BoundHyperparameter, Hyperparameter


def bind_hyperparameters(module: nn.Module, hyperparameters: Iterable[Hyperparameter]) -> None:
    """Set each bound hyperparameter as the attribute of its name.

    Raises:
        ValueError: The module has that attribute already.
    """
    for hyperparameter in hyperparameters:
        if isinstance(hyperparameter, BoundHyperparameter):
            name = hyperparameter.name
            if getattr(module, name, None) not in (None, hyperparameter):
                raise ValueError(
                    f"{type(hyperparameter).__name__} becomes the attribute {name!r}. Got a "
                    f"{type(module).__name__} that has it already; set another name=."
                )
            setattr(module, name, hyperparameter)
