"""HypernetworkModule: closed forms in every loop, and real fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested.hypernetworks import (
    DenseResponse,
    DiagonalResponse,
    FactorisedResponse,
    FixedScale,
    GlobalNormal,
    LearnedScale,
    best_response,
)
from lightning_nested.hyperparameters import (
    Categorical,
    DropConnect,
    DropoutRates,
    ExampleWeights,
    InputNoise,
    Integer,
    Interval,
    LabelSmoothing,
    LearningRate,
    Scalar,
    WeightDecay,
)
from lightning_nested.modules import (
    STN,
    DeltaSTN,
    Global,
    HypernetworkModule,
    Local,
    ResponseLoop,
    ResponseMonitor,
    ResponseOptions,
    Simplified,
    TunedImageClassifier,
)


def sgd(lr: float, momentum: float = 0.0) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda params: torch.optim.SGD(params, lr=lr, momentum=momentum)


def trainer(folder: Path | None = None, **options: Any) -> Trainer:
    options = {
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "limit_val_batches": 0,
        **options,
    }
    return Trainer(
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        num_sanity_val_steps=0, **{"devices": 1, **options},
    )  # fmt: skip


def steps(n: int) -> DataLoader[Any]:
    """n batches whose content does not matter."""
    return DataLoader(TensorDataset(torch.zeros(n, 1, dtype=torch.float64)), batch_size=1)


# ---- ridge: value, slope and outer gradient are the closed form's

_RANDOM = torch.Generator().manual_seed(3)
_Q, _ = torch.linalg.qr(torch.randn(12, 4, dtype=torch.float64, generator=_RANDOM))
_SPECTRUM = torch.tensor([1.0, 1.2, 1.5, 2.0], dtype=torch.float64)
X = _Q * (12 * _SPECTRUM).sqrt()  # XᵀX/n = diag(spectrum)
Y = X.sum(1) + torch.randn(12, dtype=torch.float64, generator=_RANDOM)
X_VAL = torch.randn(50, 4, dtype=torch.float64, generator=_RANDOM)
Y_VAL = X_VAL.sum(1) + 2 * torch.randn(50, dtype=torch.float64, generator=_RANDOM)


def closed_form(log_decay: float) -> tuple[Tensor, Tensor, float]:
    """w*, dw*/dλ = −H⁻¹e^λ w*, and dL_V/dλ."""
    decay = math.exp(log_decay)
    H = _SPECTRUM + decay
    w = (X.T @ Y / 12) / H
    slope = -decay * w / H
    return w, slope, float((X_VAL.T @ (X_VAL @ w - Y_VAL) / 50) @ slope)


class Ridge(HypernetworkModule):
    def inner_loss(self, batch: Any, values: Mapping[str, Tensor]) -> Tensor:
        return 0.5 * (self.network(X).squeeze(-1) - Y).square().mean()

    def outer_loss(self, batch: Any) -> Tensor:
        return 0.5 * (self.network(X_VAL).squeeze(-1) - Y_VAL).square().mean()


def ridge(loop: ResponseLoop, log_decay: float, rate: float, response_rate: float, momentum: float) -> Ridge:
    net = nn.Linear(4, 1, bias=False).double()
    nn.init.zeros_(net.weight)
    response = FactorisedResponse(net, 1, rank=1)
    response.encoder.requires_grad_(False).fill_(1.0)  # w(h) = w₀ + b h: linear in its parameters
    return Ridge(
        response, WeightDecay(per="model", init=math.exp(log_decay)), loop=loop,
        weights_optimizer=sgd(rate, momentum), response_optimizer=sgd(response_rate, momentum),
        outer_optimizer=sgd(0.0), scale_optimizer=sgd(0.0), options=ResponseOptions(log_every_n_outer_steps=0),
    )  # fmt: skip


def found(module: Ridge) -> tuple[Tensor, Tensor, float]:
    h = module.vector.flat().detach().requires_grad_()
    w = module.network.weights(h)["weight"][0]
    slope = torch.stack([torch.autograd.grad(w[i], h, retain_graph=True)[0][0] for i in range(4)])
    loss = 0.5 * (X_VAL @ w - Y_VAL).square().mean()
    return w.detach(), slope, float(torch.autograd.grad(loss, h)[0])


# The loops' fixed points differ from the closed form by O(σ), as the response is not linear.
SMALL, NEAR = 1e-6, 3e-6


@pytest.mark.parametrize(
    ("loop", "log_decay", "number"),
    [
        (DeltaSTN(perturbation=LearnedScale(init=SMALL, signs=True)), -0.5, 100),
        # The others learn w₀ + b h with h not centred: σ and |h| must be of comparable size to converge.
        (STN(perturbation=LearnedScale(init=SMALL, signs=True)), NEAR, 500),
        (Local(perturbation=FixedScale(scale=SMALL, signs=True)), NEAR, 500),
        (
            Global(response_steps=500, perturbation=GlobalNormal(mean=NEAR, scale=SMALL, signs=True)),
            NEAR,
            501,
        ),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, ResponseLoop) else "",
)
def test_ridge_is_the_closed_form(loop: ResponseLoop, log_decay: float, number: int) -> None:
    centred = isinstance(loop, DeltaSTN)
    square = SMALL**2 if centred else SMALL**2 + log_decay**2
    rate, momentum = (0.4, 0.0) if centred else (0.15, 0.8)
    module = ridge(loop, log_decay, rate, rate / square, momentum)
    trainer().fit(module, steps(number), steps(1))
    w, slope, outer = closed_form(log_decay)
    assert (outer, float(slope.abs().max())) != pytest.approx((0.0, 0.0), abs=0.01)
    for got, expected in zip(found(module), (w, slope, outer), strict=True):
        torch.testing.assert_close(
            torch.as_tensor(got), torch.as_tensor(expected), rtol=0, atol=1e-6, check_dtype=False
        )
    assert module.last_report is not None
    assert module.last_report.hypergradient_norm == pytest.approx(abs(outer), abs=1e-5)


def test_simplified_learns_the_value_and_no_slope() -> None:
    module = ridge(Simplified(), -0.5, 0.4, 0.0, 0.0)
    trainer().fit(module, steps(100), steps(1))
    torch.testing.assert_close(found(module)[0], closed_form(-0.5)[0], rtol=0, atol=1e-12)
    assert found(module)[2] == 0.0


def test_delta_stn_needs_fewer_steps_than_stn() -> None:
    """To within 5 % of the slope at λ = −0.5, σ = 0.1, each with heavy ball tuned to its condition number."""

    class UntilClose(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            slope = closed_form(-0.5)[1]
            trainer.should_stop = float((found(pl_module)[1] - slope).norm() / slope.norm()) < 0.05

    def number(loop: ResponseLoop, square: float, momentum: float) -> int:
        module = ridge(loop, -0.5, 0.4, 0.4 / square, momentum)
        trainer(max_epochs=-1, callbacks=[UntilClose()]).fit(module, steps(1), steps(1))
        return module.inner_steps

    perturbation = LearnedScale(init=0.1, signs=True)
    delta = number(DeltaSTN(perturbation=perturbation), 0.01, 0.0)
    assert 4 * delta <= min(number(STN(perturbation=perturbation), 0.26, m) for m in (0.6, 0.7, 0.8))


def test_one_decay_per_weight_of_an_orthogonal_design_is_the_closed_form() -> None:
    """XᵀX is diagonal, and so is the response."""
    net = nn.Linear(4, 1, bias=False).double()
    nn.init.zeros_(net.weight)
    module = Ridge(
        DiagonalResponse(net, 4), WeightDecay(per="parameter"),
        loop=DeltaSTN(perturbation=LearnedScale(init=SMALL, signs=True)),
        weights_optimizer=sgd(0.4), response_optimizer=sgd(0.4 / SMALL**2), outer_optimizer=sgd(0.0),
        scale_optimizer=sgd(0.0), options=ResponseOptions(log_every_n_outer_steps=0),
    )  # fmt: skip
    log_decays = torch.tensor([[-3.0, -2.0, -0.5, -0.1]], dtype=torch.float64)
    with torch.no_grad():
        module.vector.tensors[0].copy_(log_decays)
    trainer().fit(module, steps(100), steps(1))
    H = _SPECTRUM + log_decays.exp()
    w = (X.T @ Y / 12) / H
    slopes = -log_decays.exp() * w / H
    torch.testing.assert_close(module.network.general_parameters()["weight"].detach(), w, rtol=0, atol=1e-6)
    torch.testing.assert_close(module.network.slopes[0].detach(), slopes, rtol=0, atol=1e-6)
    outer = (X_VAL.T @ (X_VAL @ w[0] - Y_VAL) / 50) * slopes[0]
    assert module.last_report is not None
    assert module.last_report.hypergradient_norm == pytest.approx(float(outer.norm()), abs=1e-5)


def test_the_outer_steps_find_the_optimum() -> None:
    module = ridge(DeltaSTN(perturbation=LearnedScale(init=1e-2, signs=True)), -0.5, 0.4, 0.4e4, 0.0)
    module.outer.optimizer.param_groups[0]["lr"] = 3.0
    trainer().fit(module, steps(600), steps(1))
    assert abs(closed_form(float(module.vector.flat().detach()))[2]) < 1e-3 < abs(closed_form(-0.5)[2])


# ---- a network with everything


def data(seed: int, size: int = 24) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 1, 4, 4, generator=generator)
    return TensorDataset(x, (x[:, 0, 0, 0] * x[:, 0, 1, 1] > 0).long())


def loader(seed: int, batch: int = 8) -> DataLoader[Any]:
    return DataLoader(data(seed), batch_size=batch)


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(12, 2)
    )


def everything() -> list[Any]:
    return [
        DropoutRates(), InputNoise(), LabelSmoothing(), Scalar("factor", 1.0, Interval(lower=0.5, upper=2.0)),
        Integer("count", 1, 4, 2), Categorical("kind", ["a", "b"]),
    ]  # fmt: skip


class Classifier(HypernetworkModule):
    """Uses all of them, those of no consequence too."""

    def __init__(self, hyperparameters: Any = None, net: nn.Module | None = None, **kw: Any) -> None:
        kw = {"outer_optimizer": lambda p: torch.optim.Adam(p, lr=0.05), **kw}
        super().__init__(net or network(), everything() if hyperparameters is None else hyperparameters, **kw)
        self.seen: list[tuple[torch.Size, bool]] = []
        self.finite = True

    def inner_loss(self, batch: Any, values: Mapping[str, Tensor]) -> Tensor:
        x = batch[0]
        self.seen.append((next(iter(values.values())).shape, self.network.training))
        if "input_noise" in values:
            x = self.input_noise(x)
        logits = self.network(x)
        if "label_smoothing" not in values:
            return functional.cross_entropy(logits, batch[1])
        assert set(torch.as_tensor(values["count"]).flatten().tolist()) <= {1.0, 2.0, 3.0, 4.0}
        assert set(self.kind.choice()) <= {"a", "b"}
        return self.label_smoothing(logits * values["factor"].reshape(-1, 1), batch[1])  # type: ignore[no-any-return]

    def outer_loss(self, batch: Any) -> Tensor:
        loss = functional.cross_entropy(self.network(batch[0]), batch[1])
        return loss if self.finite else loss * torch.nan


def tensors(module: HypernetworkModule) -> list[Tensor]:
    scale = [] if module.scale is None else [module.scale.detach()]
    return [*module.network.state_dict().values(), *(t.detach() for t in module.vector.tensors), *scale]


def same(a: list[Tensor], b: list[Tensor], rtol: float = 0.0) -> None:
    assert len(a) == len(b)
    for s, t in zip(a, b, strict=True):
        torch.testing.assert_close(s, t, rtol=rtol, atol=rtol)


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
    fit = trainer(max_epochs=4)
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
    trainer(max_epochs=4).fit(module, loader(1), loader(2))
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


@pytest.mark.parametrize("per", ["model", "tensor", "parameter"])
def test_decay_is_in_the_inner_loss(per: Any) -> None:
    """Against the penalty written out, in both of Delta-STN's losses."""
    module = Classifier([WeightDecay(per=per, init=0.1)])
    response = module.network
    for p in response.response_parameters().values():
        nn.init.normal_(p, std=0.1)
    batch = next(iter(loader(1)))
    h = module.vector.flat().detach()
    moved = h + 0.1
    response.center.copy_(h)
    module.eval()
    for at, mode in ((h, "general"), (moved, "response"), (moved, "linearized")):
        with response.at(at, mode):  # type: ignore[arg-type]
            plain = module.inner_loss(batch, {"x": h})
        weights = response.weights(at)
        decay = 0.1 * math.exp(0.1 if at is moved else 0.0)
        expected = plain + 0.5 * decay * sum(w.square().sum() for w in weights.values())
        torch.testing.assert_close(module.training_loss(batch, at, mode), expected)  # type: ignore[arg-type]


