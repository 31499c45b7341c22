"""HypernetworkModule where things are not as usual: before fit, half precision, freezing, (time, batch), mid-epoch."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from lightning_nested.hypernetworks import FactorisedResponse, LearnedScale, best_response
from lightning_nested.hyperparameters import DropoutRates, InputNoise, LabelSmoothing, WeightDecay
from lightning_nested.modules import (
    STN,
    DeltaSTN,
    Global,
    HypernetworkModule,
    ResponseLoop,
    ResponseMonitor,
    ResponseOptions,
    TunedImageClassifier,
)


def trainer(folder: Path | None = None, **options: Any) -> Trainer:
    options = {"max_epochs": 1, "limit_val_batches": 0, "enable_checkpointing": False, **options}
    return Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, num_sanity_val_steps=0, **options,
    )  # fmt: skip


def examples(number: int = 1, size: int = 8) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 1, 4, 4, generator=generator), torch.randint(2, (size,), generator=generator))
        for _ in range(number)
    ]


def loader(given: list[Any]) -> DataLoader[Any]:
    return DataLoader(given, batch_size=None)  # type: ignore[arg-type]


def batches(number: int = 3, size: int = 8) -> DataLoader[Any]:
    return loader(examples(number, size))


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(12, 2))


class Classifier(HypernetworkModule):
    def __init__(self, net: nn.Module | None = None, tuned: Any = None, **options: Any) -> None:
        options = {"outer_optimizer": lambda p: torch.optim.Adam(p, lr=0.05), **options}
        super().__init__(net or network(), tuned or [DropoutRates(), LabelSmoothing()], **options)

    def inner_loss(self, batch: Any, values: Mapping[str, Tensor]) -> Tensor:
        logits = self.network(batch[0])
        if "label_smoothing" not in values:
            return functional.cross_entropy(logits, batch[1])
        return self.label_smoothing(logits, batch[1])  # type: ignore[no-any-return]

    def outer_loss(self, batch: Any) -> Tensor:
        return functional.cross_entropy(self.network(batch[0]), batch[1])


def state(module: HypernetworkModule) -> list[Tensor]:
    scale = [] if module.scale is None else [module.scale.detach()]
    return [*module.network.state_dict().values(), *(t.detach() for t in module.vector.tensors), *scale]


def test_the_response_is_trained_every_third_step_and_the_weights_in_each() -> None:
    moved: list[tuple[bool, bool]] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            groups = (pl_module.network.general_parameters(), pl_module.network.response_parameters())
            self.before = [[p.detach().clone() for p in g.values()] for g in groups]

        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            groups = (pl_module.network.general_parameters(), pl_module.network.response_parameters())
            moved.append(
                tuple(  # type: ignore[arg-type]
                    any(bool((a != b).any()) for a, b in zip(old, g.values(), strict=True))
                    for old, g in zip(self.before, groups, strict=True)
                )
            )

    for loop, expected in (
        (DeltaSTN(warmup_steps=99), [True, False, False, True]),
        (DeltaSTN(warmup_steps=99, response_every=2), [True, False, True, False]),
        (DeltaSTN(warmup_steps=99, response_every=1, linearized=False), [True] * 4),
    ):
        moved.clear()
        trainer(callbacks=[Watch()]).fit(Classifier(loop=loop), batches(4), batches())
        assert moved == [(True, e) for e in expected]


def test_the_response_of_one_point_learns_without_first_order_noise() -> None:
    """On ridge, far from w₀'s optimum: ε·(g(w₀ + bε; λ + ε) − g(w₀; λ)), not ε·g(w₀ + bε; λ + ε)."""
    generator = torch.Generator().manual_seed(0)
    x, y, w, b = (
        torch.randn(n, dtype=torch.float64, generator=generator) for n in ((6, 3), (6, 1), (1, 3), (1, 3))
    )

    class Ridge(HypernetworkModule):
        def inner_loss(self, batch: Any, values: Mapping[str, Tensor]) -> Tensor:
            return 0.5 * (self.network(x) - y).square().mean()

        def outer_loss(self, batch: Any) -> Tensor:
            return self.inner_loss(batch, {})

    net = nn.Linear(3, 1, bias=False).double()
    response = FactorisedResponse(net, 1, rank=1)
    response.encoder.requires_grad_(False).fill_(1.0)
    module = Ridge(response, WeightDecay(per="model", init=0.1))
    with torch.no_grad():
        response.module.weight.copy_(w)
        response.decoder.copy_(b.T)
    h, epsilon = module.vector.flat().detach(), 0.3
    value, for_general, for_phi = DeltaSTN().gradients(
        module._loss(), None, h, h + epsilon, [response.module.weight], [response.decoder]
    )

    def gradient(w: Tensor, shift: float) -> Tensor:
        return (w @ x.T - y.T) @ x / 6 + 0.1 * math.exp(shift) * w

    torch.testing.assert_close(for_general[0], gradient(w, 0.0))
    expected = epsilon * (gradient(w + epsilon * b, epsilon) - gradient(w, 0.0))
    torch.testing.assert_close(for_phi[0], expected.T)
    assert float(value) == pytest.approx(
        float(0.5 * (w @ x.T - y.T).square().mean() + 0.05 * w.square().sum())
    )


