"""LightningDataModules: real data in memory, most of it without a download."""

from lightning_nested.datamodules.cifar10 import CIFAR10DataModule
from lightning_nested.datamodules.digits import DigitsDataModule
from lightning_nested.datamodules.experience import ExperienceDataModule
from lightning_nested.datamodules.fashion_mnist import FashionMNISTDataModule, MNISTDataModule
from lightning_nested.datamodules.gaussians import MixtureOfGaussiansDataModule
from lightning_nested.datamodules.in_memory import InMemoryDataModule, TensorBatches
from lightning_nested.datamodules.steps import StepsDataModule
from lightning_nested.datamodules.synthetic_images import SyntheticImagesDataModule
from lightning_nested.datamodules.tabular import TabularDataModule
from lightning_nested.datamodules.text import PennTreebankDataModule, PydocTextDataModule, TextDataModule
from lightning_nested.datamodules.text_sources import TextSourcesDataModule

__all__ = [
    "CIFAR10DataModule",
    "DigitsDataModule",
    "ExperienceDataModule",
    "FashionMNISTDataModule",
    "InMemoryDataModule",
    "MNISTDataModule",
    "StepsDataModule",
    "SyntheticImagesDataModule",
    "MixtureOfGaussiansDataModule",
    "PennTreebankDataModule",
    "PydocTextDataModule",
    "TabularDataModule",
    "TextDataModule",
    "TextSourcesDataModule",
    "TensorBatches",
]
