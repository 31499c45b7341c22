"""Options of the inner optimizer, tuned in a running Trainer: written before each step, and differentiated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer

from lightning_nested.dynamics.option_tangents import OptionTangents
from lightning_nested.dynamics.tangents import Clip
from lightning_nested.hyperparameters import OuterReport, OuterStep
from lightning_nested.hyperparameters.optimizer_options import set_options
from lightning_nested.linalg.first_derivatives import first_derivative
from lightning_nested.linalg.vectors import zeros_where_none
from lightning_nested.optim.registry import KNOWN
from lightning_nested.optim.step_dynamics import decoupled_rates, shaped
from lightning_nested.trainer.follower import has_gradient_hooks
from lightning_nested.trainer.isolation import add_note, untouched_buffers
from lightning_nested.trainer.lightning import reduction
from lightning_nested.trainer.outer_plan import OuterPlan
from lightning_nested.trainer.random_stream import RandomStream
from lightning_nested.trainer.shards import shards_parameters
from lightning_nested.trainer.shared_backward import SharedBackward
from lightning_nested.trainer.use import Use


class OptionTuner:
    """Tuned options of one run after another. Without any, every method returns at once.

    The optimizer's groups have tuned options only while a step is made: schedulers, checkpoints and monitors see the
    user's own. A window is the ``horizon`` steps before an outer step.

    Args:
        outer: Hyperparameters and their optimizer.
    """

    def __init__(self, outer: OuterStep) -> None:
        self.outer = outer
        self.horizon = max((option.horizon for option in outer.options), default=0)
        fields = [name for option in outer.options for name in option.fields]
        if len(set(fields)) < len(fields):
            names = [option.name for option in outer.options]
            raise ValueError(
                f"Each option of the optimizer must be tuned once. Got {', '.join(names)}; leave one out."
            )
        self._optimizer: Optimizer | None = None
        self._tangents: OptionTangents | None = None
        self._own: list[dict[str, Any]] = []  # the groups' own options, while a step is made
        # Values of the last step, and what they were computed from.
        self._known: tuple[Any, list[dict[str, float]]] = (None, [])
        self._dry = False
        self._open = self._due = False  # whether the coming step is in a window, and has an outer step
        self._saved: Mapping[str, Any] | None = None  # until there are tangents
        self._error: FloatingPointError | None = None  # of the window
        self._backward = SharedBackward()

    # ---- a run

    def begin(self, trainer: Trainer, module: LightningModule, use: Use) -> None:
        """Take the optimizer of a fit, before the hyperparameters are built.

        Raises:
            MisconfigurationException: Its step is not known, or the run changes it in a way that is not.
        """
        self._optimizer, self._tangents, self._open, self._own, self._known = (
            None,
            None,
            False,
            [],
            (None, []),
        )
        if not self.outer.options:
            return
        (optimizer,) = trainer.optimizers
        check_optimizer(trainer, module, optimizer, self.outer)
        try:
            for option in self.outer.options:
                option.attach_optimizer(optimizer)
                option.only_fall()
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        self._optimizer = optimizer
        handle = optimizer.register_step_post_hook(lambda *_: self.give_back())
        use.at_end(self._backward.put_back, handle.remove, self.give_back)

    @property
    def _built(self) -> bool:
        """True once the options have values; not before the shape of a lazy parameter is known."""
        return bool(self.outer.options) and all(option.built for option in self.outer.options)

    def _follow(self, trainer: Trainer) -> OptionTangents:
        """Return the tangents of the parameters that the optimizer moves now."""
        assert self._optimizer is not None
        params, found = shaped(self._optimizer), self._tangents
        if found is None or not found.holds(params):
            k = sum(t.numel() for option in self.outer.options for t in option.tensors.values())
            found = self._tangents = OptionTangents(params, k=k, reduce=reduction(trainer))
            if self._saved is not None and self._saved["frame"] is not None:
                found.load_state_dict(self._saved)
        self._saved = None
        return found

    # ---- a step

    def watch(self, trainer: Trainer, due: Callable[[int], bool], step: int) -> None:
        """Find whether the inner step ``step`` is in a window."""
        if not self.outer.options:
            return
        # A dry run may make an outer step that is not due, so each of its steps is a window.
        self._dry = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        if self._tangents is not None:
            # The step before may not have been made.
            self._tangents.forget_losses()
        self._due = self._dry or due(step)
        self._open = self._dry or any(due(step + ahead) for ahead in range(1, self.horizon + 1))
        if not (self._open or self._due):
            self.clear()

    def clear(self) -> None:
        """End a window without an outer step."""
        self._saved = self._error = None
        if self._tangents is not None:
            self._tangents.clear()

    def observe(self, trainer: Trainer, module: LightningModule, loss: Tensor, plan: OuterPlan) -> None:
        """Form the products that the window's later steps need, just before the backward pass of a loss.

        The plan's statistics are of that pass alone.
        """
        # An outer step comes first, and begins the window anew.
        tangents = self._follow(trainer) if self._open and self._built and not self._due else None
        if tangents is None or not tangents.needs_losses or not loss.requires_grad:
            return
        if has_gradient_hooks(tangents.params):
            raise MisconfigurationException(
                "A horizon of several steps needs gradients that nobody changes. Got a parameter with a hook of "
                "Tensor.register_hook; remove it, clip by Trainer(gradient_clip_val=...), or set horizon=1."
            )
        # torch.utils.checkpoint runs the forward again in every product.
        unmoved = RandomStream.snapshot(trainer.strategy.root_device).replay()
        # A second derivative may pass NaN that a mask takes out: no anomaly of the run.
        with plan.paused(), untouched_buffers(module), unmoved, torch.autograd.set_detect_anomaly(False):
            try:
                tangents.observe(loss)
            except RuntimeError as error:
                add_note(
                    error,
                    f"Needed for horizon={self.horizon} of {self.outer.options[0].name}; set horizon=1.",
                )
                raise
        # The hooks that gather statistics must see the pass itself.
        if plan.forecast is None:
            self._backward.offer(module, loss, tangents.params, tangents.gradient)

    def put(self) -> None:
        """Give the groups their tuned options for the coming step."""
        if self._own or self._optimizer is None or not self._built:
            return
        groups = self._optimizer.param_groups
        versions = [t._version for option in self.outer.options for t in option.tensors.values()]
        key = versions, [float(group["lr"]) for group in groups]
        if key != self._known[0]:
            with torch.no_grad():
                self._known = key, [{n: float(x) for n, x in each.items()} for each in self._values()]
        values = self._known[1]
        self._own = [set_options(group, each) for group, each in zip(groups, values, strict=True)]

    def give_back(self) -> None:
        """Give the groups their own options back."""
        self._backward.put_back()
        if self._optimizer is not None:
            for group, own in zip(self._optimizer.param_groups, self._own, strict=False):
                for key, value in own.items():
                    group[key] = group[key].fill_(value) if isinstance(value, Tensor) else value
        self._own = []

    def give_back_saved(self, checkpoint: Mapping[str, Any]) -> None:
        """Give a checkpoint that is written in the middle of a step the groups' own options."""
        if self._own and checkpoint.get("optimizer_states"):
            groups = checkpoint["optimizer_states"][0]["param_groups"]
            for group, own in zip(groups, self._own, strict=False):
                group.update(own)

    def _values(self) -> list[dict[str, Tensor]]:
        """Return the tuned options of each group, with their graph, at the user's options of this step."""
        assert self._optimizer is not None
        groups = self._optimizer.param_groups
        now = [{**group, **own} for group, own in zip(groups, self._own or [{}] * len(groups), strict=True)]
        merged: list[dict[str, Tensor]] = [{} for _ in now]
        for option in self.outer.options:
            for into, found in zip(merged, option.options(now), strict=True):
                into.update(found)
        return merged

    def shrink(self, trainer: Trainer, parameters: Mapping[str, Tensor]) -> None:
        """Push the window's derivatives through decoupled decays that are tuned, before they are applied."""
        optimizer = self._optimizer if self._open and self._built and self.outer.decays else None
        if optimizer is not None and decoupled_rates(optimizer):
            self._follow(trainer).shrink(optimizer, self._slopes(), self._decays(parameters))

    def advance(self, trainer: Trainer, parameters: Mapping[str, Tensor]) -> None:
        """Push the window's derivatives through the coming step; tuned decays are in the gradients already."""
        if not (self._open and self._built) or self._optimizer is None:
            return
        if self._dry:
            self.clear()
        limit, by_value = trainer.gradient_clip_val, trainer.gradient_clip_algorithm == "value"
        clip = Clip(limit=float(limit), algorithm="value" if by_value else "norm") if limit else None
        decays = {} if decoupled_rates(self._optimizer) else self._decays(parameters)
        try:
            self._follow(trainer).advance(self._optimizer, self._slopes(), clip=clip, decays=decays)
        except FloatingPointError as error:
            # The run goes on as it would, and the outer step is skipped.
            self._error = error

    def _decays(self, parameters: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """Return the tuned decays by the parameter's ``id``."""
        found: dict[int, Tensor] = {}
        for decay in self.outer.decays:
            for name, value in decay.decays().items():
                key = id(parameters[name])
                found[key] = value.detach() + found[key] if key in found else value.detach()
        return found

    def _slopes(self) -> list[dict[str, Tensor]]:
        """Return the derivative of each group's options by each tuned number, (k,)."""
        raw = [t for option in self.outer.options for t in option.tensors.values()]
        return [{name: _flat_gradient(value, raw) for name, value in each.items()} for each in self._values()]

    # ---- an outer step

    def hypergradient(
        self, outer_loss: Callable[[tuple[Tensor, ...]], Tensor], trainer: Trainer
    ) -> OuterReport:
        """Find the derivatives by the options at the current weights, and hold them; the window ends.

        Raises:
            FloatingPointError: The outer loss or a derivative is not finite.
        """
        error, self._error = self._error, None
        if error is not None:
            raise error
        tangents = self._follow(trainer)
        loss = outer_loss(tangents.params)
        found = tangents.along(zeros_where_none(first_derivative(loss, tangents.params), tangents.params))
        tangents.clear()
        raw = [t for option in self.outer.options for t in option.tensors.values()]
        pieces = torch.split(found, [t.numel() for t in raw])
        gradients = [piece.view_as(t).to(t.dtype) for piece, t in zip(pieces, raw, strict=True)]
        return self.outer.compute_options(gradients, loss, reduce=reduction(trainer))

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the derivatives of an open window, and what rates are relative to; empty where nothing is tuned."""
        if not self.outer.options:
            return {}
        return {
            "options": self._saved if self._tangents is None else self._tangents.state_dict(),
            "option_references": [list(option.references) for option in self.outer.options],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore from the callback's state once the parameters are known."""
        self._saved, self._tangents = state.get("options"), None
        for option, saved in zip(self.outer.options, state.get("option_references", ()), strict=False):
            # The optimizer's own rates are restored too.
            option.references = tuple(saved) if len(saved) == len(option.references) else option.references


def check_optimizer(
    trainer: Trainer, module: LightningModule, optimizer: Optimizer, outer: OuterStep
) -> None:
    """Refuse what changes the optimizer's step in a way that cannot be differentiated, or the tuned options.

    Raises:
        MisconfigurationException: With a cure.
    """
    who = outer.options[0].name
    if shards_parameters(trainer):
        raise MisconfigurationException(
            f"{who!r} is tuned through steps of whole parameters. Got {type(trainer.strategy).__name__}, which shards "
            f"them; use Trainer(strategy='ddp'), or leave {who!r} out."
        )
    kinds = [kind for kind, d in KNOWN.items() if d.rule is not None and d.rule.num_gradients == 1]
    known = [kind.__name__ for kind in kinds]
    for group in optimizer.param_groups:
        kind = type(optimizer).__name__
        if group.get("amsgrad", False):
            kind += "(amsgrad=True)"
        elif type(optimizer) in kinds:
            continue
        elif kind in known:
            kind = f"{type(optimizer).__module__}.{kind}"
        raise MisconfigurationException(
            f"{who!r} is tuned through the optimizer's own steps, which must be known: {', '.join(known)}, without "
            f"amsgrad. Got {kind}; use one of them, or leave {who!r} out."
        )
    if is_overridden("configure_gradient_clipping", module):
        raise MisconfigurationException(
            f"{who!r} is tuned through the Trainer's own clipping. Got {type(module).__name__} that overrides "
            "configure_gradient_clipping; use Trainer(gradient_clip_val=..., gradient_clip_algorithm=...) instead."
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise MisconfigurationException(
            f"{who!r} is tuned through gradients that are not scaled. Got precision='{trainer.precision}'; use "
            "'bf16-mixed' or '32-true'."
        )
    fields = {name for option in outer.options for name in option.fields}
    for config in trainer.lr_scheduler_configs:
        if fields - {"lr"} and getattr(config.scheduler, "cycle_momentum", False):
            raise MisconfigurationException(
                f"Either {who!r} or a scheduler sets the optimizer's momentum. Got both: "
                f"{type(config.scheduler).__name__} has cycle_momentum=True; give it cycle_momentum=False."
            )


def _flat_gradient(value: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Return the derivative of a number by the entries of tensors, (k,)."""
    found = zeros_where_none(
        torch.autograd.grad(value, tensors, allow_unused=True, retain_graph=True), tensors
    )
    return torch.cat([g.reshape(-1) for g in found])
