"""Parts that the scripts share: their command line, and a Trainer without output."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from lightning.pytorch import Callback, Trainer


def script_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help is the script's docstring, line for line."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def silent_trainer(*callbacks: Callback, **options: Any) -> Trainer:
    """Return a Trainer that prints nothing, by default on the CPU, and writes no files of its own."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for name in ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"):
        options.setdefault(name, False)
    options.setdefault("accelerator", "cpu")
    return Trainer(callbacks=list(callbacks), **options)
