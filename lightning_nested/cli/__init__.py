"""Command ``lightning-nested``."""

from lightning_nested.cli.main import main

__all__ = ["main"]