def test_drop_connect_drops_in_training_only() -> None:
    module = Classifier([DropConnect(init=0.5), WeightDecay(per="model")], loop=STN())
    trainer(max_epochs=2).fit(module, loader(1), loader(2))
    assert module.seen[0][0] == torch.Size([])
    batch = next(iter(loader(1)))
    h = module.vector.flat().detach()
    a, b = (float(module.training_loss(batch, h).detach()) for _ in range(2))
    assert a != b
    module.eval()
    assert torch.equal(module(batch[0]), module(batch[0]))


def test_refining_moves_the_predicted_weights_by_real_steps() -> None:
    """One outer step by hand: ∂L_V/∂w at the refined weights, times the response's slope."""
    module = ridge(DeltaSTN(train_steps=1, perturbation=FixedScale(scale=1e-3)), -0.5, 0.0, 0.0, 0.0)
    module.options = ResponseOptions(refine_steps=3)
    module._make = (sgd(0.2), sgd(0.0))
    nn.init.normal_(module.network.decoder)
    trainer(limit_train_batches=1).fit(module, steps(2), steps(1))
    w, slope = torch.zeros(4).double(), module.network.decoder.detach().squeeze(-1)
    start = w.clone()
    # The weights' optimizer made its own step before: undone by its rate, which the inner step had too.
    H, b = _SPECTRUM + math.exp(-0.5), X.T @ Y / 12
    start = start - 0.2 * (H * start - b)
    refined = start
    for _ in range(3):
        refined = refined - 0.2 * (H * refined - b)
    expected = abs(float((X_VAL.T @ (X_VAL @ refined - Y_VAL) / 50) @ slope))
    assert module.last_report is not None
    assert module.last_report.hypergradient_norm == pytest.approx(expected, rel=1e-9)


