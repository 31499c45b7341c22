"""Nested optimization inside the Lightning Trainer you already have."""

from lightning_nested import _clock as _clock  # first: the clock starts before anything heavy is imported

__version__ = "0.1.0"
