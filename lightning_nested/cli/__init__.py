"""The ``lightning-nested`` command."""

from lightning_nested.cli.main import main

__all__ = ["main"]