def test_without_linearising_the_response_sees_the_perturbed_network_and_the_weights_do_not() -> None:
    """Its gradients against autograd of the losses written out, running statistics counted once."""
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(16, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)
    ).double()
    found: dict[str, list[Tensor]] = {}

    class Keep(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            found.setdefault(self.defaults["lr"], []).extend(  # type: ignore[arg-type]
                p.grad.clone() for g in self.param_groups for p in g["params"] if p.grad is not None
            )

    module = Classifier(
        net, [LabelSmoothing()], loop=DeltaSTN(linearized=False, perturbation=LearnedScale(signs=True)),
        weights_optimizer=lambda p: Keep(p, lr=1.0), response_optimizer=lambda p: Keep(p, lr=2.0),
        options=ResponseOptions(per_example=False),
    )  # fmt: skip
    for p in module.network.response_parameters().values():
        nn.init.normal_(p, std=0.1)
    twin = copy.deepcopy(module.network)
    (batch,) = examples()
    batch = (batch[0].double(), batch[1])
    trainer().fit(module, loader([batch]), loader([batch]))
    assert int(module.network.module[2].num_batches_tracked) == 1
    center = module.vector.flat().detach()

    def loss(h: Tensor, wanted: Any) -> tuple[Tensor, ...]:
        smoothing = 0.5 * torch.sigmoid(h[0])
        with twin.at(h):
            log = twin(batch[0]).log_softmax(-1)
        value = -((1 - smoothing) * log.gather(1, batch[1][:, None])[:, 0] + smoothing * log.mean(-1)).mean()
        return torch.autograd.grad(value, list(wanted.values()), allow_unused=True)

    expected = [g for g in loss(center, twin.general_parameters()) if g is not None]
    torch.testing.assert_close(found[1.0], expected, rtol=1e-9, atol=1e-12)  # type: ignore[index]

    def of_response(h: Tensor) -> list[Tensor]:
        phi = twin.response_parameters()
        by_name = zip(twin.changes(h - center).values(), expected, strict=True)
        first_order = torch.stack([(c * g).sum() for c, g in by_name]).sum()
        taken_off = torch.autograd.grad(first_order, list(phi.values()), allow_unused=True)
        pairs = zip(loss(h, phi), taken_off, strict=True)
        return [g - t for g, t in pairs if g is not None and t is not None]

    signs = [of_response(center + s * 0.5) for s in (1, -1)]
    assert any(
        all(torch.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in zip(found[2.0], e, strict=True))  # type: ignore[index]
        for e in signs
    )


def test_a_module_stands_at_its_values_before_fit_and_after_loading(tmp_path: Path) -> None:
    x = examples()[0][0]
    module = Classifier()
    module.eval()
    torch.testing.assert_close(module(x), network().eval()(x))
    trainer(limit_val_batches=1.0).validate(module.train(), batches(), verbose=False)
    fit = trainer(tmp_path, max_epochs=3)
    fit.fit(module, batches(), batches())
    fit.save_checkpoint(tmp_path / "a.ckpt")
    expected = module.eval()(x)
    loaded = Classifier.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True).eval()
    assert torch.equal(loaded(x), expected)
    torch.testing.assert_close(loaded.export().eval()(x), expected, rtol=1e-6, atol=1e-6)
    other = Classifier()
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
    trainer(max_epochs=3).fit(module, data, data)
    before = [t.clone() for t in state(module)]
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin.eval()(x), module.eval()(x))
        trainer(max_epochs=3).fit(twin.train(), data, data)
        torch.testing.assert_close(state(module), before, rtol=0, atol=0)
        assert any(bool((a != b).any()) for a, b in zip(before[-3:], state(twin)[-3:], strict=True))
        assert twin.input_noise is twin.vector.hyperparameters[0]


