"""The heat equation: its exact solution, the parts of its loss, its sensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_nested import HeatEquation, HypergradientCallback, LossWeights, StepsDataModule
from lightning_nested.hyperparameters import Exp
from tests.trainers import trainer


class Exact(HeatEquation):
    """The solution in place of the network."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.solution(x, t)


def test_the_exact_solution_has_no_loss() -> None:
    module = Exact(diffusion=0.3, duration=0.5, noise=0.0, train_on_sensors=True).double()
    parts = module.parts()
    assert set(parts) == {"equation", "initial", "boundary", "sensors"}
    # Rounding of numbers of about 100, and the float32 of the sensors.
    assert max(float(part.detach()) for part in parts.values()) < 1e-12
    assert float(module.error()) == 0.0


def test_parts_are_of_the_equation_and_its_conditions() -> None:
    class Linear(HeatEquation):
        """u = 2x + 3t: u_t = 3, u_xx = 0."""

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return 2 * x + 3 * t

    module = Linear(noise=0.0).double()
    # u_xx of a linear function has no graph.
    with pytest.raises(RuntimeError, match=r"does not require grad|not have been used"):
        module.parts()
    module.forward = lambda x, t: 2 * x + 3 * t + x**3  # type: ignore[method-assign]
    torch.manual_seed(0)
    parts = module.parts()
    torch.manual_seed(0)
    x = torch.rand(2, 100, dtype=torch.float64)[0]
    torch.testing.assert_close(parts["equation"], (3 - 6 * x).square().mean())
    times = 0.1 * torch.linspace(0, 1, 50, dtype=torch.float64)
    ends = torch.where(torch.arange(50) % 2 == 1, 3 + 3 * times, 3 * times)
    torch.testing.assert_close(parts["boundary"], ends.square().mean())


def test_sensors_are_those_of_the_seed_and_noise_is_of_its_size() -> None:
    module, again, other = (HeatEquation(sensors=5_000, noise=0.1, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(module.measured, again.measured)
    assert not torch.equal(module.measured, other.measured)
    noise = module.measured - module.solution(module.where, module.when)
    assert float(noise.std()) == pytest.approx(0.1, rel=0.05)  # five standard deviations of the estimate
    assert float(module.when.max()) <= 0.1


def test_the_callback_moves_the_weights_by_the_sensors() -> None:
    torch.manual_seed(0)
    module = HeatEquation(width=6, points=20)
    weights = LossWeights(["equation", "initial", "boundary"], transform=Exp())
    tuner = HypergradientCallback(weights, every_n_steps=4, optimizer=lambda p: torch.optim.Adam(p, lr=0.2))
    fit = trainer(tuner, max_epochs=2)
    fit.fit(module, datamodule=StepsDataModule(steps=20))
    assert tuner.outer_steps == 9
    values = weights.values()
    assert values["initial"] > 1.2 * values["equation"]
    assert {"val_loss", "error"} <= set(fit.callback_metrics)


class Draw(Callback):
    """Saves a loss at new points, of weights that all processes share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, HeatEquation)
        torch.manual_seed(0)
        loss = pl_module.parts()["equation"].detach()
        torch.save((loss, pl_module.network[0].weight), self.folder / f"{trainer.global_rank}.pt")


def test_each_process_has_points_of_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    fit = trainer(Draw(tmp_path), devices=2, strategy="ddp_fork")
    fit.fit(HeatEquation(width=4, points=10), datamodule=StepsDataModule(steps=1))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(first[1], second[1])
    assert first[0] != second[0]


def test_a_checkpoint_is_loaded_by_its_path_and_tested(tmp_path: Path) -> None:
    fit = trainer(folder=tmp_path)
    fit.fit(HeatEquation(width=4, points=10, duration=0.2), datamodule=StepsDataModule(steps=1))
    fit.save_checkpoint(tmp_path / "a.ckpt")
    loaded = HeatEquation.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    (found,) = trainer().test(loaded, StepsDataModule())
    assert loaded.duration == 0.2
    assert found["test_loss"] == pytest.approx(float(fit.callback_metrics["val_loss"]))
    assert found["test_error"] == pytest.approx(float(fit.callback_metrics["error"]))


def test_equal_weights_are_a_sum() -> None:
    module = HeatEquation(width=4)
    parts = {"equation": torch.tensor(1.0), "initial": torch.tensor(2.0)}
    assert module.combine(parts) == 3.0
    module.loss_weights = lambda given: given["initial"]
    assert module.combine(parts) == 2.0


@pytest.mark.parametrize(
    ("options", "match"),
    [({"width": 0}, "width"), ({"noise": -0.1}, "noise"), ({"duration": 0.0}, "duration")],
)
def test_refusals(options: dict[str, float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        HeatEquation(**options)  # type: ignore[arg-type]
