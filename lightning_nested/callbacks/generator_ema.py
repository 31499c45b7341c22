"""Exponential moving average of one network, counted in that network's own updates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_nested.anneal import Anneal, ends, number
from lightning_nested.arguments import at_least, checked, fraction
from lightning_nested.callbacks.saved_average import read, rebuilt, saved_average, with_average
from lightning_nested.files import replacing
from lightning_nested.linalg.saved import require_keys
from lightning_nested.networks.spectral_norm import iterate_spectral_norms
from lightning_nested.trainer.use import OneFitCallback, Use

# Averaged vectors point almost in the right direction; more cost little, once for each evaluation.
_POWER_ITERATIONS = 10


@checked
class GeneratorEMA(OneFitCallback):
    """Average w̄ ← w̄ + (1 − d)(w − w̄) after each update of the generator; w̄ ← w up to and including ``start``.

    An update is one step of the optimizer that holds the generator's parameters, so discriminator steps,
    accumulated batches and epochs do not count. The average replaces the generator's weights during validation,
    test and predict. A checkpoint has it in the callback's state; the module's state keeps the raw weights, from
    which training continues.

    Lightning's own ``EMAWeightAveraging`` averages the whole module on the Trainer's clock, which counts the
    steps of both players.

    Args:
        decay: d, per update of the generator; an :class:`Anneal` moves it over these updates.
        start: Updates during which the average is a plain copy.
        buffers: ``"average"`` running statistics like weights, as the reference does, or ``"copy"`` them.
            Vectors of spectral norm, of this package or of torch, are matched to the averaged weights.
        module: Attribute of the LightningModule that is averaged.

    Raises:
        MisconfigurationException: If the attribute is not a module, or not exactly one optimizer holds it.
    """

    def __init__(
        self,
        decay: float | Anneal = 0.9999,
        *,
        start: int = 1000,
        buffers: Literal["average", "copy"] = "average",
        module: str = "generator",
    ) -> None:
        fraction(decay=ends(decay))
        at_least(0, start=start)
        self.decay, self.start, self.buffers, self.module = decay, start, buffers, module
        self.updates = 0
        self._average: nn.Module | None = None
        self._saved: dict[str, Tensor] | None = None
        # True once the average holds more than the network's initial values.
        self._begun = False
        # The network's own values, while it has the averaged ones.
        self._raw: dict[str, Tensor] | None = None
        # Of the Trainer that evaluates the averaged values.
        self._evaluation = Use()

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(module=self.module, decay=self.decay)

    @property
    def stands_in(self) -> bool:
        """Return True while the generator has the averaged values."""
        return self._raw is not None

    def averaged(self) -> nn.Module:
        """Return a copy of the network with averaged weights and buffers, in evaluation mode, for export.

        Raises:
            RuntimeError: No ``fit``, ``validate``, ``test`` or ``predict`` with this callback has begun; loading a
                checkpoint's state is not enough, see :meth:`generator_from_checkpoint`. Or the average is in the
                generator now, as during a validation.
        """
        if self._average is None:
            raise RuntimeError(
                "GeneratorEMA has no average yet. Got averaged() before fit, validate, test or predict; "
                "call one of them with ckpt_path=..., then averaged()."
            )
        if self.stands_in:
            raise RuntimeError("averaged() must not be called while the average stands in for the generator.")
        copy = _copied(self._average).eval()
        if self._saved is not None:
            copy.load_state_dict(self._saved)
        iterate_spectral_norms(copy, times=_POWER_ITERATIONS)
        return copy

    def export(self, path: str | Path) -> None:
        """Write averaged weights and buffers as a plain ``state_dict``, which loads without this package.

        Raises:
            RuntimeError: See :meth:`averaged`.
        """
        state = self.averaged().state_dict()
        with replacing(path) as file:
            torch.save(state, file)

    @classmethod
    def generator_from_checkpoint(
        cls,
        path: str | Path,
        generator: nn.Module | None = None,
        *,
        module: str = "generator",
        decay: float | Anneal | None = None,
    ) -> nn.Module:
        """Return the averaged network of a checkpoint on the CPU, in evaluation mode; needs no Trainer.

        Its ``state_dict()`` is plain. Only plain data and tensors are read from the file.

        Args:
            path: Checkpoint of a run with this callback.
            generator: The network, built as in training; it is copied. None: built from the configuration that a run
                of the command line leaves in its checkpoints, which imports the classes that the file names.
            module: Attribute that the callback averaged.
            decay: Decay of the callback, where several averaged this attribute.

        Raises:
            ValueError: If the average or the network is not there, or they do not fit.
        """
        path = Path(path)
        checkpoint = read(path)
        key = None if decay is None else cls(decay, module=module).state_key
        average = saved_average(checkpoint, path, module, key)
        network = rebuilt(checkpoint, path, module) if generator is None else _copied(generator)
        network = with_average(network.cpu(), average, path).requires_grad_(False).eval()
        with torch.no_grad():
            iterate_spectral_norms(network, times=_POWER_ITERATIONS)
        return network

    @contextmanager
    def swapped(self, pl_module: LightningModule) -> Iterator[None]:
        """Give the generator the averaged values, and restore its own on exit."""
        self._stand_in(None, pl_module)
        try:
            yield
        finally:
            self._step_back(pl_module)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        # The average of another run, unless one was loaded for this.
        if stage == "fit" and self.use.changed and self._saved is None:
            self._average, self._begun, self.updates = None, False, 0

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        network = self._network(pl_module)
        self._warn_if_missing(trainer)
        _, precision = self._matched(network), next(network.parameters()).dtype
        if precision in (torch.float16, torch.bfloat16):
            raise MisconfigurationException(
                "GeneratorEMA needs weights of float32 or more: in half precision an average stands still, since a "
                f"step of 1 - decay is below its resolution. Got {precision}; use precision='bf16-mixed'."
            )
        wanted = {id(p) for p in network.parameters() if p.requires_grad}
        owners = [
            o for o in trainer.optimizers if any(id(p) in wanted for g in o.param_groups for p in g["params"])
        ]
        if len(owners) != 1:
            raise MisconfigurationException(
                f"GeneratorEMA counts the steps of the one optimizer of {self.module!r}. "
                f"Got {len(owners)} optimizers that hold its parameters; give it one of its own."
            )

        def after_step(*_: object) -> None:
            self.updates += 1
            self.update(network)

        self.use.at_end(owners[0].register_step_post_hook(after_step).remove)

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Do one step of the recurrence; called after each step of the generator's optimizer."""
        averages = _tensors(self._matched(network))
        self._begun = True
        weight = 1.0 if self.updates <= self.start else 1.0 - number(self.decay, self.updates)
        for name, value in _tensors(network).items():
            averaged = value.is_floating_point() and (
                self.buffers == "average" or isinstance(value, nn.Parameter)
            )
            if averaged and weight < 1.0:
                averages[name].lerp_(value, weight)
            else:
                averages[name].copy_(value)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluation.begin(self, trainer, pl_module)
        self._stand_in(trainer, pl_module)
        self._evaluation.at_end(lambda: self._step_back(pl_module))

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluation.end(trainer)

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    @override
    def state_dict(self) -> dict[str, Any]:
        average = self._saved
        if self._average is not None and average is None:
            average = {name: value.clone() for name, value in self._average.state_dict().items()}
        return {"updates": self.updates, "average": average}

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the raw weights in the module's part of a checkpoint made during validation, as on SLURM's signal."""
        for name, value in (self._raw or {}).items():
            # Buffers that are not persistent have no place there.
            if f"{self.module}.{name}" in checkpoint["state_dict"]:
                checkpoint["state_dict"][f"{self.module}.{name}"] = value

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        require_keys(state_dict, ("updates", "average"), "GeneratorEMA")
        # Kept until the network, its device and its precision are known.
        self.updates, self._saved = state_dict["updates"], state_dict["average"]

    # Tensors made in validation are trained on afterwards.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _matched(self, network: nn.Module) -> nn.Module:
        """Return the average, on the network's device and in its precision; before any update the network's values."""
        if self._average is None:
            self._average = _copied(network).requires_grad_(False)
        self._average.to(next(network.parameters()))
        if self._saved is not None:
            self._average.load_state_dict(self._saved)
            self._saved, self._begun = None, True
        elif not self._begun:
            # setup came before a checkpoint was loaded into the network.
            self._average.load_state_dict(network.state_dict())
        return self._average

    def _stand_in(self, trainer: Trainer | None, pl_module: LightningModule) -> None:
        network = self._network(pl_module)
        average = self._matched(network)
        if trainer is not None:
            self._warn_if_missing(trainer)
        self._raw = {name: value.clone() for name, value in _tensors(network, shared=True).items()}
        _copy(_tensors(average), network)
        iterate_spectral_norms(network, times=_POWER_ITERATIONS)

    def _warn_if_missing(self, trainer: Trainer) -> None:
        if trainer.ckpt_path is not None and self._saved is None and not self._begun:
            rank_zero_warn(
                f"The checkpoint has no average of this callback. Got none for {self.state_key}; its raw weights are "
                "evaluated, and a new average begins with them. Give module and decay as in training."
            )

    def _step_back(self, pl_module: LightningModule) -> None:
        assert self._raw is not None
        _copy(self._raw, self._network(pl_module))
        self._raw = None

    def _network(self, pl_module: LightningModule) -> nn.Module:
        network = getattr(pl_module, self.module, None)
        if not isinstance(network, nn.Module):
            raise MisconfigurationException(
                f"GeneratorEMA(module={self.module!r}) must name a network of the LightningModule. "
                f"Got {type(network).__name__} in {type(pl_module).__name__}."
            )
        return network


@contextmanager
def averaged_generators(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Give generators the averages that the Trainer's callbacks keep, where they do not have them yet."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    with ExitStack() as stack:
        for callback in callbacks:
            if isinstance(callback, GeneratorEMA) and not callback.stands_in:
                stack.enter_context(callback.swapped(pl_module))
        yield


def _copied(network: nn.Module) -> nn.Module:
    """Return a deep copy. Torch's older spectral norm keeps a tensor with a graph, which ``deepcopy`` refuses."""
    with_graph = [
        v for m in network.modules() for v in vars(m).values() if isinstance(v, Tensor) and not v.is_leaf
    ]
    # deepcopy takes what it finds here for copied.
    return deepcopy(network, {id(value): value.detach().clone() for value in with_graph})


def _tensors(module: nn.Module, *, shared: bool = False) -> dict[str, Tensor]:
    """Return parameters and buffers by name; ``shared``: those of several names under each of them."""
    named = module.named_parameters, module.named_buffers
    return {name: value for items in named for name, value in items(remove_duplicate=not shared)}


def _copy(values: dict[str, Tensor], target: nn.Module) -> None:
    for name, value in _tensors(target).items():
        # Not seen by autograd: a graph may hold the target's parameters, which get their values back before its use.
        value.data.copy_(values[name])
