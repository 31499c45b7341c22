"""Classification networks by name: our small ones, or any of torchvision's."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lightning_nested.arguments import checked
from lightning_nested.extras import require_package
from lightning_nested.networks.cnn import SmallCNN
from lightning_nested.networks.conditional_batch_norm import restored_modes
from lightning_nested.networks.mlp import MLP

# Without these options both return a tuple in train mode, and their initialization takes a minute.
_NO_AUXILIARY_HEADS = {"aux_logits": False, "init_weights": False}


@checked
def build_network(
    name: str,
    *,
    num_classes: int,
    input_shape: tuple[int, int, int],
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Return a newly initialized classifier.

    Args:
        name: ``"mlp"``, ``"cnn"`` or a classification network of torchvision, such as ``"resnet18"``.
        num_classes: width of the output.
        input_shape: channels, height and width of an image.
        options: further arguments of the network's constructor, such as ``{"hidden": [300, 100]}``.

    Returns:
        A module from ``(batch, *input_shape)`` to ``(batch, num_classes)``. In a torchvision network the
        first convolution is replaced if ``input_shape`` has other channels than it expects.

    Raises:
        ValueError: for an unknown name (with close matches), unknown options, or a network that does not take
            images of this shape.

    Example:
        >>> network = build_network("cnn", num_classes=10, input_shape=(1, 8, 8), options={"width": 4})
        >>> tuple(network(torch.zeros(2, 1, 8, 8)).shape)
        (2, 10)
    """
    key = name.lower()
    chosen = dict(options or {})
    try:
        if key == "mlp":
            return MLP(math.prod(input_shape), num_classes=num_classes, **chosen)
        if key == "cnn":
            return SmallCNN(input_shape[0], num_classes=num_classes, **chosen)
        defaults = _NO_AUXILIARY_HEADS if key in ("googlenet", "inception_v3") else {}
        return _torchvision_network(key, num_classes, input_shape, {**defaults, **chosen})
    except TypeError as error:
        # An option the constructor does not have; Python's message names it.
        raise ValueError(
            f"The network_options of {name!r} must be its constructor's arguments. Got {chosen}: {error}."
        ) from error


def _torchvision_network(
    name: str, num_classes: int, input_shape: tuple[int, int, int], options: dict[str, Any]
) -> nn.Module:
    require_package("torchvision")
    import torchvision.models  # here, because it costs a second that the small networks need not pay

    known = torchvision.models.list_models(module=torchvision.models)  # classification only
    if name not in known:
        close = ", ".join(difflib.get_close_matches(name, ["mlp", "cnn", *known], n=5, cutoff=0.5))
        hint = f"Close matches: {close}." if close else "For all: torchvision.models.list_models()."
        raise ValueError(
            "`network` must be 'mlp', 'cnn', a classification network of torchvision, or an nn.Module. "
            f"Got {name!r}. {hint}"
        )
    network: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
    _match_channels(network, input_shape[0])
    try:
        # In evaluation mode, so that the trial changes neither batch-norm statistics nor the random state.
        with torch.no_grad(), restored_modes(network):
            network.eval()(torch.zeros(1, *input_shape))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ValueError(
            f"Network {name!r} must accept images of `input_shape`. Got {tuple(input_shape)}: {error}. "
            "Take larger images, a smaller network (such as 'cnn' or 'resnet18'), or give its own option for "
            "the size of images (`image_size` for vision transformers)."
        ) from error
    return network


def _match_channels(network: nn.Module, channels: int) -> None:
    first = next((m for m in network.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None or (first.in_channels != channels and first.groups != 1):
        raise ValueError(
            f"The first convolution of {type(network).__name__} must be an ordinary one to be given {channels} "
            "input channels. Got another kind. Pass the network itself (an nn.Module) instead of its name."
        )
    if first.in_channels != channels:
        first.in_channels = channels
        first.weight = nn.Parameter(torch.empty(first.out_channels, channels, *first.kernel_size))
        # He initialization by fan-out, torchvision's usual choice: its variance does not depend on the input
        # channels, so the new weights start at the scale of the old ones.
        nn.init.kaiming_normal_(first.weight, mode="fan_out", nonlinearity="relu")
        if first.bias is not None:
            nn.init.zeros_(first.bias)
