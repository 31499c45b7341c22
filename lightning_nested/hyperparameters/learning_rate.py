"""The inner optimizer's learning rate, tuned by differentiating through the optimizer's own steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_nested.arguments import checked
from lightning_nested.hyperparameters.optimizer_options import OptimizerOption
from lightning_nested.hyperparameters.transforms import Exp, Transform


@checked
class LearningRate(OptimizerOption):
    """One learning rate per parameter group of the inner optimizer, which becomes a schedule as the run goes on.

    No loss depends on a rate, so it is tuned through the optimizer's own update w ← Φ(w, α):
    dL_V/dα = (∂L_V/∂w) Z with Z = dw/dα over the last ``horizon`` steps, Z ← (∂Φ/∂w) Z + ∂Φ/∂α from Z = 0. In
    ``HypergradientCallback`` Z is pushed forward with the run, exactly, buffers of momentum and Adam included: the
    first step of a horizon costs no product, each later one a Hessian product per group. An outer step evaluates the
    outer loss once, at the current weights. The user's scheduler stays: while a step is made the group's ``lr`` is the
    tuned rate times what the scheduler makes of the group's first rate. In ``NestedModule(gradient=Unrolled(...))`` the
    horizon is that of ``Unrolled``, and a scheduler of the inner optimizer is refused.

    Gradients that the module's own ``on_before_optimizer_step`` changes are not seen: clip by the Trainer.

    A short horizon is greedy: a lower rate nearly always lowers the next loss, as it lowers the noise of the steps, and
    so the rate falls too early. Wu, Ren, Liao & Grosse (2018), ICLR. The cheapest remedy is to tune late, and the
    callback's default where nothing but options is tuned: for 70 % of the run (``warmup_steps``) the rate stays the
    user's, as long as there is time to learn, and then falls as the outer loss asks. A longer horizon costs more, and
    stays greedy unless it is that of the whole run.

    Args:
        init: Initial rate; None: the optimizer's own.
        transform: Map from the unconstrained tensor to the rate; default ``Exp`` within [1e-8, 10]. In the callback a
            rate then only falls from where it began, for few steps do not show that a higher one diverges; give
            ``Exp(upper=...)`` to let it rise.
        name: Key in logs and checkpoints.
        horizon: Steps of the optimizer that the callback differentiates through, at most those since the last outer
            step.

    Raises:
        ValueError: The rate is not positive, or the horizon below 1.
    """

    sets_rate = True
    fields = ("lr",)
    _key = "rates"

    def __init__(
        self,
        init: float | None = None,
        transform: Transform | None = None,
        name: str = "learning_rate",
        horizon: int = 1,
    ) -> None:
        if init is not None and not init > 0:
            raise ValueError(f"init must be positive and finite. Got {init}.")
        super().__init__(name, init, transform or Exp(lower=1e-8, upper=max(10.0, 2 * (init or 0))), horizon)
        self._may_rise = transform is not None
        self._bound: tuple[float, ...] | None = None  # highest rate of each group

    @override
    def attach(self, starts: Sequence[float]) -> None:
        super().attach(starts)
        self.references = tuple(float(start) for start in starts)

    def only_fall(self) -> None:
        """Let no rate rise above its start, unless a transform was given that says how far."""
        self._bound = None if self._may_rise else self._starts

    @override
    @torch.no_grad()
    def project_(self) -> None:
        super().project_()
        for raw in self.tensors.values() if self._bound is not None else ():
            raw.clamp_max_(self._raw_start("rates", raw.new_tensor(self._bound)))

    def _read(self, group: Mapping[str, Any]) -> float:
        # A scheduler with a warm-up has lowered lr already, and kept the user's.
        return float(group.get("initial_lr", group["lr"]))

    def _of_group(self, index: int, group: Mapping[str, Any], row: Tensor) -> Mapping[str, Tensor]:
        return {"lr": row * (float(group["lr"]) / self.references[index])}

    def rates(self) -> tuple[Tensor, ...]:
        """Return the rate of each group, 0-dimensional, with its graph."""
        return self.transform.forward(self.tensors["rates"]).unbind()
