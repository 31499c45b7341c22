"""The inner optimizer of a NestedModule: the parameters that it holds, and tuned learning rates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_nested.hyperparameters import Hyperparameter
from lightning_nested.optim.step_dynamics import trainable


def named_parameters(
    module: nn.Module, optimizer: Optimizer, tuned: Mapping[int, str]
) -> dict[str, nn.Parameter]:
    """Return the parameters that the inner optimizer moves, by name.

    Raises:
        MisconfigurationException: One is a hyperparameter, not of the module, or of a lazy layer; or there are none.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    held = trainable(optimizer)
    lazy = [names.get(id(p), "one of no module") for p in held if is_lazy(p)]
    if lazy:
        raise MisconfigurationException(
            f"Inner parameters must have shapes when fit begins. Got lazy ones: {', '.join(lazy)}; call the module on "
            "a batch before, or give their layers in_features."
        )
    twice = [f"{names.get(id(p))} ({tuned[id(p)]!r})" for p in held if id(p) in tuned]
    if twice:
        raise MisconfigurationException(
            "A weight must be either a hyperparameter or an inner parameter. "
            f"Got both for {', '.join(twice)}; give the inner optimizer self.inner_parameters()."
        )
    unknown = [tuple(p.shape) for p in held if id(p) not in names]
    if unknown or not held:
        raise MisconfigurationException(
            "The inner optimizer must hold parameters of the module, at least one. "
            f"Got {f'others of shapes {unknown}' if unknown else 'none'}; give it self.inner_parameters()."
        )
    return {names[id(p)]: p for p in held}


def set_rates(
    module: LightningModule, hyperparameters: Iterable[Hyperparameter], optimizer: LightningOptimizer
) -> None:
    """Write tuned learning rates into the inner optimizer.

    Raises:
        MisconfigurationException: A scheduler sets the rate too.
    """
    for hyperparameter in hyperparameters:
        rates = hyperparameter.rates()
        if rates is None:
            continue
        if module.trainer.lr_scheduler_configs:
            raise MisconfigurationException(
                "Either LearningRate or a scheduler sets the inner optimizer's rate. Got both "
                f"{hyperparameter.name!r} and an inner scheduler; leave one out."
            )
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = float(rate.detach())
