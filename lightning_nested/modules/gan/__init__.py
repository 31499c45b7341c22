"""Generative adversarial networks."""

from lightning_nested.modules.gan.biggan import BigGAN
from lightning_nested.modules.gan.biggan_options import BigGANNetworks, BigGANObjective, Execution, Sampling
from lightning_nested.modules.gan.module import GANModule

__all__ = ["BigGAN", "BigGANNetworks", "BigGANObjective", "Execution", "Sampling", "GANModule"]
