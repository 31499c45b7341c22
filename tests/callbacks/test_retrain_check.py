"""RetrainCheck: trainings with values held fixed and without, their scores, and what it says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from lightning_nested.callbacks import HypergradientCallback, RetrainCheck, retrain_check
from lightning_nested.datamodules import TabularDataModule
from lightning_nested.hyperparameters import Scalar, WeightDecay
from tests.trainers import trainer

STEPS = 40


class Regressor(LightningModule):
    """A linear network, with as many noise columns as there are rows: a decay helps it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(90, 1)
        self.scale: Scalar | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        scale = 1.0 if self.scale is None else self.scale.value()
        return functional.mse_loss(scale * self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("val_loss", loss)
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", functional.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.03, momentum=0.9)


def data() -> TabularDataModule:
    return TabularDataModule("diabetes", noise_columns=80, train_size=80, val_size=100, batch_size=40)


def run(
    tmp_path: Path, check: RetrainCheck, *hyperparameters: Any, loaders: bool = False, **options: Any
) -> Any:
    torch.manual_seed(0)
    tuner = HypergradientCallback(list(hyperparameters) or [WeightDecay()], every_n_steps=2, warmup_steps=6)
    fit = trainer(tuner, check, max_epochs=-1, max_steps=STEPS, folder=tmp_path, **options)
    module, source = Regressor(), data()
    if loaders:
        source.setup()
        fit.fit(module, source.train_dataloader(), source.val_dataloader())
    else:
        fit.fit(module, datamodule=source)
    return module, tuner


@pytest.mark.parametrize("loaders", [False, True])
def test_a_decay_that_helps_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str], loaders: bool) -> None:
    check = RetrainCheck(lengths=(0.5, 1.0), seeds=(1, 2))
    module, tuner = run(tmp_path, check, loaders=loaders)
    found = json.loads((tmp_path / "retrain_check.json").read_text())
    assert found == check.results
    assert [(row["seed"], row["steps"]) for row in found["rows"]] == [(1, 20), (2, 20), (1, 40), (2, 40)]
    assert all(row["gain"] == row["plain"] - row["tuned"] for row in found["rows"])
    assert found["verdict"] == "holds"
    assert "the gain holds with every seed" in capsys.readouterr().out
    # The run itself is left as it was.
    assert found["tuned_run"] == pytest.approx(float(module.trainer.callback_metrics["val_loss"]), rel=1e-5)
    assert tuner.outer_steps == (STEPS - 6) // 2


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Regressor, list[Any]]]:
    """Start weights, trained module and values of the callbacks of each training."""
    seen: list[tuple[Tensor, Regressor, list[Any]]] = []
    original = retrain_check.fit_like

    def fit_like(fit: Any, module: Any, *callbacks: Any, **options: Any) -> None:
        before = module.net.weight.detach().clone()
        original(fit, module, *callbacks, **options)
        seen.append((before, module, [c.values() for c in callbacks]))

    monkeypatch.setattr(retrain_check, "fit_like", fit_like)
    return seen


def test_values_are_those_of_the_run_and_do_not_move(tmp_path: Path, trainings: Any) -> None:
    check = RetrainCheck("test_loss", data="test", seeds=(5,))
    _, tuner = run(tmp_path, check, WeightDecay(), Scalar("scale", 1.0))
    (held_start, held, (values,)), (plain_start, _, none) = trainings
    assert none == []
    assert held.scale is None
    assert torch.equal(held_start, plain_start)
    assert values.keys() == tuner.values().keys()
    assert all(torch.equal(values[key], value) for key, value in tuner.values().items())
    assert float(values["scale"]) != 1.0


def test_tuned_tensors_of_the_module_are_carried_over(tmp_path: Path, trainings: Any) -> None:
    module, _ = run(tmp_path, RetrainCheck(seeds=(1,)), "net.bias")
    (_, held, _), (_, plain, _) = trainings
    assert torch.equal(held.net.bias, module.net.bias)
    assert not torch.equal(plain.net.bias, module.net.bias)
    assert not torch.equal(held.net.weight, module.net.weight)


def test_values_that_suit_one_run_alone_are_said_to_be_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check = RetrainCheck("val_loss", mode="max", seeds=(1,))
    run(tmp_path, check)
    assert check.results["verdict"] == "lost"
    assert "there is no gain" in capsys.readouterr().out


def test_what_it_needs_is_named(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="needs one HypergradientCallback"):
        trainer(RetrainCheck(), max_steps=1).fit(Regressor(), datamodule=data())
    with pytest.raises(MisconfigurationException, match=r"needs the metric 'other'. Got \['val_loss'\]"):
        run(tmp_path, RetrainCheck("other", seeds=(1,)))
    with pytest.raises(MisconfigurationException, match="needs a datamodule"):
        run(tmp_path, RetrainCheck(data="test"), loaders=True)
    with pytest.raises(ValueError, match="must not be empty"):
        RetrainCheck(seeds=())


def test_a_run_without_outer_steps_is_not_repeated(tmp_path: Path) -> None:
    check, one = RetrainCheck(), [(torch.ones(90), torch.ones(1))] * 3
    fit = trainer(
        HypergradientCallback(WeightDecay(), warmup_steps=10_000), check, max_steps=3, folder=tmp_path
    )
    with (
        pytest.warns(UserWarning, match="made no outer step"),
        pytest.warns(UserWarning, match="trains nothing again"),
    ):
        fit.fit(Regressor(), DataLoader(one), DataLoader(one))  # type: ignore[arg-type]
    assert check.results == {}