def test_the_monitor_tells_a_trained_response_from_an_untrained_one() -> None:
    logged: dict[str, float] = {}

    class Read(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            logged.update({k: float(v) for k, v in trainer.callback_metrics.items()})

    for number, trained in ((1, False), (60, True)):
        module = ridge(
            DeltaSTN(train_steps=1, perturbation=LearnedScale(init=1e-3, signs=True)), -0.5, 0.4, 4e5, 0.0
        )
        module.options = ResponseOptions(monitor=ResponseMonitor(every_n_outer_steps=1, num_steps=5))
        nn.init.normal_(module.network.decoder)
        trainer(callbacks=[Read()]).fit(module, steps(number), steps(1))
        gap = logged["response/inner_loss"] - logged["response/refined_inner_loss"]
        assert (gap < 1e-12) == trained
        assert (logged["response/implicit_cosine"] > 0.999) == trained


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
    fit = trainer(max_epochs=9, callbacks=[stop], limit_val_batches=1.0)
    fit.fit(module, loader(1), loader(2))
    assert fit.current_epoch == 2


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(
    "make",
    [
        lambda: Classifier(loop=DeltaSTN(train_steps=2)),
        lambda: Classifier([WeightDecay(), DropoutRates(), DropConnect()], loop=STN(valid_steps=2)),
        lambda: Classifier(loop=Global(response_steps=5)),
    ],
    ids=["Delta-STN", "one point", "global"],
)
def test_resume_is_bit_exact(make: Callable[[], Classifier], tmp_path: Path) -> None:
    """With dropout, noise and perturbations: each step's random stream follows from its number."""

    def run(folder: str, epochs: int, ckpt: Path | None = None) -> tuple[Classifier, Trainer]:
        save = ModelCheckpoint(
            tmp_path / folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True
        )
        torch.manual_seed(0)
        module = make()
        torch.manual_seed(7)
        fit = trainer(max_epochs=epochs, enable_checkpointing=True, callbacks=[save])
        fit.fit(module, loader(1), loader(2, batch=5), ckpt_path=ckpt, weights_only=True)
        return module, fit

    whole, whole_fit = run("whole", 4)
    run("first", 2)
    module, fit = run("second", 4, tmp_path / "first" / "epoch=1.ckpt")
    same(tensors(module), tensors(whole))
    assert (module.inner_steps, module.outer_steps) == (whole.inner_steps, whole.outer_steps)
    optimizers = [(fit.optimizers[0], whole_fit.optimizers[0]), (fit.optimizers[1], whole_fit.optimizers[1])]
    optimizers.append((module.outer.optimizer, whole.outer.optimizer))
    for a, b in optimizers:
        torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)
    plain, x = module.export().eval(), data(5).tensors[0]
    torch.testing.assert_close(plain(x), whole.eval()(x), rtol=1e-6, atol=1e-6)


