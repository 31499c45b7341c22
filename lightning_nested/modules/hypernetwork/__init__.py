"""A network trained together with its response to hyperparameters."""

from lightning_nested.modules.hypernetwork.module import HypernetworkModule
from lightning_nested.modules.hypernetwork.options import ResponseMonitor, ResponseOptions

__all__ = ["HypernetworkModule", "ResponseMonitor", "ResponseOptions"]
