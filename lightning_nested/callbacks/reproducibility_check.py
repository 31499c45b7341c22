"""Say whether a training is reproducible: on this machine, and where rounding differs."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_nested.arguments import at_least, checked, positive
from lightning_nested.callbacks.lyapunov import LyapunovCallback
from lightning_nested.files import replace_text
from lightning_nested.trainer.random_stream import RandomStream
from lightning_nested.trainer.reference_runs import fit_like
from lightning_nested.trainer.run_folder import keeps_files, run_folder
from lightning_nested.trainer.use import OneFitCallback


@checked
class ReproducibilityCheck(OneFitCallback):
    """Train again from the same start, and from one that differs by rounding; say whether the training is reproducible.

    At the end of ``fit`` the module is trained three times more, on the same data and with the same settings, from the
    weights that it had before the run and with one seed: twice from the same bits, once with each weight multiplied by
    1 + eps·ξ, ξ standard normal. It costs ``3 · length`` trainings. Other callbacks of the run take no part.

    If the first two end in other bits, something on this machine is not deterministic. If they agree, the third says
    what another machine does, whose sums are rounded in another order: either the difference stays small against the
    way that training went, or it grows until the two runs are different ones. Its growth is the finite-time Lyapunov
    exponent in a random direction; with :class:`LyapunovCallback` among the callbacks the first exponent stands
    beside it.

    Prints one sentence, and writes ``reproducibility.json`` into the folder of the run's logger (without a logger into
    ``default_root_dir``).

    Args:
        length: Length of each training, in units of the run's own.
        tolerance: Largest difference at the end, relative to how far the weights have moved, that counts as the same.
        seed: Seed of batches, dropout and ξ.

    Attributes:
        results: Content of ``reproducibility.json``; empty before the end of ``fit``. ``verdict`` is
            ``"reproducible"``, ``"on this machine"``, ``"not reproducible"`` or ``"not finite"``; ``growth``
            is log(difference at the end / at the start) per step, ``difference`` the one at the end relative to the
            weights' way.

    Raises:
        MisconfigurationException: In ``setup``: more than one process.
    """

    def __init__(self, *, length: float = 1.0, tolerance: float = 1e-3, seed: int = 0) -> None:
        positive(length=length, tolerance=tolerance)
        at_least(0, seed=seed)
        self.length, self.tolerance, self.seed = float(length), float(tolerance), seed
        self.results: dict[str, Any] = {}
        self._initial: LightningModule

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self.results = {}
        if trainer.world_size > 1:
            raise MisconfigurationException(
                f"ReproducibilityCheck trains in one process. Got world_size={trainer.world_size}; use "
                "Trainer(devices=1)."
            )
        self._initial = copy.deepcopy(pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.global_step:
            rank_zero_warn("ReproducibilityCheck trains nothing again: the run made no step.")
            return
        steps = max(1, round(self.length * trainer.global_step))
        first, second, other = (self._trained(trainer, steps, moved) for moved in (False, False, True))
        start, there = self._start(False), self._start(True)
        difference = float((other - first).norm())
        before, way = float((there - start).norm()), float((first - start).norm())
        growth = math.log(difference / before) / steps if difference and before else -math.inf
        followers = [c for c in trainer.callbacks if isinstance(c, LyapunovCallback)]  # type: ignore[attr-defined]
        self.results = {
            "steps": steps,
            "same_bits": bool(torch.equal(first.view(torch.int64), second.view(torch.int64))),
            "finite": bool(first.isfinite().all() and other.isfinite().all()),
            "difference": difference / way if way else math.inf,
            "growth": growth,
            "exponent": float(followers[0].exponents[0]) if followers else None,
        }
        self.results["verdict"] = _verdict(self.results, self.tolerance)
        print(_sentence(self.results), flush=True)
        if keeps_files(trainer):
            replace_text(
                run_folder(trainer) / "reproducibility.json",
                json.dumps(_plain(self.results), indent=2) + "\n",
            )

    def _module(self, moved: bool) -> LightningModule:
        """Return the module before its training, its weights moved by rounding if asked to."""
        module = copy.deepcopy(self._initial)
        if moved:
            draw = torch.Generator().manual_seed(self.seed)
            with torch.no_grad():
                for p in module.parameters():
                    noise = torch.randn(p.shape, generator=draw, dtype=torch.float64).to(p.device)
                    p.copy_(p.double() * (1 + torch.finfo(p.dtype).eps * noise))
        return module

    def _start(self, moved: bool) -> Tensor:
        return _weights(self._module(moved))

    def _trained(self, trainer: Trainer, steps: int, moved: bool) -> Tensor:
        module = self._module(moved)
        with RandomStream(self.seed, trainer.strategy.root_device):
            fit_like(trainer, module, steps=steps)
        return _weights(module)


def _weights(module: LightningModule) -> Tensor:
    """Return all weights in one vector, in float64 so that differences of neighbouring numbers are exact."""
    return torch.cat([p.detach().double().cpu().flatten() for p in module.parameters()])


def _plain(results: dict[str, Any]) -> dict[str, Any]:
    """Return the results with None in place of numbers that JSON does not know."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in results.items()}


def _verdict(results: dict[str, Any], tolerance: float) -> str:
    if not results["finite"]:
        return "not finite"
    if not results["same_bits"]:
        return "not reproducible"
    return "reproducible" if results["difference"] <= tolerance else "on this machine"


def _sentence(results: dict[str, Any]) -> str:
    ends = f"ends as {results['difference']:.1e} of the way that training went"
    grew = f"{results['growth']:+.2g} nats a step over {results['steps']} steps"
    if results["exponent"] is not None:
        grew += f"; the first Lyapunov exponent is {results['exponent']:+.2g}"
    said = {
        "not reproducible": "No: repeated from the same weights with the same seed it ends in other bits. Look for "
        "what is not deterministic (Trainer(deterministic=True) names it), or draws numbers that no seed sets.",
        "on this machine": f"On this machine only: a repeat ends in the same bits, but a difference of rounding "
        f"{ends} ({grew}). Elsewhere, judge it by means over seeds; a smaller learning rate or clipping may calm it.",
        "not finite": "It cannot be said: its weights end as NaN or infinity. Lower the learning rate or clip first.",
        "reproducible": f"Yes: a repeat ends in the same bits, and a difference of rounding {ends} ({grew}).",
    }
    return f"Is this training reproducible? {said[results['verdict']]}"