class Save(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.noise: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        center = pl_module.vector.flat().detach()
        self.noise.append(pl_module._steps.noise(center, None, pl_module.inner_steps, 2))

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        torch.save([self.noise[0], tensors(pl_module)], self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.parametrize("loop", [DeltaSTN(train_steps=2), STN()], ids=["Delta-STN", "STN"])
def test_two_processes_try_other_points_and_agree(loop: ResponseLoop, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.Dropout(0.2), nn.Tanh(), nn.Linear(4, 2))
    module = Classifier(net=net, loop=loop)
    before = tensors(module)
    trainer(max_epochs=2, devices=2, strategy="ddp_fork", callbacks=[Save(tmp_path)]).fit(
        module, loader(1), loader(2)
    )
    (noise, first), (other, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert not torch.equal(noise, other)
    same(first, second)
    assert all(bool((a != b).any()) for a, b in zip(before[-2:], first[-2:], strict=True))


class Halves(Ridge):
    """Each process takes its half of the examples: two processes must be one, without noise."""

    def half(self, t: Tensor) -> Tensor:
        return t[self.trainer.global_rank :: self.trainer.world_size]

    def inner_loss(self, batch: Any, values: Mapping[str, Tensor]) -> Tensor:
        return 0.5 * (self.network(self.half(X)).squeeze(-1) - self.half(Y)).square().mean()

    def outer_loss(self, batch: Any) -> Tensor:
        return 0.5 * (self.network(self.half(X_VAL)).squeeze(-1) - self.half(Y_VAL)).square().mean()


def test_two_processes_are_one(tmp_path: Path) -> None:
    def run(**options: Any) -> Halves:
        torch.manual_seed(0)
        net = nn.Linear(4, 1).double()
        module = Halves(
            DenseResponse(net, 1, hidden=(3,)), WeightDecay(per="model", init=0.5), loop=Simplified(),
            weights_optimizer=sgd(0.1), response_optimizer=sgd(0.1), outer_optimizer=sgd(1.0),
            options=ResponseOptions(gradient_clip_val=0.5),
        )  # fmt: skip
        trainer(use_distributed_sampler=False, **options).fit(module, steps(6), steps(1))
        return module

    run(devices=2, strategy="ddp_fork", callbacks=[Save(tmp_path)])
    same(torch.load(tmp_path / "1.pt")[1], tensors(run()), rtol=1e-12)


# ---- errors


def test_non_finite_outer_losses_are_skipped_then_raise() -> None:
    module = Classifier(loop=Local(), options=ResponseOptions(max_skipped=3))
    module.finite = False
    before = [t.detach().clone() for t in module.vector.tensors]
    with pytest.warns(UserWarning, match="skipped the outer step"):
        trainer().fit(module, loader(1), loader(2))
    assert (module.inner_steps, module.outer_steps, module.skipped_steps) == (3, 0, 3)
    same(before, [t.detach() for t in module.vector.tensors])
    with pytest.raises(FloatingPointError, match="max_skipped=3"):
        trainer().fit(module, loader(1), loader(2))


class NoHooks(Classifier):
    def on_train_start(self) -> None: ...


class Detached(Classifier):
    def inner_loss(self, batch: Any, values: Mapping[str, Tensor]) -> Tensor:
        return super().inner_loss(batch, values).detach()


class Taken(Classifier):
    def kind(self) -> None: ...


def fitted(module: HypernetworkModule, batches: DataLoader[Any] | None = None, **options: Any) -> None:
    trainer(**options).fit(module, batches or loader(1), loader(2))


ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "penalty with one λ of each example": (
        lambda: Classifier([WeightDecay(), InputNoise()], options=ResponseOptions(per_example=True)),
        ValueError, r"Got: weight_decay acts on the whole batch",
    ),
    "layer without": (
        lambda: Classifier(
            [LabelSmoothing()], net=nn.ConvTranspose2d(1, 2, 2), options=ResponseOptions(per_example=True)
        ),
        ValueError, "weight has no layer that responds",
    ),
    "refined examples": (
        lambda: Classifier([InputNoise()], options=ResponseOptions(per_example=True, refine_steps=1)),
        ValueError, "refine_steps",
    ),
    "outside its interval": (lambda: LabelSmoothing(init=0.6), ValueError, r"inside \(0.0, 0.5\). Got 0.6"),
    "nothing to convert": (lambda: Classifier([LabelSmoothing()], nn.Flatten()), ValueError, "must have a parameter"),
    "no dropout": (lambda: Classifier(net=nn.Linear(16, 2)), ValueError, "Got none in Linear"),
    "learning rate": (lambda: Classifier([LearningRate()]), ValueError, "NestedModule"),
    "another n": (
        lambda: Classifier(net=best_response(network(), 3)), ValueError, r"num_hyperparameters=\d+.*response with 3"
    ),
    "batch of one": (
        lambda: fitted(
            Classifier([InputNoise()], loop=STN(perturbation=LearnedScale(antithetic=True))), loader(1, batch=1)
        ),
        ValueError, "batch of at least 2 examples. Got 1",
    ),
    "taken": (Taken, ValueError, "set another name"),
    "no hooks": (lambda: fitted(NoHooks()), MisconfigurationException, "super"),
    "detached": (lambda: fitted(Detached()), MisconfigurationException, "Detached.inner_loss.*graph"),
    "plateau": (
        lambda: fitted(Classifier(weights_scheduler=lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o))),
        MisconfigurationException, "ReduceLROnPlateau",
    ),
    "steps": (lambda: STN(train_steps=0), ValueError, "train_steps"),
    "options": (lambda: ResponseOptions(refine_steps=-1), ValueError, "refine_steps must be at least 0"),
    "clip": (lambda: ResponseOptions(gradient_clip_val=0.0), ValueError, "positive"),
    "monitor": (lambda: ResponseMonitor(every_n_outer_steps=0), ValueError, "at least 1"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*ReduceLROnPlateau.*")
@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=f"(?s){message}"):
        call()


def test_example_weights_work_at_one_point() -> None:
    class Weighted(Classifier):
        def inner_loss(self, batch: Any, values: Mapping[str, Tensor]) -> Tensor:
            losses = functional.cross_entropy(self.network(batch[0]), batch[1], reduction="none")
            return (self.example_weights(torch.arange(len(losses))) * losses).mean()  # type: ignore[no-any-return]

    module = Weighted([ExampleWeights(8)], loop=DeltaSTN(train_steps=1))
    assert not module.per_example
    trainer(max_epochs=2).fit(module, loader(1), loader(2))
    assert module.outer_steps == 6


def test_tuned_image_classifier_reads_its_hyperparameters() -> None:
    module = TunedImageClassifier(
        "cnn", [InputNoise(), LabelSmoothing()], input_shape=(1, 8, 8), network_options={"width": 2}
    )
    x = torch.rand(24, 1, 8, 8)
    batches = DataLoader(TensorDataset(x, torch.arange(24) % 10), batch_size=8)
    fit = trainer(max_epochs=2, limit_val_batches=1)
    fit.fit(module, batches, batches)
    assert module.per_example
    assert {"val_loss", "val_accuracy"} <= set(fit.callback_metrics)
    (result,) = fit.test(module, batches, verbose=False)
    assert set(result) == {"test_loss", "test_accuracy"}
    assert module.predict_step(x).sum(-1).sub(1).abs().max() < 1e-5
    with pytest.raises(ValueError, match="must be empty"):
        TunedImageClassifier(nn.Linear(2, 2), [LabelSmoothing()], network_options={"width": 2})
