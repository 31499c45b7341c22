"""HypergradientCallback on a CUDA device: the values of the CPU, and half precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_nested.hypergradient import Neumann
from tests.callbacks.exact import decay_all, exact
from tests.callbacks.tuned_regression import Regression, data, sgd, smooth, values
from tests.trainers import trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def run(dtype: torch.dtype, **options: Any) -> tuple[Tensor, Tensor]:
    callback = exact(decay_all("tensor", init=0.5), optimizer=sgd(1.0), solver=Neumann(num_terms=3))
    module = Regression(smooth(dtype), rate=1e-2)
    trainer(callback, **options).fit(
        module, DataLoader(data(64, 1, dtype), 16), DataLoader(data(64, 2, dtype), 64)
    )
    assert callback.skipped_steps == 0
    return values(callback).log().cpu(), torch.cat([p.detach().cpu().flatten() for p in module.parameters()])


def test_cuda_gives_the_values_of_the_cpu() -> None:
    for cpu, cuda in zip(run(torch.float64), run(torch.float64, accelerator="cuda"), strict=True):
        torch.testing.assert_close(cuda, cpu, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_half_precision_is_close(precision: str) -> None:
    if precision == "bf16-mixed" and not torch.cuda.is_bf16_supported():
        pytest.skip("the device has no bf16")
    full = run(torch.float32, accelerator="cuda")[0]
    half = run(torch.float32, accelerator="cuda", precision=precision)[0]
    start = torch.tensor(0.5, dtype=torch.float64).log()
    # bf16 keeps 8 bits; four steps of a product that passes about ten roundings.
    assert float((half - full).norm() / (full - start).norm()) < 0.1
