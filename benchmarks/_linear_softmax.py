"""Linear softmax on few Fashion-MNIST images with decays: the setting of the first hypernetwork paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from lightning_nested.datamodules import FashionMNISTDataModule
from lightning_nested.hypernetworks import Response
from lightning_nested.hyperparameters import Exp, WeightDecay
from lightning_nested.modules import HypernetworkModule, ResponseLoop, ResponseOptions

Per = Literal["model", "tensor", "parameter"]
LOWEST, HIGHEST = -7.0, -1.0  # log decays


class Rows(nn.Module):
    """784 → 10 with one tensor of 785 weights (bias last) per class: one decay, ten, or 7 850."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.ParameterList(torch.zeros(785) for _ in range(10))

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        weights = torch.stack(list(self.rows))
        return functional.linear(x, weights[:, :-1], weights[:, -1])


class Data:
    """Three splits as whole batches."""

    def __init__(self, seed: int, size: int) -> None:
        source = FashionMNISTDataModule(train_size=size, val_size=size, seed=seed)
        source.prepare_data()
        source.setup("fit")
        mean = source.train_images.mean()
        self.train, self.val, self.test = (
            ((x - mean).flatten(1), y)
            for x, y in (
                (source.train_images, source.train_labels),
                (source.val_images, source.val_labels),
                (source.test_images, source.test_labels),
            )
        )

    def losses(self, weights: Tensor) -> tuple[float, float]:
        """Validation and test loss of weights (10, 785)."""
        return tuple(  # type: ignore[return-value]
            float(functional.cross_entropy(x @ weights[:, :-1].T + weights[:, -1], y))
            for x, y in (self.val, self.test)
        )


def matrix(weights: Mapping[str, Tensor]) -> Tensor:
    """(10, 785)."""
    return torch.stack([weights[f"rows.{i}"] for i in range(10)]).detach()


def optimum(data: Data, decays: Tensor) -> Tensor:
    """The trained weights for decays that broadcast to (10, 785), by L-BFGS."""
    w = torch.zeros(10, 785, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [w],
        max_iter=400,
        history_size=20,
        tolerance_grad=1e-6,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )
    x, y = data.train

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(x @ w[:, :-1].T + w[:, -1], y) + 0.5 * (decays * w.square()).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return w.detach()


class Tuned(HypernetworkModule):
    """Whole batches, whatever the loader gives."""

    data: Data

    def inner_loss(self, batch: Any, values: Mapping[str, Tensor]) -> Tensor:
        """Cross-entropy of all training images."""
        return functional.cross_entropy(self.network(self.data.train[0]), self.data.train[1])

    def outer_loss(self, batch: Any) -> Tensor:
        """Cross-entropy of all validation images."""
        return functional.cross_entropy(self.network(self.data.val[0]), self.data.val[1])


def decay(per: Per, start: float) -> WeightDecay:
    """Bounded to the range that is searched."""
    within = Exp(lower=float(torch.tensor(LOWEST).exp()), upper=float(torch.tensor(HIGHEST).exp()))
    return WeightDecay(per=per, init=float(torch.tensor(start).exp()), include=["*"], transform=within)


def fit(
    data: Data,
    response: Response | nn.Module,
    loop: ResponseLoop,
    steps: int,
    *,
    per: Per,
    start: float,
    weights: Callable[[Any], torch.optim.Optimizer],
    phi: Callable[[Any], torch.optim.Optimizer],
    outer: Callable[[Any], torch.optim.Optimizer],
    callbacks: list[Any] | None = None,
    cosine: bool = False,
) -> Tuned:
    """One run of ``steps`` batches."""

    def annealed(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50, eta_min=0.0)

    module = Tuned(
        response, decay(per, start), loop=loop, weights_optimizer=weights, response_optimizer=phi,
        outer_optimizer=outer, scale_optimizer=lambda p: torch.optim.Adam(p, lr=0.003),
        weights_scheduler=annealed if cosine else None, response_scheduler=annealed if cosine else None,
        options=ResponseOptions(log_every_n_outer_steps=0),
    )  # fmt: skip
    module.data = data
    trainer = Trainer(
        max_epochs=50, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=callbacks,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, num_sanity_val_steps=0,
    )  # fmt: skip
    batches = DataLoader(torch.zeros(max(1, steps // 50), 1), batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, batches, batches)
    return module
