from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_nested.datamodules import DigitsDataModule
from lightning_nested.modules import ImageClassifier
from tests.conftest import Normal
from tests.trainers import trainer


@pytest.fixture
def batch(normal: Normal) -> tuple[Tensor, Tensor, Tensor]:
    return normal(6, 1, 8, 8), torch.tensor([3, 1, 4, 1, 5, 9]), torch.tensor([7, 0, 2, 9, 4, 5])


def test_the_unweighted_losses_are_the_mean_cross_entropy(batch: tuple[Tensor, ...]) -> None:
    module = ImageClassifier().double()
    images, labels, _ = batch
    probabilities = module(images).exp() / module(images).exp().sum(1, keepdim=True)
    expected = -probabilities[range(6), labels.tolist()].log().mean()
    for loss in (module.training_loss(batch), module.training_loss(batch[:2]), module.outer_loss(batch)):
        torch.testing.assert_close(loss, expected)


def test_example_weights_multiply_each_loss_by_its_index(batch: tuple[Tensor, ...], normal: Normal) -> None:
    module = ImageClassifier().double()
    weights = normal(10).abs().requires_grad_()
    module.example_weights = lambda index: weights[index]
    images, labels, index = batch
    losses = cross_entropy(module(images), labels, reduction="none").detach()
    loss = module.training_loss(batch)
    # The mean over the batch of 6, not over the sum of the weights.
    torch.testing.assert_close(loss, (weights[index] * losses).sum() / 6)
    (gradient,) = torch.autograd.grad(loss, weights)
    torch.testing.assert_close(gradient, torch.zeros(10).double().index_put((index,), losses / 6))
    torch.testing.assert_close(module.outer_loss(batch), losses.mean())


def test_a_weight_network_gets_the_losses_of_the_batch(batch: tuple[Tensor, ...]) -> None:
    module = ImageClassifier().double()
    module.weight_network = torch.square
    losses = cross_entropy(module(batch[0]), batch[1], reduction="none")
    torch.testing.assert_close(module.training_loss(batch[:2]), losses.square().mean())
    torch.testing.assert_close(module.outer_loss(batch), losses.mean())


def test_bound_weights_stay_out_of_the_module(batch: tuple[Tensor, ...]) -> None:
    class Weights:
        def __init__(self) -> None:
            self.raw = torch.ones(10, requires_grad=True)

        def __call__(self, index: Tensor) -> Tensor:
            return self.raw[index]

    module = ImageClassifier()
    names = set(module.state_dict())
    module.example_weights = Weights()
    assert set(module.state_dict()) == names
    assert len(list(module.parameters())) == 4
    assert ImageClassifier.example_weights is None


def test_weights_without_an_index_name_the_cure(batch: tuple[Tensor, ...]) -> None:
    module = ImageClassifier().double()
    module.example_weights = lambda index: torch.ones(len(index))
    with pytest.raises(ValueError, match=r"Got 2 tensors\. .*with_index=True"):
        module.training_loss(batch[:2])


