"""The top Lyapunov exponents of a running training, without touching it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_nested.callbacks.fitting import reduction, refuse_strategy
from lightning_nested.callbacks.isolation import RandomStream, without_trace
from lightning_nested.dynamics.lyapunov import kaplan_yorke_dimension
from lightning_nested.dynamics.tracker import TrainingTracker
from lightning_nested.dynamics.update_map import known_rule
from lightning_nested.dynamics.update_rules import UpdateRule

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class LyapunovCallback(Callback):
    """Measures how fast small differences of the weights grow in the training that runs.

    The training loss comes with its graph from ``on_before_backward``: k products with its Hessian push k tangents of
    parameters and optimizer buffers through every step, exactly as the optimizer moves the weights. There is no
    second forward; BatchNorm, dropout and random numbers are those of the run, which is bit for bit the same with this
    callback as without. In a data-parallel run products are averaged, so that exponents are those of the global batch.

    Exponents are in nats per optimizer step. A positive first one means that nearby runs separate (chaos); negative
    ones that they merge. Logged as ``lyapunov/local_i`` (last window), ``lyapunov/running_i`` (mean so far),
    ``lyapunov/kaplan_yorke`` (dimension, at most k), ``lyapunov/alignment`` and ``lyapunov/edge_of_chaos`` (1 while the
    smoothed first local exponent is positive; ``crossings`` lists the steps at which that changed).

    Args:
        k: Number of exponents. Each costs about one backward pass a step.
        every_n_steps: Follow every n-th step only; between, tangents wait. An estimate from a sample of steps then.
        warmup_steps: Steps before the first.
        orthonormalize_every: Followed steps between orthonormalisations.
        align: Lanczos iterations at the first step, so that the frame begins with the directions that a step
            stretches most; 0: random.
        fixed_batch: Follow the loss of the first batch instead of the batches of the run: one more forward a step,
            always with the same dropout masks.
        rule: A re-statement of an optimizer that :func:`update_map` does not know.
        smoothing: Windows over which the first local exponent is averaged before its sign is read.
        figure: Draw ``lyapunov.png`` into the log folder when ``fit`` ends.

    Raises:
        MisconfigurationException: In ``setup``: manual optimization, gradient clipping, sharding strategies, fp16.

    Benettin, Galgani, Giorgilli & Strelcyn (1980), Meccanica 15:9-30.
    """

    def __init__(
        self,
        k: int = 1,
        *,
        every_n_steps: int = 1,
        warmup_steps: int = 0,
        orthonormalize_every: int = 1,
        align: int = 20,
        fixed_batch: bool = False,
        rule: UpdateRule | None = None,
        smoothing: int = 20,
        figure: bool = False,
    ) -> None:
        for name, value, least in (
            ("k", k, 1),
            ("every_n_steps", every_n_steps, 1),
            ("warmup_steps", warmup_steps, 0),
            ("orthonormalize_every", orthonormalize_every, 1),
            ("align", align, 0),
            ("smoothing", smoothing, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}. Got {value}.")
        self.k, self.every_n_steps, self.warmup_steps = k, every_n_steps, warmup_steps
        self.orthonormalize_every, self.align, self.fixed_batch = orthonormalize_every, align, fixed_batch
        self.rule, self.smoothing, self.figure_wanted = rule, smoothing, figure
        self.tracker: TrainingTracker | None = None
        self.steps = 0
        self.windows: list[int] = []  # the step at which each window ended
        self.crossings: list[int] = []
        self._chaotic: bool | None = None
        self._saved: dict[str, Any] | None = None
        self._batch: tuple[Any, int, RandomStream] | None = None
        self._first: tuple[Any, int, RandomStream] | None = None

    # ---- what users read

    @property
    def exponents(self) -> Tensor:
        """(k,), the running exponents, largest first, nats per optimizer step."""
        if self.tracker is None:
            raise RuntimeError("Exponents are there once fit has begun. Got a callback that no fit has used.")
        return self.tracker.running()

    @property
    def local_exponents(self) -> Tensor:
        """(windows, k), the exponents of each window alone."""
        growth = self.tracker.growth if self.tracker is not None else []
        return torch.stack(growth) / self.orthonormalize_every if growth else torch.empty(0, self.k)

    def should_follow(self, trainer: Trainer, step: int) -> bool:
        """Whether step ``step``, counted from 0, is followed; must agree on all processes."""
        return step >= self.warmup_steps and (step - self.warmup_steps) % self.every_n_steps == 0

    def draw(self) -> Figure:
        """Local and running exponents against the step, with the crossings of zero."""
        from lightning_nested.callbacks.lyapunov_figure import lyapunov_figure

        return lyapunov_figure(self.windows, self.local_exponents, self.crossings, self.smoothing)

    # ---- lifecycle

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        name = type(pl_module).__name__
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"LyapunovCallback works with automatic optimization. Got {name} with automatic_optimization=False; "
                "use lightning_nested.dynamics.TrainingTracker in a loop of your own, or update_map for a game."
            )
        refuse_strategy(trainer, "LyapunovCallback", static_graph=False)
        if trainer.gradient_clip_val:
            raise MisconfigurationException(
                "LyapunovCallback follows the optimizer's step on the loss's own gradient. Got "
                f"gradient_clip_val={trainer.gradient_clip_val}; measure without clipping."
            )
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise MisconfigurationException(
                "LyapunovCallback needs gradients that are not scaled. Got precision='16-mixed'; use 'bf16-mixed' or "
                "'32-true'."
            )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if len(trainer.optimizers) != 1:
            raise MisconfigurationException(
                f"LyapunovCallback follows one optimizer. Got {len(trainer.optimizers)}; use update_map for games."
            )
        (optimizer,) = trainer.optimizers
        if self.rule is None:
            for group in optimizer.param_groups:
                known_rule(optimizer, group)  # raises for an optimizer that is not known
        params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        self.tracker = TrainingTracker(
            params,
            k=self.k,
            align=self.align,
            orthonormalize_every=self.orthonormalize_every,
            reduce=reduction(trainer),
        )
        if self._saved is not None:
            self._restore(self._saved)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.fixed_batch and self._first is None:
            self._first = (batch, batch_idx, RandomStream.snapshot(trainer.strategy.root_device))

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self.tracker is None or not self.should_follow(trainer, self.steps):
            return
        if self._first is not None:
            if trainer.fit_loop.epoch_loop._should_accumulate():
                return
            loss = self._evaluate(trainer, pl_module, *self._first)
        self.tracker.observe(loss, lr=float(trainer.optimizers[0].param_groups[0]["lr"]))

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if self.tracker is None or not self.should_follow(trainer, self.steps):
            return
        try:
            if self.tracker.advance(optimizer, self.rule):
                self.windows.append(self.steps)
                self._log(pl_module)
        except FloatingPointError as error:
            rank_zero_warn(f"LyapunovCallback stops at step {self.steps}: {error}")
            self.warmup_steps = 2**62  # the run itself is none of this callback's business

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            self.steps += 1

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.figure_wanted and self.windows:
            self._save_figure(Path(trainer.log_dir or trainer.default_root_dir))

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(
            k=self.k, fixed_batch=self.fixed_batch, every_n_steps=self.every_n_steps
        )

    @override
    def state_dict(self) -> dict[str, Any]:
        if self.tracker is None:
            return dict(self._saved) if self._saved is not None else {}
        return {
            "tracker": self.tracker.state_dict(),
            "steps": self.steps,
            "windows": self.windows,
            "crossings": self.crossings,
            "chaotic": self._chaotic,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        self._saved = state_dict
        if self.tracker is not None:
            self._restore(state_dict)

    # ---- inside

    def _restore(self, state: Mapping[str, Any]) -> None:
        assert self.tracker is not None
        self.tracker.load_state_dict(state["tracker"])
        self.steps, self.windows = state["steps"], list(state["windows"])
        self.crossings, self._chaotic = list(state["crossings"]), state["chaotic"]
        self._saved = None

    def _evaluate(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, start: RandomStream
    ) -> Tensor:
        """The training loss of the fixed batch, with its first masks and without trace."""
        with start.replay(), without_trace(pl_module, trainer), trainer.precision_plugin.train_step_context():
            hook = partial(call._call_lightning_module_hook, trainer, "training_step", pl_module=pl_module)
            output = hook(batch, batch_idx)
        loss = output["loss"] if isinstance(output, Mapping) else output
        assert isinstance(loss, Tensor)
        return loss

    def _log(self, pl_module: LightningModule) -> None:
        assert self.tracker is not None
        local, running = self.tracker.local(), self.tracker.running()
        recent = torch.stack(self.tracker.growth[-self.smoothing :])[:, 0]
        chaotic = bool(recent.mean() > 0)
        if self._chaotic is not None and chaotic != self._chaotic and len(recent) == self.smoothing:
            self.crossings.append(self.steps)
        if len(recent) == self.smoothing or self._chaotic is None:
            self._chaotic = chaotic
        metrics = {f"lyapunov/local_{i}": float(v) for i, v in enumerate(local)}
        metrics |= {f"lyapunov/running_{i}": float(v) for i, v in enumerate(running)}
        metrics["lyapunov/kaplan_yorke"] = float(kaplan_yorke_dimension(running))
        metrics["lyapunov/edge_of_chaos"] = float(chaotic)
        if len(self.windows) == 1:
            metrics["lyapunov/alignment"] = self.tracker.alignment
        pl_module.log_dict(metrics, on_step=True, on_epoch=False, batch_size=1)

    @rank_zero_only
    def _save_figure(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.draw().savefig(folder / "lyapunov.png", dpi=110)
