"""An exponential moving average of one network, counted in that network's own updates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_nested.networks.spectral_norm import spectral_norm_layers


class GeneratorEMA(Callback):
    """w̄ ← w̄ + (1 − d)(w − w̄) after each update of the generator; w̄ ← w up to and including update ``start``.

    An update is one step of the optimizer that holds the generator's parameters, so discriminator steps,
    accumulated batches and epochs do not count. The average takes the generator's place during validation,
    test and predict, and in :meth:`averaged`. It is in the callback's part of a checkpoint; the module's part
    keeps the raw weights, from which training goes on.

    Lightning's own ``EMAWeightAveraging`` averages the whole module on the Trainer's clock, which counts the
    steps of both players.

    Args:
        decay: d, per update of the generator.
        start: Updates during which the average is a plain copy.
        buffers: ``"average"`` running statistics like weights, as the reference does, or ``"copy"`` them.
            The vectors of spectral norm are brought to unit length and matched to the averaged weights.
        module: Attribute of the LightningModule that is averaged.

    Raises:
        ValueError: If the decay is not in [0, 1) or ``start`` is negative.
        MisconfigurationException: If the attribute is not a module, or not exactly one optimizer holds it.
    """

    def __init__(
        self,
        decay: float = 0.9999,
        *,
        start: int = 1000,
        buffers: Literal["average", "copy"] = "average",
        module: str = "generator",
    ) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must lie in [0, 1). Got {decay}.")
        if start < 0:
            raise ValueError(f"start must be at least 0. Got {start}.")
        if buffers not in ("average", "copy"):
            raise ValueError(f"buffers must be 'average' or 'copy'. Got {buffers!r}.")
        self.decay, self.start, self.buffers, self.module = decay, start, buffers, module
        self.updates = 0
        self._average: nn.Module | None = None
        self._saved: dict[str, Tensor] | None = None
        self._begun = False  # whether the average is of anything but the network's first values
        self._host: nn.Module | None = None  # the network whose place the average has now
        self._vectors: dict[str, tuple[Tensor, Tensor]] = {}
        self._hook: RemovableHandle | None = None

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(module=self.module, decay=self.decay)

    @property
    def stands_in(self) -> bool:
        """Whether the generator has the averaged values now."""
        return self._host is not None

    def averaged(self) -> nn.Module:
        """A copy of the network with averaged weights and buffers, in evaluation mode: for export.

        Raises:
            RuntimeError: Before ``fit`` or the loading of a checkpoint.
        """
        if self._average is None:
            raise RuntimeError(
                "GeneratorEMA has no average yet. Got averaged() before fit, validate, test or predict; "
                "call one of them with ckpt_path=..., then averaged()."
            )
        if self.stands_in:
            raise RuntimeError("averaged() must not be called while the average stands in for the generator.")
        copy = deepcopy(self._average).eval()
        if self._saved is not None:
            copy.load_state_dict(self._saved)
        _match_spectral_norm(copy)
        return copy

    @contextmanager
    def swapped(self, pl_module: LightningModule) -> Iterator[None]:
        """Inside, the generator has the averaged values."""
        self._stand_in(None, pl_module)
        try:
            yield
        finally:
            self._step_back(pl_module)

    # ---- lifecycle

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._average is None:
            self._average = deepcopy(self._network(pl_module)).requires_grad_(False)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        network = self._network(pl_module)
        _, precision = self._matched(network), next(network.parameters()).dtype
        if precision in (torch.float16, torch.bfloat16):
            raise MisconfigurationException(
                "GeneratorEMA needs weights of float32 or more: in half precision an average stands still, since a "
                f"step of 1 - decay is below its resolution. Got {precision}; use precision='bf16-mixed'."
            )
        wanted = {id(p) for p in network.parameters() if p.requires_grad}
        owners = [
            optimizer
            for optimizer in trainer.optimizers
            if any(id(p) in wanted for group in optimizer.param_groups for p in group["params"])
        ]
        if len(owners) != 1:
            raise MisconfigurationException(
                f"GeneratorEMA counts the steps of the one optimizer of {self.module!r}. "
                f"Got {len(owners)} optimizers that hold its parameters; give it one of its own."
            )

        def after_step(*_: object) -> None:
            self.updates += 1
            self.update(network)

        self._hook = owners[0].register_step_post_hook(after_step)

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """One step of the recurrence; called after each step of the generator's optimizer."""
        averages = _tensors(self._matched(network))
        self._begun = True
        weight = 1.0 if self.updates <= self.start else 1.0 - self.decay
        for name, value in _tensors(network).items():
            average = averages[name]
            copied = not average.is_floating_point() or (
                self.buffers == "copy" and not isinstance(value, nn.Parameter)
            )
            if copied or weight == 1.0:
                average.copy_(value)
            else:
                average.lerp_(value, weight)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stand_in(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step_back(pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stand_in(trainer, pl_module)

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step_back(pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stand_in(trainer, pl_module)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step_back(pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.stands_in:
            self._step_back(pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    @override
    def state_dict(self) -> dict[str, Any]:
        average = self._saved
        if self._average is not None and average is None:
            now = self._average if self._host is None else self._host
            average = {name: value.detach().clone() for name, value in now.state_dict().items()}
            if self._host is not None:
                for name, (u, v) in self._vectors.items():  # as they were before they were matched
                    prefix = f"{name}." if name else ""
                    average |= {f"{prefix}u": u.clone(), f"{prefix}v": v.clone()}
        return {"updates": self.updates, "average": average}

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """In a checkpoint made during validation, as SLURM's signal may ask for, raw weights are the module's."""
        if self._host is not None and self._average is not None:
            for name, value in self._average.state_dict().items():
                checkpoint["state_dict"][f"{self.module}.{name}"] = value.detach().clone()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Until the network is known, and where and how precise it is.
        self.updates, self._saved = state_dict["updates"], state_dict["average"]

    # ---- the exchange

    @torch.inference_mode(False)  # what is made in validation is trained on afterwards
    @torch.no_grad()
    def _matched(self, network: nn.Module) -> nn.Module:
        """The average, on the network's device and as precise; before any update the network's own values."""
        if self._average is None:
            raise RuntimeError(
                "GeneratorEMA needs setup before it is used. Got a callback without an average."
            )
        self._average.to(next(network.parameters()))
        if self._saved is not None:
            self._average.load_state_dict(self._saved)
            self._saved, self._begun = None, True
        elif not self._begun:  # setup came before a checkpoint was loaded into the network
            self._average.load_state_dict(network.state_dict())
        return self._average

    def _stand_in(self, trainer: Trainer | None, pl_module: LightningModule) -> None:
        network = self._network(pl_module)
        average = self._matched(network)
        if not self._begun and trainer is not None and trainer.ckpt_path is not None:
            rank_zero_warn(
                f"The checkpoint has no average of this callback. Got none for {self.state_key}; its raw weights are "
                "evaluated. Give module and decay as in training."
            )
        self._swap(network, average)
        self._host = network
        self._vectors = {
            name: (layer.u.clone(), layer.v.clone()) for name, layer in spectral_norm_layers(network).items()
        }
        _match_spectral_norm(network)

    def _step_back(self, pl_module: LightningModule) -> None:
        network, average = self._network(pl_module), self._average
        assert average is not None
        for name, layer in spectral_norm_layers(network).items():
            u, v = self._vectors[name]
            layer.u.copy_(u)
            layer.v.copy_(v)
        self._swap(network, average)
        self._host = None

    def _swap(self, network: nn.Module, average: nn.Module) -> None:
        here, there = _tensors(network), _tensors(average)
        for name, value in here.items():
            # The storages change places: no copy, and parameters stay those that the optimizer holds.
            value.data, there[name].data = there[name].data, value.data

    def _network(self, pl_module: LightningModule) -> nn.Module:
        network = getattr(pl_module, self.module, None)
        if not isinstance(network, nn.Module):
            raise MisconfigurationException(
                f"GeneratorEMA(module={self.module!r}) must name a network of the LightningModule. "
                f"Got {type(network).__name__} in {type(pl_module).__name__}."
            )
        return network


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _match_spectral_norm(network: nn.Module) -> None:
    """Averages of unit vectors are shorter than one: σ would be too small, and the network too large."""
    for layer in spectral_norm_layers(network).values():
        layer.iterate()
