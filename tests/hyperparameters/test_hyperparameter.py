"""Arguments out of range, refused by every kind of hyperparameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_nested.hyperparameters import (
    Brightness,
    Categorical,
    Cutout,
    DropoutRates,
    ExampleWeights,
    HyperparameterVector,
    Integer,
    Interval,
    Saturation,
    Scalar,
)
from tests.hyperparameters.built import built, images


def test_refusals() -> None:
    weights = ExampleWeights(4)
    weights.build({})
    for h, message in (
        (torch.zeros(2, 4), "Got example_weights, which act on the whole batch"),
        (torch.zeros(3), r"h must have shape \(4,\)"),
    ):
        with pytest.raises(ValueError, match=message), HyperparameterVector([weights]).bound(h):
            pass
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: HyperparameterVector([Scalar("a", 1.0)]), "must be built"),
        (lambda: Scalar("a", 3.0, Interval(lower=0, upper=2)), r"inside \(0, 2\). Got 3"),
        (lambda: Scalar("a", float("nan")), "finite"),
        (lambda: Integer("a", 1, 3, 4), "lower ≤ init ≤ upper"),
        (lambda: Categorical("a", ["x"]), "at least 2"),
        (lambda: Brightness(init=1.5), r"inside \(0.0, 1.0\). Got 1.5"),
        (lambda: built(Saturation())(images(channels=1)), "Got one channel"),
        (lambda: built(Brightness())(torch.zeros(3, 8, 8)), r"needs images \(batch"),
        (lambda: Cutout(length=20), "length ≤ max_length"),
        (lambda: DropoutRates(per="unit"), "per must be"),  # type: ignore[arg-type]
        (lambda: DropoutRates(init=0.95), "0 < init < upper"),
        (lambda: DropoutRates(temperature=0.0), "temperature"),
        (lambda: DropoutRates().install(nn.Linear(2, 2)), "Got none in Linear"),
        (lambda: DropoutRates().install(nn.Sequential(nn.Dropout(0.0))), "give init="),
        (lambda: built(DropoutRates()), "install"),
        (
            lambda: HyperparameterVector([built(Categorical("k", ["a", "b"]))]).at_values({"k": 2}),
            "'k' must lie",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
