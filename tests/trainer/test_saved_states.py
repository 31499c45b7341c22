"""What checkpoints of real runs hold: tuned values to take home, and layers that were unfrozen."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn
from torch.utils.data import DataLoader

from lightning_nested.callbacks import HypergradientCallback, LyapunovCallback
from lightning_nested.hypergradient import Identity, Neumann
from lightning_nested.hyperparameters import ExampleWeights, Softplus, tuned_values
from lightning_nested.modules import NestedModule
from tests.callbacks.exact import decay_all, exact
from tests.callbacks.tuned_regression import Regression, data, smooth, values, weights
from tests.modules.nested.problems import SIZE, Classifier, loader, tensors
from tests.trainers import trainer

LOADERS = DataLoader(data(32, 1), 8), DataLoader(data(12, 2), 4)


def fitted(
    folder: Path, *hyperparameters: Any, **options: Any
) -> tuple[HypergradientCallback, Regression, Path]:
    """Return the callback, module and checkpoint of a run of one epoch."""
    tuned = exact(list(hyperparameters), **{"solver": Identity(), **options})
    fit, module = trainer(tuned), Regression(smooth())
    fit.fit(module, *LOADERS)
    fit.save_checkpoint(folder / "a.ckpt")
    return tuned, module, folder / "a.ckpt"


# ---- taken home


def test_values_are_there_without_a_fit(tmp_path: Path) -> None:
    tuned, module, path = fitted(tmp_path, decay_all(init=1e-2))
    expected = tuned.values()
    assert list(expected) == [f"weight_decay/{name}" for name, _ in module.named_parameters()]
    assert tuned_values(path) == expected
    state = torch.load(path, weights_only=True)["callbacks"][tuned.state_key]
    loaded = exact([decay_all(init=1e-2)])
    loaded.load_state_dict(state)
    assert loaded.values() == expected
    validated = exact([decay_all(init=1e-2)])
    run = trainer(validated, enable_model_summary=False)
    run.validate(Regression(smooth()), LOADERS[1], ckpt_path=path, weights_only=True, verbose=False)
    assert validated.values() == expected
    del state["outer"]["values"]
    loaded.load_state_dict(state)
    with pytest.raises(ValueError, match="earlier version"):
        loaded.values()


def test_values_of_a_nested_module_are_there_once_it_is_loaded(tmp_path: Path) -> None:
    fit, module = trainer(), Classifier([ExampleWeights(SIZE)])
    fit.fit(module, loader(1), loader(2))
    fit.save_checkpoint(tmp_path / "a.ckpt")
    loaded = Classifier.load_from_checkpoint(
        tmp_path / "a.ckpt", hyperparameters=[ExampleWeights(SIZE)], weights_only=True
    )
    assert torch.equal(loaded.values()["example_weights"], module.values()["example_weights"])
    assert loaded.export() == module.export()


def test_export_writes_plain_numbers(tmp_path: Path) -> None:
    tuned, _, _ = fitted(tmp_path, decay_all("parameter"))
    numbers = tuned.export()
    assert numbers["weight_decay/net.2.bias"] == tuned.values()["weight_decay/net.2.bias"].tolist()
    for name, read in (("a.json", json.loads), ("b/c.yaml", yaml.safe_load), ("d.yml", yaml.safe_load)):
        assert tuned.export(tmp_path / name) == numbers
        assert read((tmp_path / name).read_text(encoding="utf-8")) == numbers
    before = (tmp_path / "a.json").stat().st_size
    assert {path.name for path in tmp_path.iterdir()} == {"a.ckpt", "a.json", "b", "d.yml"}
    assert before > 100
    with pytest.raises(ValueError, match=r"must end with .json, .yaml or .yml"):
        tuned.export(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="load a checkpoint first"):
        exact([decay_all()]).export()


def test_a_fit_ends_with_what_it_tuned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        tuned, _, path = fitted(tmp_path, decay_all("model", init=1e-2))
    value = float(tuned.values()["weight_decay"])
    assert f"HypergradientCallback tuned in 4 outer steps:\n  weight_decay: 0.01 → {value:.4g}" in caplog.text
    caplog.clear()
    resumed = exact([decay_all("model", init=1e-2)], solver=Identity())
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        trainer(resumed, max_epochs=2).fit(Regression(smooth()), *LOADERS, ckpt_path=path, weights_only=True)
    value = float(resumed.values()["weight_decay"])
    assert f"tuned in 8 outer steps:\n  weight_decay: 0.01 → {value:.4g}" in caplog.text


# ---- resumed with other settings


def test_another_transform_or_optimizer_is_reported_and_keeps_the_values(tmp_path: Path) -> None:
    tuned, _, path = fitted(tmp_path, decay_all(init=1e-2))
    other = exact(
        [decay_all(init=1e-2, transform=Softplus())], optimizer=lambda t: torch.optim.SGD(t, lr=0.0)
    )
    with (
        pytest.warns(UserWarning, match="another range or transform"),
        pytest.warns(UserWarning, match="is SGD, and was Adam"),
    ):
        trainer(other, max_epochs=2).fit(Regression(smooth()), *LOADERS, ckpt_path=path, weights_only=True)
    torch.testing.assert_close(values(other), values(tuned), rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
def test_other_hyperparameters_are_refused_instead_of_starting_again(tmp_path: Path) -> None:
    _, _, path = fitted(tmp_path, decay_all())
    other = exact([decay_all(), "net.0"])
    with pytest.raises(ValueError, match=r"must be \['weight_decay', 'net.0'\]. Got \['weight_decay'\]"):
        trainer(other, max_epochs=2).fit(Regression(smooth()), *LOADERS, ckpt_path=path, weights_only=True)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    tuned, _, path = fitted(tmp_path, decay_all())
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["callbacks"][tuned.state_key]["inner_steps"]
    torch.save(checkpoint, path)
    again = exact([decay_all()])
    with pytest.raises(ValueError, match="state of HypergradientCallback must have 'inner_steps'"):
        trainer(again, max_epochs=2).fit(Regression(smooth()), *LOADERS, ckpt_path=path, weights_only=True)


def test_a_checkpoint_without_tuned_values_is_reported(tmp_path: Path) -> None:
    fit = trainer()
    fit.fit(Classifier(), loader(1), loader(2))
    fit.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    del checkpoint["nested"]
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match="must hold tuned values of NestedModule"):
        Classifier.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)


# ---- layers that were unfrozen


class Unfreeze(BaseFinetuning):
    """Unfreezes the first layer after an epoch, and once more where a resumed run has it frozen."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.05)
        elif epoch > 1:
            self.make_trainable(pl_module.net[0])


