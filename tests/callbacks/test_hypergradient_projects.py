"""HypergradientCallback in training scripts as people write them, all switches on, and in modules of other packages."""

from __future__ import annotations

import importlib
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_nested.callbacks import HypergradientCallback
from lightning_nested.hypergradient import ConjugateGradient, Current
from lightning_nested.hyperparameters import WeightDecay
from lightning_nested.linalg.vectors import flatten
from tests.trainers import trainer

FOLDER = Path(__file__).parent.parent.parent / "benchmarks"

# Lightning, the compiler and the packages warn on their own behalf.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def gpt(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("_gpt")


def script(
    gpt: Any, folder: Path, *, epochs: int, resume: Path | None = None, **options: Any
) -> HypergradientCallback:
    """Run a GPT with parameter groups, schedule, accumulation, clipping, averaged weights and checkpoints."""
    seed_everything(0, verbose=False)
    compiled, precision = options.pop("compiled", False), options.pop("precision", "32-true")
    train, val, _ = gpt.loaders(options.pop("size", 1_500), 8, 16, 700)
    module = gpt.GPT(width=8, depth=1, context=16, compiled=compiled)
    callback = HypergradientCallback(WeightDecay(), every_n_steps=3, warmup_steps=2)
    others = [
        EMAWeightAveraging(decay=0.9),
        ModelCheckpoint(dirpath=folder, monitor="val_loss", save_last=True),
        EarlyStopping("val_loss", patience=3),
    ]
    # A callback before all others, or after them.
    order = [callback, *others] if resume is None else [*others, callback]
    fit = trainer(
        *order,
        folder=folder,
        max_epochs=epochs,
        precision=precision,
        accumulate_grad_batches=4,
        gradient_clip_val=1.0,
        enable_checkpointing=True,
    )
    fit.fit(module, train, val, ckpt_path=resume)
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    # The optimizer has its own decay back, of the matrices alone.
    assert [group["weight_decay"] for group in fit.optimizers[0].param_groups] == [0.1, 0.0]
    assert callback.outer_loop.skipped_steps == 0
    return callback


def moved(callback: HypergradientCallback) -> bool:
    values = [float(v) for v in callback.values().values()]
    # A few may be held at their start: which ones depends on the random numbers of dropout.
    return callback.outer_steps > 0 and all(v > 0 for v in values) and 2 * len(set(values)) > len(values)


def test_a_script_with_every_switch_and_its_second_half(gpt: Any, tmp_path: Path) -> None:
    first = script(gpt, tmp_path, epochs=2)
    assert moved(first)
    second = script(gpt, tmp_path / "resumed", epochs=4, resume=tmp_path / "last.ckpt")
    assert second.inner_steps == 2 * first.inner_steps
    assert second.outer_steps > first.outer_steps
    assert moved(second)


compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


@pytest.mark.slow
@compiler
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_script_compiled(gpt: Any, precision: str, tmp_path: Path) -> None:
    if precision == "bf16-mixed" and "avx512_bf16" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no bfloat16")
    torch.compiler.reset()
    assert moved(script(gpt, tmp_path, epochs=2, compiled=True, precision=precision))
    script(
        gpt, tmp_path / "resumed", epochs=3, resume=tmp_path / "last.ckpt", compiled=True, precision=precision
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("tft", "pytorch_forecasting"),
        ("nbeats", "pytorch_forecasting"),
        ("regression", "lightning_uq_box"),
        ("mve", "lightning_uq_box"),
        ("mc dropout", "lightning_uq_box"),
    ],
)
def test_modules_of_other_packages(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(FOLDER))
    project = importlib.import_module("_projects").PROJECTS[name]
    seed_everything(0, verbose=False)
    module, (train, val, _) = project.make(0)
    callback = HypergradientCallback(WeightDecay(), every_n_steps=5, warmup_steps=5)
    trainer(callback, max_epochs=3, **project.options).fit(module, train, val)
    assert callback.outer_steps > 0
    assert callback.outer_loop.skipped_steps == 0
    first, last = callback.outer.first["weight_decay"], list(callback.values().values())
    assert len(last) == first[3]
    assert any(float(v) != first[0] for v in last)