class Logging(Classifier):
    """Logs, and counts with a metric, in the inner loss."""

    def __init__(self, **options: Any) -> None:
        super().__init__(tuned=[WeightDecay(per="model", init=1e-2), LabelSmoothing()], **options)
        self.examples = MeanMetric()

    def inner_loss(self, batch: Any, values: Mapping[str, Tensor]) -> Tensor:
        loss = super().inner_loss(batch, values)
        self.examples.update(float(len(batch[0])))
        self.log("train_loss", loss)
        self.logged.append(float(loss.detach()))
        return loss


def test_a_run_goes_the_same_way_whether_it_is_watched_or_not() -> None:
    """Also what the inner loss logs and counts is that of the training loss at λ alone."""
    runs = []
    for monitor in (None, ResponseMonitor(every_n_outer_steps=1, num_steps=2)):
        torch.manual_seed(0)
        module = Logging(
            loop=DeltaSTN(train_steps=1, response_every=1), options=ResponseOptions(monitor=monitor)
        )
        module.logged = []
        fit = trainer(max_epochs=2)
        fit.fit(module, batches(), batches())
        assert module.examples.update_count == module.inner_steps == 6
        step = 2 if monitor is None else 2 + 1 + 2 + 1  # both losses; at λ̂, two steps and after them
        assert len(module.logged) == 6 * step
        assert float(fit.callback_metrics["train_loss"]) == pytest.approx(module.logged[-step])
        runs.append(state(module))
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_without_validation_data_the_error_names_the_cure() -> None:
    with pytest.raises(
        MisconfigurationException, match=r"outer loss needs validation data.*outer_dataloader\(\)"
    ):
        trainer().fit(Classifier(), batches())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision(precision: Any) -> None:
    for loop in (DeltaSTN(train_steps=1), STN(train_steps=1)):
        module = Classifier(loop=loop)
        before = module.vector.flat().detach().clone()
        trainer(max_epochs=2, precision=precision).fit(module, batches(), batches())
        h = module.vector.flat().detach()
        assert h.dtype == torch.float32
        assert (h != before).all()
        assert torch.equal(module.network.point, h)
        assert all(bool(t.isfinite().all()) for t in state(module))


