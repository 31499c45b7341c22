"""BigGAN on Ray Train: Ray places the workers, Lightning's DDP does the rest.

``--toy`` runs it to the end on two CPU processes of one machine, without data on disk.
"""

from __future__ import annotations

from argparse import ArgumentParser

import lightning.pytorch as pl
from lightning_nested import BigGAN, CIFAR10DataModule, GeneratorEMA
from lightning_nested.datamodules import SyntheticImagesDataModule
from lightning_nested.modules.gan import BigGANNetworks
from ray.train import Result, RunConfig, ScalingConfig
from ray.train.lightning import (
    RayDDPStrategy,
    RayLightningEnvironment,
    RayTrainReportCallback,
    prepare_trainer,
)
from ray.train.torch import TorchTrainer


def train(config: dict[str, bool]) -> None:
    """What each worker runs."""
    toy = config["toy"]
    trainer = prepare_trainer(
        pl.Trainer(
            accelerator="cpu" if toy else "auto",
            devices="auto",
            strategy=RayDDPStrategy(),
            plugins=[RayLightningEnvironment()],
            # Ray keeps a checkpoint of each epoch, the average of the generator in it.
            callbacks=[
                GeneratorEMA(start=0 if toy else 1000),
                RayTrainReportCallback(),
            ],
            enable_checkpointing=False,
            enable_progress_bar=not toy,
            logger=not toy,
            max_steps=4 if toy else 125_000,
            precision="32-true" if toy else "bf16-mixed",
        )
    )
    if toy:
        networks = BigGANNetworks(width=2, latent_dim=8)
        trainer.fit(
            BigGAN(networks), SyntheticImagesDataModule(train_size=64, batch_size=4)
        )
    else:
        trainer.fit(BigGAN(), CIFAR10DataModule(batch_size=25))


def main(arguments: list[str] | None = None) -> Result:
    """Run on two workers, one GPU each; with ``--toy`` one CPU core each."""
    parser = ArgumentParser()
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--storage", help="folder of results; Ray's own by default")
    options = parser.parse_args(arguments)
    return TorchTrainer(
        train,
        train_loop_config={"toy": options.toy},
        scaling_config=ScalingConfig(num_workers=2, use_gpu=not options.toy),
        run_config=RunConfig(name="biggan", storage_path=options.storage),
    ).fit()


if __name__ == "__main__":
    main()
