"""LightningDataModules: real data in memory, most of it without a download."""

from lightning_nested.datamodules.digits import DigitsDataModule
from lightning_nested.datamodules.fashion_mnist import FashionMNISTDataModule
from lightning_nested.datamodules.gaussians import MixtureOfGaussiansDataModule
from lightning_nested.datamodules.in_memory import InMemoryDataModule, TensorBatches

__all__ = [
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "InMemoryDataModule",
    "MixtureOfGaussiansDataModule",
    "TensorBatches",
]
