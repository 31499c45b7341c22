"""HypergradientCallback in training scripts as people write them, all switches on, and in modules of other packages."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint

from lightning_nested.callbacks import HypergradientCallback
from lightning_nested.hyperparameters import WeightDecay
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


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
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
