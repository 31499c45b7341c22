"""All hyperparameters as one vector."""

from __future__ import annotations

import pytest
import torch

from lightning_nested.hyperparameters import (
    Hyperparameter,
    HyperparameterVector,
    Scalar,
    WeightDecay,
)


def test_the_vector_is_all_tensors_end_to_end() -> None:
    decay, scalar = WeightDecay(per="parameter", init=0.1, include=["*"]), Scalar("factor", 2.0)
    tuned: list[Hyperparameter] = [decay, scalar]
    for hyperparameter in tuned:
        hyperparameter.build({"a": torch.zeros(2, 3), "b": torch.zeros(4)})
    vector = HyperparameterVector(tuned)
    assert len(vector) == 11
    flat = vector.flat()
    assert torch.equal(flat[:6].reshape(2, 3), decay.tensors["a"])
    flat.sum().backward()
    assert all(torch.equal(t.grad, torch.ones_like(t)) for t in vector.tensors)
    with vector.bound(flat.detach() + 1) as values:
        assert float(values["factor"]) == 3.0
        assert decay.penalty({"a": torch.ones(2, 3), "b": torch.ones(4)}).item() == pytest.approx(
            0.5 * 0.1 * 2.71828 * 10
        )
    assert decay.tensors["a"].is_leaf
