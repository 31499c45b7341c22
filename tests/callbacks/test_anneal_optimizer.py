from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_nested.callbacks import AnnealOptimizer
from lightning_nested.modules import Anneal, GANModule
from tests.trainers import trainer


class Watch(Callback):
    """β₁, β₂ of both players and the discriminator's weight decay, as every step saw them."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        players = pl_module.running_players
        groups = [
            players[name].optimizer.optimizer.param_groups[0] for name in ("discriminator", "generator")
        ]
        self.seen.append((groups[0]["betas"], groups[1]["betas"], groups[0]["weight_decay"]))


def run(*callbacks: Callback, steps: int = 4, scheduler: Any = None, **options: Any) -> Trainer:
    torch.manual_seed(0)
    gan = GANModule(
        nn.Linear(2, 2), nn.Linear(2, 1), latent_dim=2, scheduler=scheduler,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.5, 0.9)),
    )  # fmt: skip
    fit = trainer(*callbacks, max_epochs=-1, max_steps=steps)
    fit.fit(gan, torch.utils.data.DataLoader(torch.randn(8, 2), batch_size=4), **options)
    return fit


def test_the_options_of_one_player_move_with_updates_of_the_game(tmp_path: Path) -> None:
    def callbacks() -> list[Callback]:
        return [
            AnnealOptimizer(Anneal(0.9, 0.99, 3), player="discriminator"),
            AnnealOptimizer(Anneal(0.5, 0.0, 2), "beta1", player="generator"),
            AnnealOptimizer(Anneal(0.0, 0.4, 4), "weight_decay"),
        ]

    watch = Watch()
    fit = run(*callbacks(), watch)
    # Two batches for each update of the game.
    for step, (of_d, of_g, decay) in enumerate(watch.seen):
        update = step // 2
        assert of_d == pytest.approx((0.5, 0.9 + 0.03 * min(update, 3)), rel=1e-14)
        assert of_g == pytest.approx((max(0.5 - 0.25 * update, 0.0), 0.9), rel=1e-14)
        assert decay == pytest.approx(0.1 * update, abs=1e-14)
    assert len(watch.seen) == 8
    fit.save_checkpoint(tmp_path / "x.ckpt")
    whole, resumed = Watch(), Watch()
    run(*callbacks(), whole, steps=6)
    run(*callbacks(), resumed, steps=6, ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert resumed.seen == whole.seen[8:]


@pytest.mark.parametrize(
    ("callback", "options", "match"),
    [
        (
            AnnealOptimizer(Anneal(0.1, 0.2, 3), "momentum"),
            {},
            "Got 'momentum' for Adam, which has .*beta1, beta2",
        ),
        (
            AnnealOptimizer(Anneal(0.1, 0.2, 3), player="critic"),
            {},
            r"Got 'critic' and players \['discriminator', ",
        ),
        (
            AnnealOptimizer(Anneal(0.1, 0.2, 3), "lr"),
            {"scheduler": lambda o: torch.optim.lr_scheduler.ConstantLR(o)},
            "which sets lr too. Got 2 scheduler",
        ),
    ],
)
def test_refusals(callback: Callback, options: Any, match: str) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        run(callback, **options)


def test_a_beta_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"anneal must lie in \[0, 1\). Got \(0.9, 1.0\)"):
        AnnealOptimizer(Anneal(0.9, 1.0, 3))
