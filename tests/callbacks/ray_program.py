"""Program of test_ray.py: HypergradientCallback on two workers of Ray Train, each with every other example of a batch."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from tests.callbacks.exact import decay_all, exact
from tests.callbacks.test_hypergradient_processes import _dealt, _keeper
from tests.callbacks.tuned_regression import Regression, data, sgd, smooth


def train(folder: Path, workers: int) -> None:
    """Fit, and save the tuned values and the weights of each worker."""
    callback = exact(decay_all("parameter", init=1e-2), optimizer=sgd(1.0))
    train_loader, val = DataLoader(data(32, 1), 8 // workers), DataLoader(data(16, 2), 16 // workers)
    options: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "num_sanity_val_steps": 0}
    if workers > 1:
        from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, prepare_trainer

        options |= {"strategy": RayDDPStrategy(), "plugins": [RayLightningEnvironment()], "devices": "auto"}
        train_loader, val = _dealt(train_loader), _dealt(val)
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    fit = Trainer(
        callbacks=[callback, _keeper(folder / str(workers), callback)],
        use_distributed_sampler=False,
        **options,
        **dict.fromkeys(silent, False),
    )
    if workers > 1:
        fit = prepare_trainer(fit)
    fit.fit(Regression(smooth()), train_loader, val)


if __name__ == "__main__":
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    place = Path(sys.argv[1])
    train(place, 1)
    TorchTrainer(
        partial(train, place, 2),
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(name="callback", storage_path=str(place / "ray")),
    ).fit()
