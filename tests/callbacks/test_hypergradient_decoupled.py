"""HypergradientCallback under AdamW: tuned decays are decoupled, and take the place of the optimizer's own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_nested.callbacks import HypergradientCallback
from lightning_nested.hypergradient import DenseSolve, Identity
from lightning_nested.hypergradient.evaluation_point import Current
from lightning_nested.hyperparameters import OuterStep, WeightDecay
from lightning_nested.optim.step_dynamics import decay_factors
from tests.callbacks.tuned_regression import Regression, data, sgd, smooth, values, weights
from tests.cases import DOUBLE
from tests.conftest import Normal
from tests.trainers import trainer


class Trained(Regression):
    """AdamW with a decay of its own, or Adam and SGD with theirs, in two groups, with a schedule."""

    def __init__(self, decay: float, kind: type[torch.optim.Optimizer] = torch.optim.AdamW) -> None:
        super().__init__(smooth())
        self.decay, self.kind = decay, kind

    def configure_optimizers(self) -> Any:
        first, *rest = self.parameters()
        groups = [{"params": [first], "lr": 0.02}, {"params": rest}]
        optimizer = self.kind(groups, lr=0.05, weight_decay=self.decay)  # type: ignore[call-arg]
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    return DataLoader(data(32, 1), 8), DataLoader(data(8, 2), 8)


def fixed(per: Any, decay: float, **options: Any) -> HypergradientCallback:
    """Decays that no outer step moves."""
    return HypergradientCallback(
        WeightDecay(per, init=decay, include=["*"]), optimizer=sgd(0.0), every_n_steps=2, **options
    )


def decays(fit: Trainer) -> list[float]:
    return [group["weight_decay"] for group in fit.optimizers[0].param_groups]


@pytest.mark.parametrize(
    ("kind", "per", "clip"),
    [
        (torch.optim.AdamW, "model", None),
        (torch.optim.AdamW, "tensor", 0.05),
        (torch.optim.AdamW, "parameter", None),
        # A coupled decay of the callback is clipped; that of torch is added after the clipping.
        (torch.optim.Adam, "tensor", None),
        (torch.optim.SGD, "parameter", None),
    ],
)
def test_equal_decays_are_the_optimizers_own(
    kind: type[torch.optim.Optimizer], per: Any, clip: float | None
) -> None:
    def run(*callbacks: Callback, decay: float) -> tuple[Tensor, list[float]]:
        module, fit = Trained(decay, kind), trainer(*callbacks, max_epochs=3, gradient_clip_val=clip)
        fit.fit(module, *loaders())
        return weights(module), decays(fit)

    own = 0.4 if kind is torch.optim.AdamW else 0.0
    ours, left = run(fixed(per, 0.7), decay=own)
    expected, _ = run(decay=0.7)
    plain, _ = run(decay=0.0)
    # exp(log(0.7)) differs from 0.7 in the last bit; 12 steps.
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(ours, plain, rtol=1e-3)
    assert left == [own, own]


class Break(Callback):
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        assert decays(trainer) == [0.0, 0.0]
        if trainer.global_step == 3:
            raise RuntimeError("interrupted")


def test_the_own_decay_comes_back_after_an_exception() -> None:
    fit = trainer(fixed("model", 0.7), Break())
    with pytest.raises(RuntimeError, match="interrupted"):
        fit.fit(Trained(0.4), *loaders())
    assert decays(fit) == [0.4, 0.4]


class Save(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("first", ["with the callback", "without it"])
def test_checkpoints_hold_the_own_decay_and_runs_go_on_with_either(first: str, tmp_path: Path) -> None:
    path = tmp_path / "half.ckpt"

    def run(*callbacks: Callback, own: float = 0.4, resume: Path | None = None) -> tuple[Tensor, list[float]]:
        module, fit = Trained(own), trainer(*callbacks, max_epochs=2)
        fit.fit(module, *loaders(), ckpt_path=resume)
        return weights(module), decays(fit)

    start = [fixed("model", 0.4)] if first == "with the callback" else []
    whole, _ = run(*start, Save(path))
    groups = torch.load(path, weights_only=True)["optimizer_states"][0]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.4, 0.4]
    for callbacks in ([], [fixed("model", 0.4)]):
        resumed, left = run(*callbacks, resume=path)
        torch.testing.assert_close(resumed, whole, rtol=1e-12, atol=1e-14)
        assert left == [0.4, 0.4]


class Linear(LightningModule):
    """½ mean(Xw − y)² under AdamW; the whole data in each batch."""

    def __init__(self, weight: Tensor, **options: Any) -> None:
        super().__init__()
        self.net, self.options = nn.Linear(5, 1, bias=False, dtype=DOUBLE), options
        self.net.weight.data = weight.clone()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = 0.5 * ((self.net(batch[0]) - batch[1]) ** 2).mean()
        return loss

    def outer_loss(self, batch: Any) -> Tensor:
        return self.training_step(batch, 0)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), **self.options)


@pytest.mark.parametrize(("solver", "dense"), [(DenseSolve(damping=0.0), True), (Identity(), False)])
def test_one_outer_step_under_adamw_is_the_closed_form(solver: Any, dense: bool, normal: Normal) -> None:
    """h = −d·s·w·(H + diag(s·d))⁻¹v with s = √v̂ + ε, at the third step."""
    options, start, d = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.1, "weight_decay": 0.3}, normal(1, 5), 0.2
    (x, y), (xv, yv) = (data(20, seed).tensors for seed in (1, 2))
    train, val = (DataLoader(data(20, seed), 20) for seed in (1, 2))
    callback = HypergradientCallback(
        WeightDecay("parameter", init=d),
        at=Current(),
        solver=solver,
        optimizer=sgd(0.05),
        warmup_steps=2,
        outer_dataloader=val,
    )
    trainer(callback, max_epochs=3).fit(Linear(start, **options), train)
    assert callback.outer_steps == 1

    w, m, v = start.flatten(), torch.zeros(5, dtype=DOUBLE), torch.zeros(5, dtype=DOUBLE)
    for t in (1, 2):
        g = x.T @ (x @ w - y[:, 0]) / 20
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        w = (1 - 0.1 * d) * w - 0.1 * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 0.1)
    s = (v / (1 - 0.9**2)).sqrt() + 0.1
    outer = xv.T @ (xv @ w - yv[:, 0]) / 20
    solved = torch.linalg.solve(x.T @ x / 20 + torch.diag(s * d), outer) if dense else outer
    expected = math.log(d) + 0.05 * d * s * w * solved
    torch.testing.assert_close(values(callback).log(), expected, rtol=1e-10, atol=0)


def _converged(w: Tensor, lam: Tensor, x: Tensor, y: Tensor, optimizer: Any, steps: int) -> None:
    """Train rows of w by AdamW with decays lam, all on the same whole batch, the rate falling to nothing."""
    for t in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - t / steps)
            with torch.no_grad():
                w.mul_(1 - group["lr"] * lam)
        w.grad = (w.detach() @ x.T - y) @ x / len(x)
        optimizer.step()


def test_the_hypergradient_is_the_difference_of_converged_runs(normal: Normal) -> None:
    """dw*/dλ by central differences: the direction; the length as well once D = 1/(√v̂ + ε) moves with w.

    On whole batches √v̂ is |g| where the training ends. ε is large: otherwise the decay hardly acts there.
    """
    x, size, lam0, eps = normal(64, 6) * torch.linspace(0.5, 1.5, 6, dtype=DOUBLE), 6, 0.3, 1.0
    y, step = x @ normal(6) + normal(64), 1e-4
    lam = torch.full((2 * size, size), lam0, dtype=DOUBLE)
    for i in range(size):
        lam[2 * i, i] += step
        lam[2 * i + 1, i] -= step
    w = nn.Parameter(torch.zeros(2 * size, size, dtype=DOUBLE))
    _converged(w, lam, x, y, torch.optim.AdamW([w], betas=(0.9, 0.95), weight_decay=0.0, eps=eps), 800)
    truth = torch.stack([(w[2 * i] - w[2 * i + 1]).detach() / (2 * step) for i in range(size)], 1)

    w = nn.Parameter(torch.zeros(1, size, dtype=DOUBLE))
    optimizer = torch.optim.AdamW([w], betas=(0.9, 0.95), weight_decay=0.0, eps=eps)
    _converged(w, torch.full((1, size), lam0), x, y, optimizer, 800)
    parameters = {"w": w}
    decay = WeightDecay("parameter", init=lam0)
    outer = OuterStep([decay], solver=DenseSolve(damping=0.0))
    outer.build(parameters, "cpu")
    rows = []
    for k in range(size):
        inner = 0.5 * ((w @ x.T - y) ** 2).mean()
        outer.compute(inner, w[0, k], parameters, decay_factors=decay_factors(optimizer, parameters))
        assert outer._pending is not None
        rows.append(outer._pending[0].flatten() / lam0)  # with respect to λ, not log λ
    found = torch.stack(rows)
    cosine = torch.nn.functional.cosine_similarity(found.flatten(), truth.flatten(), dim=0)
    assert float(cosine) > 0.99

    hessian, end = x.T @ x / 64, w.detach()[0]
    g = hessian @ end - y @ x / 64
    s = g.abs() + eps
    moving = hessian + torch.diag(s * lam0) + (lam0 * end * g.sign())[:, None] * hessian
    exact = torch.linalg.solve(moving, -torch.diag(s * end))
    assert float((exact - truth).norm() / truth.norm()) < 0.01
