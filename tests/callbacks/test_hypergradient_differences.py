"""HypergradientCallback where the training loss has no second derivative: differences of gradients replace it."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_nested.callbacks import HypergradientCallback
from lightning_nested.hypergradient import (
    ConjugateGradient,
    Current,
    Curvature,
    DoubleBackwardError,
    FiniteDifference,
    Hessian,
)
from lightning_nested.hyperparameters import Hyperparameter, WeightDecay
from lightning_nested.hyperparameters.scalar import Scalar
from tests.callbacks.tuned_regression import Regression, data, smooth, values
from tests.trainers import trainer

COMPILER = any(map(shutil.which, ("c++", "g++", "clang++")))


class Attention(nn.Module):
    """Fused attention over the five inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token, self.qkv, self.head = nn.Linear(1, 8), nn.Linear(8, 24), nn.Linear(40, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unsqueeze(1) for part in self.qkv(self.token(x.unsqueeze(-1)).tanh()).chunk(3, -1))
        out: Tensor = self.head(scaled_dot_product_attention(q, k, v).flatten(1))
        return out


class Reentrant(nn.Module):
    """The first layers are checkpointed in the old way, in evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.net = smooth()

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.net[:2], x.clone().requires_grad_(), use_reentrant=True)
        out: Tensor = self.net[2](hidden)
        return out


def compiled(backend: str) -> Any:
    torch.compiler.reset()
    return torch.compile(smooth(), backend=backend, fullgraph=True)


class Scaled(Regression):
    """Its training loss has a factor that is tuned, so that a mixed derivative is taken."""

    factor: Any = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss if self.factor is None else loss * self.factor.value()


NETWORKS: dict[str, Any] = {
    "attention": lambda: Attention().double(),
    "reentrant": Reentrant,
    "compiled": lambda: compiled("aot_eager"),
    "inductor": pytest.param(
        lambda: compiled("inductor"),
        marks=[pytest.mark.slow, pytest.mark.skipif(not COMPILER, reason="Inductor needs a C++ compiler")],
    ),
}
networks = pytest.mark.parametrize(
    "net", [v if hasattr(v, "marks") else pytest.param(v) for v in NETWORKS.values()], ids=list(NETWORKS)
)


def tuned(
    net: nn.Module,
    curvature: Curvature | None = None,
    *,
    hyperparameters: Callable[[], list[Hyperparameter]] = lambda: [WeightDecay(per="tensor", init=0.1)],
    self_check: bool = True,
    **options: Any,
) -> tuple[Tensor, Tensor, list[str]]:
    """Return tuned values and weights of a short run, and the warnings of ours."""
    seed_everything(0, verbose=False)
    callback = HypergradientCallback(
        hyperparameters(),
        solver=ConjugateGradient(max_iterations=4, damping=2.0),
        curvature=curvature,
        at=Current(),
        every_n_steps=3,
        warmup_steps=1,
        self_check=self_check,
    )
    module = Scaled(net)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaders = DataLoader(data(56, 1), 8), DataLoader(data(16, 2), 8)
        trainer(callback, **options).fit(module, *loaders)
    assert callback.outer_steps > 1
    assert callback.outer_loop.skipped_steps == 0
    told = [str(w.message) for w in caught if str(w.message).startswith("HypergradientCallback")]
    weights = torch.cat([p.detach().flatten() for p in module.parameters()])
    return values(callback), weights, told


def both() -> list[Hyperparameter]:
    return [WeightDecay(per="tensor", init=0.1), Scalar("factor", 1.0)]


@networks
def test_differences_replace_what_has_no_second_derivative(net: Any) -> None:
    """As chosen differences do, and said once."""
    chosen, weights, told = tuned(net(), FiniteDifference(), hyperparameters=both)
    assert told == []
    found, same, (message,) = tuned(net(), hyperparameters=both)
    assert torch.equal(found, chosen)
    assert torch.equal(same, weights)
    assert "no second derivative" in message
    assert "two a product" in message  # in double
    assert "curvature=FiniteDifference()" in message


@pytest.mark.parametrize(
    ("net", "exact"),
    [(Reentrant, smooth), (lambda: compiled("aot_eager"), smooth)],
    ids=["reentrant", "compiled"],
)
def test_they_find_what_second_derivatives_find(net: Any, exact: Any) -> None:
    expected, weights, told = tuned(exact(), hyperparameters=both)
    assert told == []
    found, same, _ = tuned(net(), hyperparameters=both)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(same, weights, rtol=1e-6, atol=1e-8)


def test_they_find_what_another_kernel_finds() -> None:
    with sdpa_kernel(SDPBackend.MATH):
        expected, _, told = tuned(Attention().double())
    assert told == []
    found, _, _ = tuned(Attention().double())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["attention", "reentrant", "compiled"])
def test_accumulated_batches(name: str) -> None:
    chosen, weights, _ = tuned(NETWORKS[name](), FiniteDifference(), accumulate_grad_batches=3, max_epochs=2)
    found, same, told = tuned(NETWORKS[name](), accumulate_grad_batches=3, max_epochs=2)
    assert len(told) == 1
    assert torch.equal(found, chosen)
    assert torch.equal(same, weights)


@pytest.mark.parametrize("name", ["attention", "reentrant", "compiled"])
def test_a_chosen_curvature_is_never_replaced(name: str) -> None:
    with pytest.raises(DoubleBackwardError, match="FiniteDifference"):
        tuned(NETWORKS[name](), Hessian())


def test_without_the_check_nothing_is_replaced() -> None:
    with pytest.raises(DoubleBackwardError, match="FiniteDifference"):
        tuned(Attention().double(), self_check=False)
