"""Under Ray Train, with two workers of this machine: a callback, and the launch file of BigGAN."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_nested.callbacks import GeneratorEMA
from lightning_nested.networks import Generator

ROOT = Path(__file__).parents[2]
# On a busy machine workers take longer to import torch than Ray waits by default.
PATIENCE = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None or importlib.util.find_spec("pandas") is None,
        reason="Ray Train is not installed: pip install 'ray[train]'",
    ),
]


def run(folder: Path, *command: str) -> None:
    """Run a program of this interpreter in a folder; Ray starts its cluster in it and ends it with it."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | PATIENCE | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_a_callback_on_two_workers_equals_one_process_on_the_joined_batch(tmp_path: Path) -> None:
    run(tmp_path, str(ROOT / "tests/callbacks/ray_program.py"), str(tmp_path))
    one = torch.load(tmp_path / "1_0.pt")
    first, second = (torch.load(tmp_path / f"2_{rank}.pt") for rank in (0, 1))
    # The values moved.
    assert not torch.allclose(one[0], torch.full_like(one[0], 1e-2), rtol=1e-6)
    for joined, a, b in zip(one, first, second, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, joined, rtol=1e-10, atol=1e-13)


def test_the_launch_file_trains_biggan(tmp_path: Path) -> None:
    run(tmp_path, str(ROOT / "docs/launch/biggan_ray.py"), "--toy", "--storage", str(tmp_path))
    checkpoint = max(tmp_path.glob("biggan/checkpoint_*/checkpoint.ckpt"))  # of the last epoch
    state = torch.load(checkpoint, weights_only=False)
    assert state["global_step"] == 4
    average = GeneratorEMA.generator_from_checkpoint(checkpoint, Generator(width=2, latent_dim=8))
    images = average(torch.randn(3, 8), torch.tensor([0, 1, 2]))
    assert images.shape == (3, 3, 32, 32)
