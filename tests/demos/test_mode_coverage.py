"""ModeCoverage: counts of a known generator, no trace in training, its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_nested.datamodules import MixtureOfGaussiansDataModule
from lightning_nested.demos import ModeCoverage
from lightning_nested.modules import GANModule
from lightning_nested.optim import ComplexAdam
from tests import trainers


def trainer(folder: Path, *callbacks: Callback, steps: int = 4) -> Trainer:
    return trainers.trainer(*callbacks, folder=folder, max_epochs=-1, max_steps=steps)


def gan(**options: Any) -> GANModule:
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))
    discriminator = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    return GANModule(
        generator, discriminator, latent_dim=2, optimizer=lambda p: ComplexAdam(p, lr=0.01), **options
    )


class Known(GANModule):
    """Samples of three of the eight modes, of which a fifth is 4σ off."""

    def sample(self, count: int) -> Tensor:
        centres = MixtureOfGaussiansDataModule().centres
        samples = centres[torch.arange(count) % 3].clone()
        samples[: count // 5, 0] += 4 * 0.02
        return samples


def test_what_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = Known(gan().generator, gan().discriminator, latent_dim=2, optimizer=torch.optim.Adam)
    callback = ModeCoverage(2, num_samples=100, name="known")
    trainer(tmp_path, callback).fit(module, datamodule=MixtureOfGaussiansDataModule(num_batches=5))
    assert callback.history == [(updates, 3, pytest.approx(0.8)) for updates in (0, 2, 4)]
    assert "3 of 8 modes covered (by at least 20 of 100 samples), 80.0 %" in capsys.readouterr().out
    written = json.loads((tmp_path / "results.json").read_text())
    assert (written["modes"], written["modes_covered"], written["high_quality"]) == (8, 3, pytest.approx(0.8))
    assert (tmp_path / "known.png").stat().st_size > 10_000
    strict = ModeCoverage(2, num_samples=100, at_least=30)
    trainer(tmp_path, strict).fit(module, datamodule=MixtureOfGaussiansDataModule(num_batches=5))
    assert strict.history[-1][1] == 0  # 26 or 27 good ones each


def test_training_does_not_notice(tmp_path: Path) -> None:
    def run(*callbacks: Callback) -> tuple[dict[str, Tensor], Tensor]:
        module = gan()
        torch.manual_seed(1)
        trainer(tmp_path, *callbacks).fit(module, datamodule=MixtureOfGaussiansDataModule(num_batches=5))
        return module.state_dict(), torch.rand(3)

    (state, draw), (other, drawn) = run(), run(ModeCoverage(1, num_samples=50))
    assert all(torch.equal(value, other[name]) for name, value in state.items())
    assert torch.equal(draw, drawn)


def test_it_goes_on_in_a_resumed_run(tmp_path: Path) -> None:
    def run(steps: int, path: Path | None = None) -> tuple[ModeCoverage, Trainer]:
        callback = ModeCoverage(1, num_samples=50)
        fit = trainer(tmp_path, callback, steps=steps)
        data = MixtureOfGaussiansDataModule(num_batches=5)
        fit.fit(gan(), datamodule=data, ckpt_path=path, weights_only=True)
        return callback, fit

    torch.manual_seed(1)
    whole, _ = run(6)
    torch.manual_seed(1)
    _, fit = run(3)
    fit.save_checkpoint(tmp_path / "some.ckpt")
    resumed, _ = run(6, tmp_path / "some.ckpt")
    assert resumed.history == whole.history


def test_a_fit_without_a_step_has_no_report(tmp_path: Path) -> None:
    callback = ModeCoverage()
    fit = trainers.trainer(callback, folder=tmp_path, max_epochs=0)
    fit.fit(gan(), datamodule=MixtureOfGaussiansDataModule(num_batches=5))
    assert (callback.history, list(tmp_path.iterdir())) == ([], [])


def test_two_of_them_keep_their_own_state() -> None:
    kinds = [{}, {"num_samples": 50}, {"at_least": 5}, {"seed": 1}, {"name": "b"}, {"every_n_updates": 7}]
    keys = {ModeCoverage(**options).state_key for options in kinds}  # type: ignore[arg-type]
    assert len(keys) == len(kinds)


class Recorder(Logger):
    name, version = "recorder", 0

    def __init__(self) -> None:
        super().__init__()
        self.metrics: set[str] = set()

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics |= set(metrics)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


def test_two_of_them_in_one_trainer_keep_apart(tmp_path: Path) -> None:
    few, many = ModeCoverage(4, num_samples=50, name="few"), ModeCoverage(4, num_samples=80, name="many")
    fit, recorder = trainer(tmp_path, few, many), Recorder()
    fit.loggers = [recorder]
    fit.fit(gan(), datamodule=MixtureOfGaussiansDataModule(num_batches=5))
    found = {path.name for path in tmp_path.iterdir()}
    assert {"few.json", "few.png", "many.json", "many.png"} <= found
    assert "results.json" not in found
    assert [json.loads((tmp_path / f"{n}.json").read_text())["samples"] for n in ("few", "many")] == [50, 80]
    counts = {f"{n}/{m}" for n in ("few", "many") for m in ("modes_covered", "high_quality")}
    assert counts <= recorder.metrics
    with pytest.raises(
        MisconfigurationException, match=r"names of their own.*Got \['few', 'few'\]; give name="
    ):
        trainer(tmp_path, few, ModeCoverage(5, name="few")).fit(
            gan(), datamodule=MixtureOfGaussiansDataModule()
        )


@pytest.mark.parametrize("options", [{"every_n_updates": 0}, {"num_samples": 0}, {"at_least": 0}])
def test_wrong_arguments(options: Any) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        ModeCoverage(**options)


def test_data_without_modes(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"Got GANModule on NoneType"):
        trainer(tmp_path, ModeCoverage()).fit(gan(), [torch.zeros(2, 2)])
