"""Projects of others, as their documentation writes them, on synthetic data of the same form."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from _gpt import GPT, loaders
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader


@dataclass(frozen=True, kw_only=True)
class Project:
    """A module with its data.

    Attributes:
        make: Function from a seed to the module, and its loaders for training, validation and test.
        test: Name of the logged test loss.
        options: Options of the Trainer.
    """

    make: Callable[[int], tuple[LightningModule, list[Any]]]
    test: str
    epochs: int
    options: dict[str, Any]


def _gpt(seed: int) -> tuple[LightningModule, list[Any]]:
    return GPT(), list(loaders(12_000, 16))


def _sales(seed: int, series: int = 12, length: int = 60) -> Any:
    """Return a table in the form of the stallion example: agencies, products, prices, holidays, volumes."""
    import numpy as np
    import pandas as pd

    rng = np.random.default_rng(seed)
    parts = []
    for i in range(series):
        agency, sku = f"Agency_{i % 6:02d}", f"SKU_{i // 6:02d}"
        level, season = rng.lognormal(5, 0.7), rng.uniform(0, 2 * math.pi)
        price = 1000 + 200 * rng.standard_normal() + np.cumsum(10 * rng.standard_normal(length))
        promotion = np.clip(rng.normal(100, 80, length), 0, None)
        holiday = rng.random(length) < 0.15
        time = np.arange(length)
        noise = rng.lognormal(0, 0.3, length)
        volume = level * (1.2 + np.sin(2 * math.pi * time / 12 + season)) * (1 + promotion / 400) * noise
        volume = volume * np.where(holiday, 1.4, 1.0)
        columns = {
            "agency": agency,
            "sku": sku,
            "time_idx": time,
            "month": (time % 12).astype(str),
            "special_days": np.where(holiday, "holiday", "-"),
            "price_regular": price,
            "discount_in_percent": promotion / 10,
            "avg_population_2017": 1e4 * (1 + i % 6),
            "volume": volume,
            "log_volume": np.log(volume + 1e-8),
        }
        parts.append(pd.DataFrame(columns))
    frame = pd.concat(parts, ignore_index=True)
    frame["avg_volume_by_sku"] = frame.groupby(["time_idx", "sku"], observed=True).volume.transform("mean")
    return frame


def _series(frame: Any, train: Any, **options: Any) -> list[Any]:
    """Return loaders of a data set and of the months after it: six to validate on, six to test."""
    from pytorch_forecasting import TimeSeriesDataSet

    last = int(frame["time_idx"].max())
    windows = [(frame[frame.time_idx <= last - 6], last - 11), (frame, last - 5)]
    held_out = [
        TimeSeriesDataSet.from_dataset(train, f, min_prediction_idx=i, stop_randomization=True)
        for f, i in windows
    ]
    return [
        train.to_dataloader(train=True, batch_size=64, num_workers=0),
        *(s.to_dataloader(train=False, batch_size=64, num_workers=0) for s in held_out),
    ]


def _transformer(seed: int) -> tuple[LightningModule, list[Any]]:
    from pytorch_forecasting import (
        GroupNormalizer,
        QuantileLoss,
        TemporalFusionTransformer,
        TimeSeriesDataSet,
    )

    frame = _sales(seed)
    cutoff = int(frame["time_idx"].max()) - 12
    train = TimeSeriesDataSet(
        frame[frame.time_idx <= cutoff],
        time_idx="time_idx",
        target="volume",
        group_ids=["agency", "sku"],
        min_encoder_length=6,
        max_encoder_length=12,
        min_prediction_length=1,
        max_prediction_length=6,
        static_categoricals=["agency", "sku"],
        static_reals=["avg_population_2017"],
        time_varying_known_categoricals=["special_days", "month"],
        time_varying_known_reals=["time_idx", "price_regular", "discount_in_percent"],
        time_varying_unknown_reals=["volume", "log_volume", "avg_volume_by_sku"],
        target_normalizer=GroupNormalizer(groups=["agency", "sku"], transformation="softplus"),
        add_relative_time_idx=True,
        add_target_scales=True,
        add_encoder_length=True,
    )
    module = TemporalFusionTransformer.from_dataset(
        train,
        learning_rate=0.03,
        hidden_size=8,
        attention_head_size=2,
        dropout=0.1,
        hidden_continuous_size=8,
        loss=QuantileLoss(),
        log_interval=10,
        optimizer="adam",
        reduce_on_plateau_patience=4,
    )
    return module, _series(frame, train)


def _nbeats(seed: int) -> tuple[LightningModule, list[Any]]:
    from pytorch_forecasting import NBeats, TimeSeriesDataSet

    frame = _sales(seed)
    frame["series"] = frame["agency"] + frame["sku"]
    cutoff = int(frame["time_idx"].max()) - 12
    train = TimeSeriesDataSet(
        frame[frame.time_idx <= cutoff],
        time_idx="time_idx",
        target="log_volume",
        group_ids=["series"],
        time_varying_unknown_reals=["log_volume"],
        max_encoder_length=12,
        max_prediction_length=6,
    )
    module = NBeats.from_dataset(
        train,
        learning_rate=3e-3,
        log_interval=10,
        log_val_interval=1,
        widths=[32, 64],
        backcast_loss_ratio=0.1,
        optimizer="adamw",
        weight_decay=1e-2,
    )
    return module, _series(frame, train)


def _regression(seed: int) -> list[Any]:
    """Return loaders of 100, 100 and 500 examples with noise that grows, as the toolbox wants its batches."""
    generator = torch.Generator().manual_seed(seed)
    loaders_, sizes = [], [100, 100, 500]
    for i, size in enumerate(sizes):
        x = torch.randn(size, 16, generator=generator)
        y = (
            (2 * x[:, :1]).sin()
            + x[:, 1:2]
            + (0.2 + 0.3 * x[:, :1].abs()) * torch.randn(size, 1, generator=generator)
        )
        examples = [{"input": a, "target": b} for a, b in zip(x, y, strict=True)]
        loaders_.append(DataLoader(examples, 25, shuffle=i == 0))  # type: ignore[arg-type]
    return loaders_


def _uncertain(name: str) -> Callable[[int], tuple[LightningModule, list[Any]]]:
    def make(seed: int) -> tuple[LightningModule, list[Any]]:
        import lightning_uq_box.uq_methods as methods

        outputs = 1 if name == "DeterministicRegression" else 2
        net = nn.Sequential(
            nn.Linear(16, 64),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(64, 64),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(64, outputs),
        )
        optimizer: Any = lambda p: torch.optim.Adam(p, lr=3e-3)  # noqa: E731
        if name == "DeterministicRegression":
            module = methods.DeterministicRegression(net, nn.MSELoss(), optimizer=optimizer)
        elif name == "MVERegression":
            module = methods.MVERegression(net, burnin_epochs=10, optimizer=optimizer)
        else:
            module = methods.MCDropoutRegression(
                net, 10, methods.NLL(), burnin_epochs=10, optimizer=optimizer
            )
        return module, _regression(seed)

    return make


PROJECTS = {
    "gpt": Project(
        make=_gpt,
        test="val_loss",
        epochs=12,
        options={"accumulate_grad_batches": 4, "gradient_clip_val": 1.0},
    ),
    "tft": Project(make=_transformer, test="val_loss", epochs=24, options={"gradient_clip_val": 0.1}),
    "nbeats": Project(make=_nbeats, test="val_loss", epochs=15, options={"gradient_clip_val": 0.1}),
    "regression": Project(make=_uncertain("DeterministicRegression"), test="val_loss", epochs=40, options={}),
    "mve": Project(make=_uncertain("MVERegression"), test="val_loss", epochs=40, options={}),
    "mc dropout": Project(make=_uncertain("MCDropoutRegression"), test="val_loss", epochs=40, options={}),
}
