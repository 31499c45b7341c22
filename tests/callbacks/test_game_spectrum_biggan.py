"""GameSpectrumCallback on BigGAN: a dense Jacobian in float64 beside it, and a training that does not notice."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from lightning_nested.callbacks import GameSpectrumCallback, GeneratorEMA
from lightning_nested.games import joint_step
from lightning_nested.modules import (
    R1,
    BigGAN,
    BigGANNetworks,
    BigGANObjective,
    DiffAugment,
    NonSaturating,
)
from lightning_nested.networks import frozen_power_iteration
from lightning_nested.optim import ComplexAdam
from tests.modules.gan.tiny import data, module, same, tensors, trainer

# ε is large so that entries without a gradient so far do not have the largest eigenvalues.
OPTIMIZERS = {
    "discriminator_optimizer": partial(ComplexAdam, lr=2e-4, betas=(0.8, 0.999), eps=1e-3),
    "generator_optimizer": partial(torch.optim.Adam, lr=2e-4, betas=(0.0, 0.999), eps=1e-3),
}
LAYERS = {
    "discriminator": ("blocks.0.conv1.bias", "blocks.0.shortcut.", "blocks.3.conv2.bias", "linear."),
    "generator": ("blocks.0.norm1.gain.", "norm.", "conv.bias"),
}  # fmt: skip


class First(Callback):
    """The first batch of the run: the one that is measured on."""

    def on_train_batch_start(self, _: Any, __: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.batch = [t.clone() for t in batch]


def trained(network: nn.Module) -> list[nn.Parameter]:
    return [p for p in network.parameters() if p.requires_grad]


def jacobian_by_hand(gan: BigGAN, batch: list[Tensor], seed: int) -> Tensor:
    """∂ξ/∂w of the written-out losses, with no code of games, modules or callbacks."""
    real, labels = batch
    d, g = gan.discriminator.train(), gan.generator.train()
    torch.manual_seed(seed)
    draws = [
        (torch.randn(len(real), 8, dtype=torch.float64), torch.randint(10, (len(real),))) for _ in range(2)
    ]
    softplus = nn.functional.softplus
    x = real.clone().requires_grad_()
    with frozen_power_iteration(d, g):
        scores = d(torch.cat((real, g(*draws[0]))), torch.cat((labels, draws[0][1])))
        loss_g = softplus(-d(g(*draws[1]), draws[1][1])).mean()
        (slope,) = torch.autograd.grad(d(x, labels).sum(), x, create_graph=True)
    n = len(real)
    loss_d = softplus(-scores[:n]).mean() + softplus(scores[n:]).mean()
    loss_d = loss_d + 0.5 * 0.3 * slope.square().sum(dim=(1, 2, 3)).mean()
    gradient = [
        *torch.autograd.grad(loss_d, trained(d), create_graph=True),
        *torch.autograd.grad(loss_g, trained(g), create_graph=True),
    ]
    every = [*trained(d), *trained(g)]
    flat = torch.cat([t.reshape(-1) for t in gradient])
    unit = torch.eye(len(flat), dtype=flat.dtype)
    rows = torch.autograd.grad(flat, every, unit, is_grads_batched=True, materialize_grads=True)
    return torch.cat([t.reshape(len(flat), -1) for t in rows], dim=1)


def steps_by_hand(gan: BigGAN) -> Tensor:
    """What each entry's gradient is multiplied by: α/(√v̂ + ε)."""
    scale = []
    for name in ("discriminator", "generator"):
        optimizer = gan.running_players[name].optimizer.optimizer
        for p in trained(gan.get_submodule(name)):
            state = optimizer.state[p]
            root = (state["exp_avg_sq"] / (1 - 0.999 ** float(state["step"]))).sqrt()
            scale.append((2e-4 / (root + 1e-3)).reshape(-1))
    return torch.cat(scale)


def test_leading_eigenvalues_are_those_of_the_dense_jacobian(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of some layers from both ends of each network, the others frozen: the dense matrix has a row an entry."""
    # No rate is read here, so the callback need not form the matrix as well.
    monkeypatch.setattr(joint_step, "EXACT_LIMIT", 1)
    objective = BigGANObjective(loss=NonSaturating(), regularizers=(R1(weight=0.3, every=2),))
    sizes = BigGANNetworks(width=2, latent_dim=8, initialization="orthogonal")
    gan = module(networks=sizes, objective=objective, **OPTIMIZERS)
    for player, names in LAYERS.items():
        for name, parameter in gan.get_submodule(player).named_parameters():
            parameter.requires_grad_(name.startswith(names))
    spectrum, first = GameSpectrumCallback(2, k=6, per_player=False), First()
    trainer(max_steps=2, precision="64-true", callbacks=[spectrum, first]).fit(gan, data(16, batch_size=2))
    assert [s.game_updates for s in spectrum.history] == [1, 2]
    assert spectrum._fixed is not None
    jacobian = jacobian_by_hand(gan.double(), first.batch, spectrum._fixed.seed)
    dense = torch.linalg.eigvals(steps_by_hand(gan)[:, None] * jacobian)
    dense = dense[dense.abs().argsort(descending=True)]
    found = spectrum.history[-1].eigenvalues
    largest = float(dense[0].abs())
    torch.testing.assert_close(found.abs(), dense[: len(found)].abs(), rtol=0, atol=1e-7 * largest)
    nearest = (found[:, None] - dense[None]).abs().min(dim=1).values
    assert float(nearest.max()) < 1e-7 * largest
    # The players are coupled: without the blocks between them the leading eigenvalues would be others.
    n = sum(p.numel() for p in trained(gan.discriminator))
    jacobian[:n, n:] = jacobian[n:, :n] = 0
    apart = torch.linalg.eigvals(steps_by_hand(gan)[:, None] * jacobian)
    assert float((found[:, None] - apart[None]).abs().min(dim=1).values.max()) > 1e-5 * largest


def test_training_is_the_same_to_the_last_bit() -> None:
    """Spectral vectors, running statistics, moments, the average and the random stream untouched."""
    objective = BigGANObjective(regularizers=(R1(every=2),), augment=DiffAugment(), reuse_fakes=True)

    def run(*callbacks: Callback) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Any], Tensor]:
        gan, ema = module(objective=objective, **OPTIMIZERS), GeneratorEMA(decay=0.9, start=0)
        torch.manual_seed(1)
        trainer(max_steps=2, callbacks=[*callbacks, ema]).fit(gan, data(40))
        moments = [
            value.clone()
            for player in gan.running_players.values()
            for state in player.optimizer.optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ]
        return tensors(gan), ema.state_dict()["average"], moments, torch.rand(4)

    spectrum = GameSpectrumCallback(1, k=2, per_player=False, max_products=30)
    plain, watched = run(), run(spectrum)
    assert len(spectrum.history) == 2
    same(plain[0], watched[0])
    same(plain[1], watched[1])
    assert len(plain[2]) > 0
    assert all(torch.equal(a, b) for a, b in zip(plain[2], watched[2], strict=True))
    assert torch.equal(plain[3], watched[3])
