"""Averages of :class:`GeneratorEMA` in a checkpoint, read without a Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_nested.extras import require_package


def saved_average(
    checkpoint: Mapping[str, Any], path: Path, module: str, key: str | None
) -> dict[str, Tensor]:
    """Return the averaged state of an attribute.

    Args:
        checkpoint: Content of the file.
        path: Name of the file, for errors.
        module: Attribute of the LightningModule.
        key: State key of the callback; None: the only one of this attribute.

    Raises:
        ValueError: If there is none, or more than one.
    """
    states = {k: v for k, v in checkpoint.get("callbacks", {}).items() if k.startswith("GeneratorEMA{")}
    found = [k for k in states if f"'module': {module!r}" in k and key in (None, k)]
    if len(found) != 1 or states[found[0]]["average"] is None:
        known = "; ".join(sorted(states)) or "none"
        raise ValueError(
            f"The checkpoint must have one average of GeneratorEMA(module={module!r}). Got {len(found)} in {path}, "
            f"whose averages are: {known}. Name module=, and decay= where there are several."
        )
    average: dict[str, Tensor] = states[found[0]]["average"]
    return average


def rebuilt(checkpoint: Mapping[str, Any], path: Path, module: str) -> nn.Module:
    """Return the network of a module that the command line built, whose configuration is in the checkpoint.

    Raises:
        ValueError: If the configuration is not there.
    """
    if "_instantiator" not in checkpoint.get("hyper_parameters", {}):
        raise ValueError(
            f"A checkpoint has the weights of a network, not the network. Got {path}, whose module was not built by "
            f"the command line; pass the {module}, built as in training."
        )
    require_package("jsonargparse")
    whole: Any = LightningModule.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    network: nn.Module = getattr(whole, module)
    return network


def with_average(network: nn.Module, average: Mapping[str, Tensor], path: Path) -> nn.Module:
    """Load the averaged values into a network.

    Raises:
        ValueError: If they are of another network.
    """
    try:
        network.load_state_dict(average)
    except RuntimeError as error:
        raise ValueError(
            f"The network must be built as in training. Got a {type(network).__name__} that the average in {path} "
            f"does not fit: {error}"
        ) from error
    return network


def read(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint, plain data and tensors on the CPU."""
    found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return found