class Partly(Regression):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        held = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(held, lr=self.rate, momentum=0.9)


def halves(make: Any, first: bool, path: Path) -> tuple[Any, nn.Module, Any, nn.Module]:
    """Run four epochs, and two and two; return callback and module of both."""

    def run(epochs: int, resume: Path | None = None) -> tuple[Trainer, Any, Partly]:
        callback: Callback = make()
        module, order = Partly(smooth()), [callback, Unfreeze()]
        fit = trainer(*(order if first else order[::-1]), max_epochs=epochs)
        fit.fit(module, *LOADERS, ckpt_path=resume, weights_only=True)
        return fit, callback, module

    run(2)[0].save_checkpoint(path)
    return (*run(4)[1:], *run(4, path)[1:])


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("per", ["model", "tensor", "parameter"])
def test_a_run_that_unfroze_a_layer_resumes_bit_for_bit(per: Any, first: bool, tmp_path: Path) -> None:
    whole, module, resumed, again = halves(
        lambda: exact(
            decay_all(per, init=1e-2), solver=Neumann(num_terms=3, warm_start=True), restart_every=100
        ),
        first,
        tmp_path / "a.ckpt",
    )
    assert torch.equal(weights(module), weights(again))
    assert torch.equal(values(whole), values(resumed))
    assert all(torch.equal(a, resumed.outer_loop.initial[key]) for key, a in whole.outer_loop.initial.items())


class Forgetful(Unfreeze):
    """Leaves the layer frozen for an epoch of the resumed run, as Lightning's own callbacks do for ever."""

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch != 2:
            super().finetune_function(pl_module, epoch, optimizer)


class Watch(Callback):
    def __init__(self, tuned: HypergradientCallback) -> None:
        self.tuned, self.seen = tuned, []

    def on_train_batch_start(self, *_: Any) -> None:
        self.seen.append(self.tuned.values())


@pytest.mark.parametrize("per", ["tensor", "parameter"])
def test_decays_of_a_layer_that_stays_frozen_come_back_with_it(per: Any, tmp_path: Path) -> None:
    def run(epochs: int, resume: Path | None = None) -> tuple[Trainer, Watch]:
        watch = Watch(exact(decay_all(per, init=1e-2), solver=Identity()))
        fit = trainer(Forgetful(), watch.tuned, watch, max_epochs=epochs)
        fit.fit(Partly(smooth()), *LOADERS, ckpt_path=resume, weights_only=True)
        return fit, watch

    fit, first = run(2)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    saved, (_, watch) = first.tuned.values(), run(4, tmp_path / "a.ckpt")
    assert [len(seen) for seen in watch.seen] == [2] * 4 + [4] * 4
    name = "weight_decay/net.0.weight"
    assert torch.equal(watch.seen[4][name], saved[name])
    assert not torch.equal(watch.seen[4]["weight_decay/net.2.weight"], saved["weight_decay/net.2.weight"])


def test_tangents_resume_in_a_run_that_unfroze_a_layer(tmp_path: Path) -> None:
    whole, _, resumed, _ = halves(lambda: LyapunovCallback(2, align=4), True, tmp_path / "a.ckpt")
    assert torch.equal(whole.local_exponents, resumed.local_exponents)
    assert resumed.tracker.n == sum(p.numel() for p in smooth().parameters())


def test_a_nested_module_that_unfroze_a_layer_resumes_bit_for_bit(tmp_path: Path) -> None:
    def run(epochs: int, resume: Path | None = None) -> tuple[Trainer, NestedModule]:
        module = Classifier([decay_all(), ExampleWeights(SIZE)])
        fit = trainer(Unfreeze(), max_epochs=epochs)
        fit.fit(module, loader(1), loader(2, batch=5), ckpt_path=resume, weights_only=True)
        return fit, module

    run(2)[0].save_checkpoint(tmp_path / "a.ckpt")
    whole, resumed = run(4)[1], run(4, tmp_path / "a.ckpt")[1]
    assert whole.values().keys() == resumed.values().keys()
    assert all(torch.equal(a, b) for a, b in zip(tensors(whole), tensors(resumed), strict=True))
