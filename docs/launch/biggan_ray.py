"""BigGAN on Ray Train: Ray places the workers, Lightning's DDP does the rest."""

import lightning.pytorch as pl
from lightning_nested import BigGAN, CIFAR10DataModule, GeneratorEMA
from ray.train import RunConfig, ScalingConfig
from ray.train.lightning import (
    RayDDPStrategy,
    RayLightningEnvironment,
    RayTrainReportCallback,
    prepare_trainer,
)
from ray.train.torch import TorchTrainer


def train() -> None:
    """What each worker runs."""
    trainer = prepare_trainer(
        pl.Trainer(
            accelerator="auto",
            devices="auto",
            strategy=RayDDPStrategy(),
            plugins=[RayLightningEnvironment()],
            callbacks=[GeneratorEMA(), RayTrainReportCallback()],
            enable_checkpointing=False,
            max_steps=125_000,
            precision="bf16-mixed",
        )
    )
    trainer.fit(BigGAN(), CIFAR10DataModule(batch_size=25))


if __name__ == "__main__":
    scaling = ScalingConfig(num_workers=2, use_gpu=True)
    TorchTrainer(
        train, scaling_config=scaling, run_config=RunConfig(name="biggan")
    ).fit()