class _Newton:
    """Trains a module to the end: mean loss of a batch with a decay for each tensor that is trained."""

    def __init__(self, module: Any, batch: Tensor, decays: Tensor) -> None:
        self.module, self.batch = module, batch
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        options: dict[str, Any] = {
            "history_size": 30,
            "tolerance_change": 0.0,
            "line_search_fn": "strong_wolfe",
        }
        optimizer = torch.optim.LBFGS(self.parameters, max_iter=400, **options)
        optimizer.step(lambda: self._backward(optimizer, decays))  # type: ignore[arg-type,return-value]
        for _ in range(6):
            gradient = self.gradient(decays, create_graph=True)
            rows = [
                flatten(torch.autograd.grad(gradient, self.parameters, unit, retain_graph=True))
                for unit in torch.eye(len(gradient), dtype=torch.float64)
            ]
            # Rotations of queries against keys change nothing: there the curvature is zero.
            sizes, axes = torch.linalg.eigh(torch.stack(rows))
            self.inverse = (axes / sizes.abs().clamp_min(float(decays.min()) / 10)) @ axes.T
            self._move(gradient.detach())
        self.home = [p.detach().clone() for p in self.parameters]

    def again(self, decays: Tensor) -> None:
        """Train on with other decays that are near, from where the first training ended."""
        with torch.no_grad():
            for p, home in zip(self.parameters, self.home, strict=True):
                p.copy_(home)
        for _ in range(8):
            self._move(self.gradient(decays).detach())
        assert float(self.gradient(decays).norm()) < 1e-11

    def gradient(self, decays: Tensor, create_graph: bool = False) -> Tensor:
        loss = self._loss(decays)
        return flatten(torch.autograd.grad(loss, self.parameters, create_graph=create_graph))

    def _loss(self, decays: Tensor) -> Tensor:
        squares = torch.stack([(p**2).sum() for p in self.parameters])
        loss: Tensor = self.module.loss(self.batch) + 0.5 * (decays * squares).sum()
        return loss

    def _backward(self, optimizer: torch.optim.Optimizer, decays: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = self._loss(decays)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    @torch.no_grad()
    def _move(self, gradient: Tensor) -> None:
        moves = torch.split(self.inverse @ gradient, [p.numel() for p in self.parameters])
        for p, move in zip(self.parameters, moves, strict=True):
            p.sub_(move.view_as(p))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiled", "precision", "products"),
    [
        (False, "64-true", 100),
        pytest.param(True, "64-true", 100, marks=compiler),
        pytest.param(True, "bf16-mixed", 2, marks=compiler),
    ],
)
def test_the_scripts_hypergradient_is_the_difference_of_runs_trained_again(
    gpt: Any, compiled: bool, precision: Any, products: int
) -> None:
    """At the end of training, with every switch on: each tensor's decay moved up and down.

    Fused attention has no second derivative, and a network compiled by Inductor has none: products are differences. In
    half precision these are so rough that more than a few lead astray; the direction is right. A large ε makes one
    diagonal of AdamW's, whose own derivative the formula leaves out. Norms and embeddings stay as they are: a network
    that may shrink its embeddings under a norm has no minimum to speak of.
    """
    eps, decay, step = 1e4, 0.05, 1e-3

    class Double(gpt.GPT):  # type: ignore[misc,name-defined]
        def loss(self, batch: Tensor) -> Tensor:
            return functional.cross_entropy(self.network(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

        def configure_optimizers(self) -> Any:
            found = super().configure_optimizers()
            for group in found["optimizer"].param_groups:
                group["eps"] = eps
            return found

    seed_everything(0, verbose=False)
    train, val, _ = gpt.loaders(8 + 32 * 4 + 1, 8, 8, 8 + 8 * 8 + 1)
    batches, (held_out,) = list(train), list(val)
    assert len(batches) == 4
    torch.compiler.reset()
    module = Double(width=4, depth=1, context=8).double()
    network = module.network
    for embedding in (module.network.tokens, module.network.positions):
        nn.init.normal_(embedding.weight)
    for name, p in module.named_parameters():
        p.requires_grad_(any(part in name for part in ("qkv", "projection", "mlp.2")))
    decays = torch.full((5,), decay, dtype=torch.float64)
    module.network.checkpointing = False
    with sdpa_kernel(SDPBackend.MATH):
        trained = _Newton(module, torch.cat(batches), decays)

    network.checkpointing = True
    if compiled:
        module.network = torch.compile(network)
    if precision == "bf16-mixed":
        module.float()
    callback = HypergradientCallback(
        WeightDecay(init=decay / eps, include=["*"]),
        at=Current(),
        solver=ConjugateGradient(max_iterations=products, tolerance=1e-8),
        optimizer=lambda tensors: torch.optim.SGD(tensors, lr=1.0),
        warmup_steps=2,
        every_n_steps=10,
    )
    average = EMAWeightAveraging(decay=0.9)
    fit = trainer(
        callback, average, max_epochs=3, accumulate_grad_batches=4, gradient_clip_val=1.0, precision=precision
    )
    fit.fit(module, train, val)
    assert callback.outer_steps == 1
    values = torch.stack([value.double() for value in callback.values().values()])
    found = -(values * eps / decay).log()

    truth, names = [], [name for name, p in module.named_parameters() if p.requires_grad]
    module.network = network.double()
    network.checkpointing = False
    # Matrices come first in the optimizer.
    for i in map(names.index, callback.outer.decays[0].parameter_names):
        losses = []
        for sign in (1.0, -1.0):
            moved = decays.clone()
            moved[i] *= math.exp(sign * step)
            trained.again(moved)
            losses.append(float(module.loss(held_out)))
        truth.append((losses[0] - losses[1]) / (2 * step))
    expected = torch.tensor(truth, dtype=torch.float64)
    if precision == "bf16-mixed":
        assert float(functional.cosine_similarity(found, expected, dim=0)) > 0.85
    else:
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
