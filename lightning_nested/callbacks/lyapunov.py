"""The top Lyapunov exponents of a running training, without touching it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_nested.dynamics.lyapunov import kaplan_yorke_dimension
from lightning_nested.dynamics.tangents import Clip, Tangents
from lightning_nested.dynamics.tracker import TrainingTracker
from lightning_nested.optim.registry import known_rule
from lightning_nested.optim.step_dynamics import trainable
from lightning_nested.optim.update_rules import UpdateRule
from lightning_nested.trainer.fixed_batches import FixedBatches
from lightning_nested.trainer.game_follower import GameFollower
from lightning_nested.trainer.isolation import untouched_buffers, without_trace
from lightning_nested.trainer.joint_losses import is_game, refuse_other_modules
from lightning_nested.trainer.lightning import reduction, step_arguments
from lightning_nested.trainer.random_stream import RandomStream
from lightning_nested.trainer.requirements import refuse_strategy
from lightning_nested.trainer.shared_backward import SharedBackward

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_HOOKS = (
    "LyapunovCallback needs gradients that nobody changes: a hook of Tensor.register_hook would act on its products "
    "too, and the exponents be wrong. Got a parameter with such a hook; remove it, or clip by "
    "Trainer(gradient_clip_val=...)."
)


def has_gradient_hooks(params: Iterable[Tensor]) -> bool:
    """Whether a gradient of these goes through hooks of ``Tensor.register_hook``."""
    return any(p._backward_hooks for p in params)


class LyapunovCallback(Callback):
    """Measures how fast small differences of the weights grow in the training that runs.

    The training loss comes with its graph from ``on_before_backward``: k products with its Hessian push k tangents of
    parameters and optimizer buffers through every step, exactly as the optimizer moves the weights, clipping
    included. There is no second forward, and the gradient that the products come from serves the run as well where that
    changes no bit (see :class:`SharedBackward`). BatchNorm, dropout and random numbers are those of the run, which is
    bit for bit the same with this callback as without. In a data-parallel run products are averaged, so that exponents
    are those of the global batch.

    Of a :class:`GameModule` all players are followed together, whether they step at once or in turns; their losses are
    evaluated once more before each step, with their graph to every player and without trace. A step is then a round,
    a game update.

    Exponents are in nats per optimizer step. A positive first one means that nearby runs separate (chaos); negative
    ones that they merge. Logged as ``lyapunov/local_i`` (last window), ``lyapunov/running_i`` (mean so far),
    ``lyapunov/kaplan_yorke`` (dimension, at most k), ``lyapunov/alignment`` and ``lyapunov/edge_of_chaos`` (1 while the
    smoothed first local exponent is positive; ``crossings`` lists the steps at which that changed). Loggers get
    the last window before each of the Trainer's ``log_every_n_steps``, monitors that before an epoch's end;
    ``local_exponents`` has all.

    Parameters that are frozen or unfrozen in training change the space: tangents begin anew there. Hooks of
    ``Module.register_full_backward_hook`` run in products as well, so one that counts its calls counts those.

    Args:
        k: Number of exponents. Each costs about one backward pass a step.
        every_n_steps: Follow every n-th step only; between, tangents wait. An estimate from a sample of steps then.
        warmup_steps: Steps before the first.
        orthonormalize_every: Followed steps between orthonormalisations.
        align: Lanczos iterations (of a game: Arnoldi) at the first step, so that the frame begins with the directions
            that a step stretches most; 0: random.
        fixed_batch: Follow the loss of the first batch instead of the batches of the run, with the same dropout masks
            every time: one more forward a step.
        window: How windows are averaged: ``"uniform"``, or ``"bump"``, which leaves out how the run began and ended
            and resolves turning directions, see :func:`lyapunov_exponents`.
        rule: A re-statement of an optimizer that :func:`update_map` does not know.
        smoothing: Windows over which the first local exponent is averaged before its sign is read.
        figure: Draw ``lyapunov.png`` into the log folder when ``fit`` ends.

    Raises:
        MisconfigurationException: In ``setup``: manual optimization that is no game, an overridden
            ``configure_gradient_clipping``, sharding strategies, fp16. At the start of ``fit``: parameters with
            gradient hooks; a hook that comes later ends the measurement with a warning.
        ValueError: An argument is out of range; at the start of ``fit`` an optimizer is not known.

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
        window: Literal["uniform", "bump"] = "uniform",
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
        if window not in ("uniform", "bump"):
            raise ValueError(f"window must be 'uniform' or 'bump'. Got {window!r}.")
        self.k, self.every_n_steps, self.warmup_steps = k, every_n_steps, warmup_steps
        self.orthonormalize_every, self.align, self.fixed_batch = orthonormalize_every, align, fixed_batch
        self.window: Literal["uniform", "bump"] = window
        self.rule, self.smoothing, self.figure_wanted = rule, smoothing, figure
        self.steps = 0
        self.windows: list[int] = []  # the step at which each window ended
        self.crossings: list[int] = []
        self.tracker: Tangents | None = None
        self._training: TrainingTracker | None = None  # the tracker, of a single loss
        self._game: GameFollower | None = None  # what has it, of a game
        self._clip: Clip | None = None
        self._fixed: FixedBatches | None = None
        self._options: dict[str, Any] = {}  # of the tracker
        self._backward = SharedBackward()
        self._chaotic: bool | None = None
        self._stopped = False
        self._saved: dict[str, Any] | None = None

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
        if self.tracker is None:
            return torch.empty(0, self.k)
        return self.tracker.growth / self.orthonormalize_every

    def should_follow(self, trainer: Trainer, step: int) -> bool:
        """Whether step ``step``, counted from 0, is followed; must agree on all processes."""
        return step >= self.warmup_steps and (step - self.warmup_steps) % self.every_n_steps == 0

    def draw(self) -> Figure:
        """Local and running exponents against the step, with the crossings of zero."""
        from lightning_nested.figures.lyapunov import lyapunov_figure

        unit = "training step" if self._game is None else "game update"
        return lyapunov_figure(self.windows, self.local_exponents, self.crossings, self.smoothing, unit=unit)

    # ---- lifecycle

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.tracker = self._training = self._game = None  # of an earlier fit
        refuse_other_modules(pl_module)
        refuse_strategy(trainer, "LyapunovCallback", static_graph=False)
        if is_overridden("configure_gradient_clipping", pl_module):
            raise MisconfigurationException(
                "LyapunovCallback differentiates the Trainer's own clipping. Got "
                f"{type(pl_module).__name__} that overrides configure_gradient_clipping; use "
                "Trainer(gradient_clip_val=..., gradient_clip_algorithm=...) instead."
            )
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise MisconfigurationException(
                "LyapunovCallback needs gradients that are not scaled. Got precision='16-mixed'; use 'bf16-mixed' or "
                "'32-true'."
            )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._backward, self._stopped = SharedBackward(), False
        self.steps, self.windows, self.crossings, self._chaotic = 0, [], [], None
        self._fixed = FixedBatches(trainer) if self.fixed_batch else None
        self._options = {
            "k": self.k,
            "align": self.align,
            "orthonormalize_every": self.orthonormalize_every,
            "window": self.window,
        }
        if is_game(pl_module):  # its players meet their optimizers in the module's own hook, after this
            return
        if len(trainer.optimizers) != 1:
            raise MisconfigurationException(
                f"LyapunovCallback follows one optimizer, or a GameModule. Got {len(trainer.optimizers)}."
            )
        (optimizer,) = trainer.optimizers
        if self.rule is None:
            for group in optimizer.param_groups:
                known_rule(optimizer, group)  # raises for an optimizer that is not known
        others = (getattr(c, "outer", None) for c in trainer.callbacks)  # type: ignore[attr-defined]
        if any(getattr(outer, "decays", ()) for outer in others):
            rank_zero_warn(
                "LyapunovCallback knows the optimizer's own weight decay. Got a HypergradientCallback that adds decays "
                "to the gradients: the exponents are those without them."
            )
        limit = trainer.gradient_clip_val
        self._clip = None
        if limit:
            by_value = trainer.gradient_clip_algorithm == "value"
            self._clip = Clip(limit=float(limit), algorithm="value" if by_value else "norm")
        params = trainable(optimizer)
        if has_gradient_hooks(params):
            raise MisconfigurationException(_HOOKS)
        self._training = TrainingTracker(params, reduce=reduction(trainer), **self._options)
        self.tracker = self._training
        if self._saved is not None:
            self._restore(self._saved)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_game(pl_module):
            if has_gradient_hooks(pl_module.parameters()):
                raise MisconfigurationException(_HOOKS)
            self._game = GameFollower(trainer, pl_module, fixed=self._fixed, rule=self.rule, **self._options)
            self.tracker = self._game.tracker
            if self._saved is not None:
                self._restore(self._saved)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._game is not None:
            self.steps = self._game.module.game_updates
            self._game.open = not self._stopped and self.should_follow(trainer, self.steps)
            return
        if self._fixed is not None and not len(self._fixed):
            self._fixed.get(0, batch)
        now = trainable(trainer.optimizers[0])
        held = self._training.params if self._training is not None else ()
        if len(now) != len(held) or any(p is not q for p, q in zip(now, held, strict=True)):
            assert self._training is not None
            self._training.follow(now)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if (
            self._training is None
            or self._stopped
            or not loss.requires_grad
            or not self.should_follow(trainer, self.steps)
        ):
            return
        if has_gradient_hooks(self._training.params):
            rank_zero_warn(f"LyapunovCallback stops at step {self.steps}: {_HOOKS}")
            self._stopped = True
            return
        group = trainer.optimizers[0].param_groups[0]
        lr = -float(group["lr"]) if group.get("maximize", False) else float(group["lr"])
        if self._fixed is not None and trainer.fit_loop.epoch_loop._should_accumulate():
            return
        # torch.utils.checkpoint runs the forward again in every product.
        unmoved = RandomStream.snapshot(trainer.strategy.root_device).replay()
        with self._stopping(), untouched_buffers(pl_module), unmoved:
            # A second derivative may pass NaN that a mask takes out: no anomaly of the run.
            with torch.autograd.set_detect_anomaly(False):
                if self._fixed is not None:
                    self._training.observe(self._evaluate(trainer, pl_module, self._fixed), lr=lr)
                    return
                self._training.observe(loss, lr=lr * trainer.accumulate_grad_batches)
            self._backward.offer(pl_module, loss, self._training.params, self._training.gradient)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._backward.put_back()

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if self._stopped:
            return
        if self._game is not None:
            self._game.advance(optimizer)
        elif self._training is not None and self._training.has_observed:
            with self._stopping():
                if self._training.advance(optimizer, self.rule, clip=self._clip):
                    self._end_window(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._game is not None:
            follows, self._game.open = self._game.open, False
            if follows and pl_module.game_updates != self.steps:
                with self._stopping():
                    if self._game.end_round():
                        self._end_window(trainer, pl_module)
        elif not trainer.fit_loop.epoch_loop._should_accumulate():
            self.steps += 1

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.windows:
            pl_module.log_dict(self._metrics(), logger=False, sync_dist=trainer.world_size > 1)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._let_go()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._let_go()
        if self.figure_wanted and self.windows:
            self._save_figure(Path(trainer.log_dir or trainer.default_root_dir))

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(
            k=self.k,
            fixed_batch=self.fixed_batch,
            every_n_steps=self.every_n_steps,
            warmup_steps=self.warmup_steps,
            orthonormalize_every=self.orthonormalize_every,
            align=self.align,
            window=self.window,
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
            "fixed": self._fixed.state_dict() if self._fixed is not None else None,
            "call": self._game.call if self._game is not None else 0,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        self._saved = state_dict
        if self.tracker is not None:
            self._restore(state_dict)

    # ---- inside

    def _let_go(self) -> None:
        self._backward.put_back()
        if self._game is not None:
            self._game.put_back()

    def _restore(self, state: Mapping[str, Any]) -> None:
        assert self.tracker is not None
        self.tracker.load_state_dict(state["tracker"])
        self.steps, self.windows = state["steps"], list(state["windows"])
        self.crossings, self._chaotic = list(state["crossings"]), state["chaotic"]
        if self._fixed is not None and state["fixed"] is not None:
            self._fixed.load_state_dict(state["fixed"])
        if self._game is not None:
            self._game.call = state["call"]
        self._saved = None

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """Tangents that are not finite end the measurement: the run itself is none of this callback's business."""
        try:
            yield
        except FloatingPointError as error:
            rank_zero_warn(f"LyapunovCallback stops at step {self.steps}: {error}")
            self._stopped = True

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule, fixed: FixedBatches) -> Tensor:
        """The training loss of the fixed batch, with the same masks every time and without trace."""
        batch, stream = fixed.get(0, None)
        with stream, without_trace(pl_module, trainer), trainer.precision_plugin.train_step_context():
            hook = partial(call._call_lightning_module_hook, trainer, "training_step", pl_module=pl_module)
            output = hook(*step_arguments(pl_module.training_step, batch, 0))
        loss = output["loss"] if isinstance(output, Mapping) else output
        assert isinstance(loss, Tensor)
        return loss

    def _end_window(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the sign of the smoothed exponent, and log."""
        assert self.tracker is not None
        self.windows.append(self.steps)
        recent = self.tracker.growth[-self.smoothing :, 0]
        chaotic = bool(recent.mean() > 0)
        if self._chaotic is not None and chaotic != self._chaotic and len(recent) == self.smoothing:
            self.crossings.append(self.steps)
        if len(recent) == self.smoothing or self._chaotic is None:
            self._chaotic = chaotic
        if not self._logs_now(trainer):
            return
        if self._game is None:
            pl_module.log_dict(self._metrics(), on_step=True, on_epoch=False, batch_size=1)
            return
        for logger in trainer.loggers:
            logger.log_metrics(self._metrics(), step=self.steps + 1)  # the game's own clock

    def _metrics(self) -> dict[str, float]:
        assert self.tracker is not None
        running = self.tracker.running()
        metrics = {f"lyapunov/local_{i}": v for i, v in enumerate(self.tracker.local().tolist())}
        metrics |= {f"lyapunov/running_{i}": v for i, v in enumerate(running.tolist())}
        metrics["lyapunov/kaplan_yorke"] = float(kaplan_yorke_dimension(running))
        metrics["lyapunov/edge_of_chaos"] = float(self.tracker.growth[-self.smoothing :, 0].mean() > 0)
        metrics["lyapunov/alignment"] = self.tracker.alignment
        return metrics

    def _logs_now(self, trainer: Trainer) -> bool:
        """At the last window before each of the Trainer's log steps: ``self.log`` takes longer than a small step."""
        done = self.steps if self._game is not None else trainer.fit_loop.epoch_loop._batches_that_stepped
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        following = done + self.orthonormalize_every * self.every_n_steps
        return every > 0 and ((done + 1) % every == 0 or (done + 1) // every != following // every)

    @rank_zero_only
    def _save_figure(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.draw().savefig(folder / "lyapunov.png", dpi=110)
