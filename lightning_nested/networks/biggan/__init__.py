"""Generator and discriminator of BigGAN."""

from lightning_nested.networks.biggan.discriminator import Discriminator
from lightning_nested.networks.biggan.generator import Generator

__all__ = ["Discriminator", "Generator"]
