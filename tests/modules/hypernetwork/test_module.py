"""HypernetworkModule in real fits: every loop, export, copies, logs, precision, failures."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested.hypernetworks import FactorisedResponse, LearnedScale
from lightning_nested.hyperparameters import ExampleWeights, InputNoise, LabelSmoothing
from lightning_nested.modules import (
    STN,
    DeltaSTN,
    Global,
    Local,
    ResponseLoop,
    ResponseOptions,
    Simplified,
    TunedImageClassifier,
)
from tests.modules.hypernetwork.problems import (
    Classifier,
    Small,
    as_loader,
    batches,
    data,
    examples,
    loader,
    network,
    same,
    small_network,
    tensors,
)
from tests.trainers import trainer


@pytest.mark.parametrize(
    ("loop", "inner", "outer"),
    [
        (DeltaSTN(train_steps=2, warmup_steps=2), 12, 5),
        (STN(train_steps=3, valid_steps=2), 12, 8),
        (Local(), 12, 12),
        (Simplified(train_steps=5), 12, 2),
        (Global(response_steps=7, valid_steps=2), 7, 12),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, ResponseLoop) else "",
)
def test_every_loop_runs_and_counts(loop: ResponseLoop, inner: int, outer: int) -> None:
    module = Classifier(loop=loop)
    before = {k: v.clone() for k, v in module.values().items()}
    fit = trainer(limit_val_batches=0, max_epochs=4)
    fit.fit(module, loader(1), loader(2, batch=5))
    # 12 batches; in Global's first phase the batch that ends it is followed by outer steps at once.
    assert (module.inner_steps, module.outer_steps) == (inner, outer)
    assert fit.global_step == inner
    assert module.seen[0] == (torch.Size([8, 1]), True) or isinstance(loop, DeltaSTN)
    assert any((before[k] != v).any() for k, v in module.values().items())
    if not isinstance(loop, DeltaSTN):
        assert module.network.module[1].num_batches_tracked == inner
    else:  # the linearised pass leaves no trace in the statistics
        assert module.network.module[1].num_batches_tracked == inner
        torch.testing.assert_close(module.network.center, module.vector.flat().detach(), rtol=0, atol=0)


def test_export_is_the_plain_network_at_the_present_values() -> None:
    module = Classifier()
    trainer(limit_val_batches=0, max_epochs=4).fit(module, loader(1), loader(2))
    plain, x = module.export().eval(), data(5).tensors[0]
    assert [type(m) for m in plain.modules()] == [type(m) for m in network().modules()]
    torch.testing.assert_close(plain(x), module.eval()(x), rtol=1e-6, atol=1e-6)
    assert plain[4].p == pytest.approx(float(module.values()["dropout"]))
    assert plain[4].p != 0.2
    other = module.export({"label_smoothing": 0.3, "dropout": [0.5]}).eval()
    assert other[4].p == pytest.approx(0.5)
    assert not torch.allclose(other(x), plain(x))
    with pytest.raises(
        ValueError, match=r"'label_smoothing' must lie in its interval.*inside \(0.0, 0.5\). Got 0.7"
    ):
        module.export({"label_smoothing": 0.7})
    with pytest.raises(ValueError, match=r"values must be of dropout, .*Got smoothing"):
        module.export({"smoothing": 0.1})


def test_a_module_stands_at_its_values_before_fit_and_after_loading(tmp_path: Path) -> None:
    x = examples()[0][0]
    module = Small()
    module.eval()
    torch.testing.assert_close(module(x), small_network().eval()(x))
    trainer(limit_val_batches=1.0).validate(module.train(), batches(), verbose=False)
    fit = trainer(limit_val_batches=0, folder=tmp_path, max_epochs=3)
    fit.fit(module, batches(), batches())
    fit.save_checkpoint(tmp_path / "a.ckpt")
    expected = module.eval()(x)
    loaded = Small.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True).eval()
    assert torch.equal(loaded(x), expected)
    torch.testing.assert_close(loaded.export().eval()(x), expected, rtol=1e-6, atol=1e-6)
    other = Small()
    trainer(limit_val_batches=1.0).validate(
        other, batches(), ckpt_path=tmp_path / "a.ckpt", weights_only=True, verbose=False
    )
    assert torch.equal(other.eval()(x), expected)
    torch.testing.assert_close(other.values(), module.values(), rtol=0, atol=0)


def test_copies_are_independent_and_go_on() -> None:
    module = TunedImageClassifier(
        "cnn", [InputNoise(), LabelSmoothing()], input_shape=(1, 8, 8), network_options={"width": 2}
    )
    x = torch.rand(16, 1, 8, 8)
    data = DataLoader(TensorDataset(x, torch.arange(16) % 10), batch_size=8)
    trainer(limit_val_batches=0, max_epochs=3).fit(module, data, data)
    before = [t.clone() for t in tensors(module)]
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin.eval()(x), module.eval()(x))
        trainer(limit_val_batches=0, max_epochs=3).fit(twin.train(), data, data)
        torch.testing.assert_close(tensors(module), before, rtol=0, atol=0)
        assert any(bool((a != b).any()) for a, b in zip(before[-3:], tensors(twin)[-3:], strict=True))
        assert twin.input_noise is twin.vector.hyperparameters[0]


def test_values_scales_and_schedules_are_logged(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    module = Classifier(
        loop=DeltaSTN(train_steps=1), options=ResponseOptions(log_every_n_outer_steps=1),
        weights_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5),
        response_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5),
        outer_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5),
    )  # fmt: skip
    fit = trainer(logger=CSVLogger(tmp_path), log_every_n_steps=1, max_epochs=2, limit_val_batches=1.0)
    fit.fit(module, loader(1), loader(2))
    header = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()[0].split(",")
    assert {"hyperparameters/dropout", "perturbation/dropout", "val_loss", "hypergradient/outer_loss"} <= set(
        header
    )
    assert [o.param_groups[0]["lr"] for o in fit.optimizers] == pytest.approx([0.1 / 4, 1e-3 / 4])
    assert module.outer.optimizer.param_groups[0]["lr"] == pytest.approx(0.05 / 2**6)
    assert set(module.scales()) == {h.name for h in module.vector.hyperparameters}


def test_early_stopping() -> None:
    module = Classifier()
    stop = EarlyStopping("val_loss", patience=0, min_delta=1e9)
    fit = trainer(stop, max_epochs=9, limit_val_batches=1.0)
    fit.fit(module, loader(1), loader(2))
    assert fit.current_epoch == 2


def test_non_finite_outer_losses_are_skipped_then_raise() -> None:
    module = Classifier(loop=Local(), options=ResponseOptions(max_skipped=3))
    module.finite = False
    before = [t.detach().clone() for t in module.vector.tensors]
    with pytest.warns(UserWarning, match="skipped the outer step"):
        trainer(limit_val_batches=0).fit(module, loader(1), loader(2))
    assert (module.inner_steps, module.outer_steps, module.skipped_steps) == (3, 0, 3)
    same(before, [t.detach() for t in module.vector.tensors])
    with pytest.raises(FloatingPointError, match="max_skipped=3"):
        trainer(limit_val_batches=0).fit(module, loader(1), loader(2))


def test_a_batch_that_is_too_small_loses_nothing() -> None:
    tuned = STN(perturbation=LearnedScale(antithetic=True))
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    module = Small(net, [LabelSmoothing()], loop=tuned)
    with pytest.raises(ValueError, match=r"batch of at least 2 examples. Got 1"):
        trainer(limit_val_batches=0).fit(module, as_loader([*examples(2), *examples(1, size=1)]), batches())
    assert module.inner_steps == 2
    assert all(p.grad is None for p in module.parameters())
    plain, x = module.export(), examples()[0][0]
    torch.testing.assert_close(plain(x), module(x))
    trainer(limit_val_batches=0).fit(module, batches(), batches())
    assert module.inner_steps == 5


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision(precision: Any) -> None:
    for loop in (DeltaSTN(train_steps=1), STN(train_steps=1)):
        module = Small(loop=loop)
        before = module.vector.flat().detach().clone()
        trainer(limit_val_batches=0, max_epochs=2, precision=precision).fit(module, batches(), batches())
        h = module.vector.flat().detach()
        assert h.dtype == torch.float32
        assert (h != before).all()
        assert torch.equal(module.network.point, h)
        assert all(bool(t.isfinite().all()) for t in tensors(module))


class Encoder(nn.Module):
    """A parameter with the name of one of FactorisedResponse's."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Parameter(0.1 * torch.randn(16, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.encoder


def test_parameters_may_be_called_like_those_of_the_response() -> None:
    module = Small(FactorisedResponse(Encoder(), 1), [LabelSmoothing()])
    before = [t.clone() for t in tensors(module)]
    trainer(limit_val_batches=0).fit(module, batches(), batches())
    assert sum(bool((a != b).any()) for a, b in zip(before, tensors(module), strict=True)) >= 2


def test_example_weights_work_at_one_point() -> None:
    class Weighted(Classifier):
        def inner_loss(self, batch: Any, values: Mapping[str, Tensor]) -> Tensor:
            losses = functional.cross_entropy(self.network(batch[0]), batch[1], reduction="none")
            return (self.example_weights(torch.arange(len(losses))) * losses).mean()  # type: ignore[no-any-return]

    module = Weighted([ExampleWeights(8)], loop=DeltaSTN(train_steps=1))
    assert not module.per_example
    trainer(limit_val_batches=0, max_epochs=2).fit(module, loader(1), loader(2))
    assert module.outer_steps == 6
