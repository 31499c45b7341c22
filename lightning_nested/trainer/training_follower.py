"""Tangents of a run with one loss and one optimizer, from the graph that its backward pass is about to use."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_nested.dynamics.tangents import Clip
from lightning_nested.dynamics.tracker import TrainingTracker
from lightning_nested.optim.step_dynamics import shaped
from lightning_nested.optim.update_rules import UpdateRule
from lightning_nested.trainer.fixed_batches import FixedBatches
from lightning_nested.trainer.follower import GRADIENT_HOOKS, Follower, has_gradient_hooks
from lightning_nested.trainer.isolation import untouched_buffers, without_trace
from lightning_nested.trainer.lightning import accumulates, logger_step, reduction, step_loss
from lightning_nested.trainer.random_stream import RandomStream
from lightning_nested.trainer.shared_backward import SharedBackward


class TrainingFollower(Follower):
    """Follows a run of one optimizer in automatic optimization, gradient accumulation and clipping included."""

    unit = "training step"
    tracker: TrainingTracker

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        *,
        fixed: bool,
        rule: UpdateRule | None,
        **options: Any,
    ) -> None:
        if len(trainer.optimizers) != 1:
            got = f"Got {len(trainer.optimizers)}."
            raise MisconfigurationException(f"LyapunovCallback follows one optimizer, or a GameModule. {got}")
        params = shaped(trainer.optimizers[0])
        super().__init__(trainer, module, trainer.optimizers, params, fixed=fixed, rule=rule)
        others = (getattr(c, "outer", None) for c in trainer.callbacks)  # type: ignore[attr-defined]
        if any(getattr(outer, "decays", ()) for outer in others):
            rank_zero_warn(
                "LyapunovCallback knows the optimizer's own weight decay. Got a HypergradientCallback that adds decays "
                "to the gradients: the exponents are those without them."
            )
        limit, by_value = trainer.gradient_clip_val, trainer.gradient_clip_algorithm == "value"
        self._clip = Clip(limit=float(limit), algorithm="value" if by_value else "norm") if limit else None
        self.tracker = TrainingTracker(params, reduce=reduction(trainer), **options)
        self.backward = SharedBackward()

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of the run now: ``strategy.setup_optimizers`` may replace it during training."""
        return self.trainer.optimizers[0]

    @override
    def begin_batch(self, batch: Any) -> None:
        if self.fixed is not None and not len(self.fixed):
            self.fixed.get(0, batch)
        params = shaped(self.optimizer)
        if not self.tracker.holds(params):
            self.tracker.follow(params)
        self.resume_tangents()

    @override
    def observe(self, loss: Tensor) -> None:
        if not self.is_open or not loss.requires_grad:
            return
        if has_gradient_hooks(self.tracker.params):
            self.stop(GRADIENT_HOOKS)
            return
        if self.fixed is not None and accumulates(self.trainer):
            return
        group = self.optimizer.param_groups[0]
        lr = -float(group["lr"]) if group.get("maximize", False) else float(group["lr"])
        # torch.utils.checkpoint runs the forward again in every product.
        unmoved = RandomStream.snapshot(self.trainer.strategy.root_device).replay()
        with untouched_buffers(self.module), unmoved:
            # A second derivative may pass NaN that a mask takes out: no anomaly of the run.
            with torch.autograd.set_detect_anomaly(False):
                if self.fixed is not None:
                    self.tracker.observe(self._evaluate(self.fixed), lr=lr)
                    return
                self.tracker.observe(loss, lr=lr * self.trainer.accumulate_grad_batches)
            self.backward.offer(self.module, loss, self.tracker.params, self.tracker.gradient)

    def _evaluate(self, fixed: FixedBatches) -> Tensor:
        """Return the training loss of the fixed batch, with the same masks every time and without side effects."""
        batch, stream = fixed.get(0, None)
        trainer, module = self.trainer, self.module
        with stream, without_trace(module, trainer), trainer.precision_plugin.train_step_context():
            loss = step_loss(trainer, module, "training_step", batch, 0)
        assert isinstance(loss, Tensor)
        return loss

    @override
    def advance(self, optimizer: Optimizer) -> bool:
        followed = self.is_open and self.tracker.has_observed
        return followed and self.tracker.advance(optimizer, self.rule, clip=self._clip)

    @override
    def end_batch(self) -> bool:
        self.is_open = False  # a backward pass in validation belongs to no step
        if not accumulates(self.trainer):
            self.steps += 1
        return False

    @override
    def logged_steps(self) -> int:
        return logger_step(self.trainer)

    @override
    def log(self, metrics: dict[str, float]) -> None:
        self.module.log_dict(metrics, on_step=True, on_epoch=False, batch_size=1)

    @override
    def put_back(self) -> None:
        self.backward.put_back()