class WithPenalty(ImageClassifier):
    def training_losses(self, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        penalty = torch.stack([p.square().sum() for p in self.parameters()]).sum()
        return {**super().training_losses(batch), "penalty": penalty}


def test_further_losses_are_added_or_weighted(batch: tuple[Tensor, ...]) -> None:
    module = WithPenalty().double()
    losses = module.training_losses(batch)
    torch.testing.assert_close(module.training_loss(batch), losses["cross_entropy"] + losses["penalty"])
    module.loss_weights = lambda parts: parts["cross_entropy"] + 0.25 * parts["penalty"]
    torch.testing.assert_close(
        module.training_loss(batch), losses["cross_entropy"] + 0.25 * losses["penalty"]
    )


def test_a_fit_learns_and_logs_means_over_all_examples(tmp_path: Path) -> None:
    module, data = ImageClassifier(), DigitsDataModule(val_batch_size=128)  # 128, 128, 44: unequal
    run = trainer(folder=tmp_path, max_epochs=5)
    run.fit(module, data)
    logged = dict(run.callback_metrics)
    run.test(module, data, verbose=False)
    for stage, metrics in (("val", logged), ("test", run.callback_metrics)):
        images, labels = getattr(data, f"{stage}_images"), getattr(data, f"{stage}_labels")
        with torch.no_grad():
            logits = module.eval()(images)
        accuracy = (logits.argmax(1) == labels).float().mean()
        torch.testing.assert_close(metrics[f"{stage}_accuracy"], accuracy)
        torch.testing.assert_close(metrics[f"{stage}_loss"], cross_entropy(logits, labels))
        assert accuracy > 0.8
    predictions = run.predict(module, data)
    assert predictions is not None
    probabilities = torch.cat(predictions)  # type: ignore[arg-type]
    torch.testing.assert_close(probabilities, logits.softmax(1))


@pytest.mark.parametrize(("every", "calls"), [(3, 4), (7, 2), (0, 0)])
def test_the_training_loss_is_logged_only_where_the_logger_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, calls: int
) -> None:
    seen: list[int] = []
    module, data = ImageClassifier(), DigitsDataModule()
    log = LightningModule.log

    def count(self: LightningModule, name: str, *args: Any, **kwargs: Any) -> None:
        if name == "train_loss":
            seen.append(self.global_step)
        log(self, name, *args, **kwargs)

    monkeypatch.setattr(ImageClassifier, "log", count)
    trainer(folder=tmp_path, max_epochs=2, log_every_n_steps=every, limit_val_batches=0).fit(module, data)
    assert len(seen) == calls
    assert all((step + 1) % every == 0 for step in seen)


# 300 images split evenly: no example is seen twice, which is what Lightning warns of.
@pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders")
def test_two_processes_log_what_one_does(tmp_path: Path) -> None:
    module, data = ImageClassifier(), DigitsDataModule(val_batch_size=128)
    alone, both = trainer(folder=tmp_path), trainer(folder=tmp_path, strategy="ddp_fork", devices=2)
    expected = alone.validate(module, data, verbose=False)
    got = both.validate(module, data, verbose=False)  # 150 images each, in batches of 128 and 22
    assert expected[0] == pytest.approx(got[0], rel=1e-6)


def test_optimizer_and_scheduler_are_the_ones_given(tmp_path: Path) -> None:
    module = ImageClassifier(
        optimizer=lambda params: torch.optim.Adam(params, lr=0.01),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
    )
    run = trainer(folder=tmp_path, max_epochs=2)
    run.fit(module, DigitsDataModule())
    assert isinstance(run.optimizers[0], torch.optim.Adam)
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0025)


def test_a_plateau_scheduler_watches_its_metric(tmp_path: Path) -> None:
    module = ImageClassifier(
        scheduler=lambda optimizer: ReduceLROnPlateau(
            optimizer, monitor="val_loss", factor=0.5, threshold=1e9, threshold_mode="abs", patience=0
        )
    )
    run = trainer(folder=tmp_path, max_epochs=3)
    run.fit(module, DigitsDataModule())
    # Nothing counts as an improvement but the first epoch, so the rate of 0.1 is halved twice.
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.025)


def test_a_checkpoint_rebuilds_the_network_from_its_name(tmp_path: Path) -> None:
    module = ImageClassifier("cnn", network_options={"width": 3}, optimizer=torch.optim.Adam)
    run = trainer(folder=tmp_path, max_epochs=1, limit_train_batches=1)
    run.fit(module, DigitsDataModule())
    run.save_checkpoint(tmp_path / "last.ckpt")
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    for name, value in module.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])


def test_a_network_given_as_a_module_is_used_and_wants_no_options() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    assert ImageClassifier(network, num_classes=2)(torch.zeros(3, 1, 2, 2)).shape == (3, 2)
    with pytest.raises(ValueError, match=r"`network_options` must be empty .* with a Sequential"):
        ImageClassifier(network, network_options={"width": 3})


def test_a_misspelt_network_gets_close_matches() -> None:
    with pytest.raises(ValueError, match="Close matches: resnet"):
        ImageClassifier("rsnet18")