class Encoder(nn.Module):
    """A parameter with the name of one of FactorisedResponse's."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Parameter(0.1 * torch.randn(16, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.encoder


def test_parameters_may_be_called_like_those_of_the_response() -> None:
    module = Classifier(FactorisedResponse(Encoder(), 1), [LabelSmoothing()])
    before = [t.clone() for t in state(module)]
    trainer().fit(module, batches(), batches())
    assert sum(bool((a != b).any()) for a, b in zip(before, state(module), strict=True)) >= 2


def test_freezing_after_the_conversion_is_refused() -> None:
    module = Classifier()
    module.network.module[0].weight.requires_grad_(False)
    with pytest.raises(MisconfigurationException, match=r"Got 0.weight frozen since; freeze it before"):
        trainer().fit(module, batches(), batches())


def test_dropout_over_time_and_batch_has_the_rate_of_the_example() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.drop = nn.Linear(500, 500, bias=False), nn.Dropout(0.2)
            nn.init.eye_(self.layer.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(self.layer(x))

    class Mean(HypernetworkModule):
        def inner_loss(self, batch: Any, values: Mapping[str, Tensor]) -> Tensor:
            return self.network(batch).mean()

        def outer_loss(self, batch: Any) -> Tensor:
            return self.network(batch).mean()

    module = Mean(best_response(Model(), 1, batch_dim=1), [DropoutRates()], loop=STN()).train()
    x = torch.ones(4, 4, 500)  # as many steps as examples: the dimensions must not be taken for each other
    assert module.num_examples(torch.ones(5, 4, 2)) == 4
    h = torch.tensor([[-9.0], [9.0], [-9.0], [9.0]])
    with module.vector.bound(h), module.network.at(h):
        dropped = (module.network(x) == 0).float().mean((0, 2))
    # Rates 0.9·σ(±9); three standard deviations of 2000 draws.
    torch.testing.assert_close(dropped, torch.tensor([0.0, 0.9, 0.0, 0.9]), rtol=0, atol=0.021)
    trainer().fit(module, loader([torch.rand(5, 4, 500)] * 3), loader([torch.rand(5, 4, 500)]))
    assert module.export().drop.p == pytest.approx(float(module.values()["dropout"]))


class Stateful:
    """A loader that goes on where it stood."""

    def __init__(self) -> None:
        self.batches, self.position = examples(6), 0

    def __iter__(self) -> Iterator[Any]:
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]
        self.position = 0

    def __len__(self) -> int:
        return len(self.batches)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.filterwarnings("ignore:(?s)Using ModelCheckpoint with manual optimization")
@pytest.mark.parametrize(
    "loop", [DeltaSTN(train_steps=2), STN(train_steps=1, valid_steps=2), Global(response_steps=7)],
    ids=lambda loop: type(loop).__name__,
)  # fmt: skip
def test_resume_in_the_middle_of_an_epoch_is_bit_exact(loop: ResponseLoop, tmp_path: Path) -> None:
    def run(ckpt: Path | None = None) -> Classifier:
        torch.manual_seed(0)
        module = Classifier(loop=loop)
        torch.manual_seed(7)
        folder = tmp_path if ckpt is None else tmp_path / "second"
        save = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=3)
        fit = trainer(folder, max_epochs=2, enable_checkpointing=True, callbacks=[save])
        fit.fit(module, Stateful(), batches(2, size=5), ckpt_path=ckpt, weights_only=True)
        return module

    whole = run()
    resumed = run(tmp_path / "step=3.ckpt")
    assert (resumed.inner_steps, resumed.outer_steps) == (whole.inner_steps, whole.outer_steps)
    torch.testing.assert_close(state(resumed), state(whole), rtol=0, atol=0)


def test_a_batch_that_is_too_small_loses_nothing() -> None:
    tuned = STN(perturbation=LearnedScale(antithetic=True))
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    module = Classifier(net, [LabelSmoothing()], loop=tuned)
    with pytest.raises(ValueError, match=r"batch of at least 2 examples. Got 1"):
        trainer().fit(module, loader([*examples(2), *examples(1, size=1)]), batches())
    assert module.inner_steps == 2
    assert all(p.grad is None for p in module.parameters())
    plain, x = module.export(), examples()[0][0]
    torch.testing.assert_close(plain(x), module(x))
    trainer().fit(module, batches(), batches())
    assert module.inner_steps == 5


def test_response_every_is_a_number_of_steps() -> None:
    with pytest.raises(ValueError, match=r"response_every must be at least 1. Got 0"):
        DeltaSTN(response_every=0)
