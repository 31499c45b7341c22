"""Check whether what a run has tuned is worth something in a training that begins again."""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from typing_extensions import override

from lightning_nested.arguments import at_least, checked, positive
from lightning_nested.callbacks.hypergradient import HypergradientCallback
from lightning_nested.files import replace_text
from lightning_nested.hyperparameters import BoundHyperparameter, ModuleTensors
from lightning_nested.trainer.random_stream import RandomStream
from lightning_nested.trainer.reference_runs import fit_like, test_like, validate_like
from lightning_nested.trainer.restart import reinitialize
from lightning_nested.trainer.run_folder import keeps_files, run_folder
from lightning_nested.trainer.use import OneFitCallback


class _Held(HypergradientCallback):
    """A callback that applies its values, and never moves them."""

    @override
    def _is_due(self, trainer: Trainer) -> bool:
        return False

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say nothing of a run without outer steps."""

    @override
    def on_fit_end(self, *_: Any, **__: Any) -> None:
        """Report nothing."""


@checked
class RetrainCheck(OneFitCallback):
    """Train again from fresh weights with the tuned values held fixed, and without them; say whether the gain holds.

    Tuned weights and tuned values of one run suit each other; a gain may be of that run alone. At the end of ``fit``
    each seed trains the module twice more, on the same data, from the same fresh weights and with the same order of
    batches: with the values of :class:`HypergradientCallback` held fixed, and plainly, without the callback. It costs
    ``2 · len(seeds) · Σ lengths`` trainings. Values that suit one moment of a training show here that they do not last.

    Prints a table, and writes ``retrain_check.json`` into the folder of the run's logger (without a logger into
    ``default_root_dir``). Fresh weights are drawn by each submodule's ``reset_parameters``; parameters without one, and
    the tensors that are tuned, keep the values that they had before the run.

    Args:
        monitor: Metric that validation, or the test, logs.
        mode: Whether less or more of it is better.
        data: Data that judge: ``"val"``, which the values were tuned on, or ``"test"`` of the datamodule.
        seeds: Seeds of weights and batches.
        lengths: Lengths of the trainings, in units of the run's own.

    Attributes:
        results: Content of ``retrain_check.json``; empty before the end of ``fit``. ``verdict`` is ``"holds"`` where
            every seed gained, ``"lost"`` where none did, else ``"mixed"``.

    Raises:
        MisconfigurationException: In ``setup``: no :class:`HypergradientCallback`, more than one process, or
            ``data="test"`` without a datamodule; at the end: the metric is not logged.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        *,
        mode: Literal["min", "max"] = "min",
        data: Literal["val", "test"] = "val",
        seeds: Sequence[int] = (1, 2, 3),
        lengths: Sequence[float] = (1.0,),
    ) -> None:
        at_least(0, seeds=seeds)
        positive(lengths=lengths)
        if len(seeds) == 0 or len(lengths) == 0:
            raise ValueError(
                f"seeds and lengths must not be empty. Got seeds={seeds!r}, lengths={lengths!r}."
            )
        self.monitor, self.mode, self.data = monitor, mode, data
        self.seeds, self.lengths = tuple(map(int, seeds)), tuple(map(float, lengths))
        self.results: dict[str, Any] = {}
        self._initial: LightningModule
        self._tuner: HypergradientCallback
        self._untouched: HypergradientCallback

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self.results = {}
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        found = [callback for callback in callbacks if isinstance(callback, HypergradientCallback)]
        if len(found) != 1:
            raise MisconfigurationException(
                f"RetrainCheck needs one HypergradientCallback, whose values it holds fixed. Got {len(found)}; add one."
            )
        if trainer.world_size > 1:
            raise MisconfigurationException(
                f"RetrainCheck trains in one process. Got world_size={trainer.world_size}; use Trainer(devices=1)."
            )
        if self.data == "test" and trainer.datamodule is None:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                "RetrainCheck(data='test') needs a datamodule. Got none; give fit one, or take data='val'."
            )
        (self._tuner,) = found
        self._untouched, self._initial = copy.deepcopy((found[0], pl_module))
        for hyperparameter in self._untouched.outer.hyperparameters:
            if isinstance(hyperparameter, BoundHyperparameter):
                setattr(self._initial, hyperparameter.name, None)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._tuner.outer_steps:
            rank_zero_warn("RetrainCheck trains nothing again: the run made no outer step.")
            return
        # A copy, because pl_module belongs to its own Trainer.
        tuned = copy.deepcopy(self._initial)
        tuned.load_state_dict(pl_module.state_dict())
        rows = [self._row(trainer, length, seed) for length in self.lengths for seed in self.seeds]
        verdicts = [
            _verdict([row["gain"] for row in rows if row["length"] == length]) for length in self.lengths
        ]
        self.results = {
            "monitor": self.monitor,
            "data": self.data,
            "tuned_run": self._score(trainer, tuned, 0),
            "rows": rows,
            "verdict": verdicts[0] if len(set(verdicts)) == 1 else "mixed",
        }
        print(_table(self.results), flush=True)
        if keeps_files(trainer):
            replace_text(
                run_folder(trainer) / "retrain_check.json", json.dumps(self.results, indent=2) + "\n"
            )

    def _row(self, trainer: Trainer, length: float, seed: int) -> dict[str, Any]:
        steps = max(1, round(length * trainer.global_step))
        with_values = self._trained(trainer, seed, steps, held=True)
        plain = self._trained(trainer, seed, steps, held=False)
        gain = plain - with_values if self.mode == "min" else with_values - plain
        return {
            "length": length,
            "seed": seed,
            "steps": steps,
            "plain": plain,
            "tuned": with_values,
            "gain": gain,
        }

    def _trained(self, trainer: Trainer, seed: int, steps: int, *, held: bool) -> float:
        module = copy.deepcopy(self._initial)
        _draw_weights(
            module,
            [h.path for h in self._untouched.outer.hyperparameters if isinstance(h, ModuleTensors)],
            seed,
        )
        callbacks = []
        if held:
            callback = copy.deepcopy(self._untouched)
            callback.__class__ = _Held
            callback.load_state_dict(copy.deepcopy(self._tuner.state_dict()))
            callbacks = [callback]
        with RandomStream(seed, trainer.strategy.root_device):
            fit_like(trainer, module, *callbacks, steps=steps)
        return self._score(trainer, module, seed)

    def _score(self, trainer: Trainer, module: LightningModule, seed: int) -> float:
        # A pass over a loader draws random numbers.
        with RandomStream(seed, trainer.strategy.root_device):
            metrics = (validate_like if self.data == "val" else test_like)(trainer, module)
        if self.monitor not in metrics:
            raise MisconfigurationException(
                f"RetrainCheck needs the metric {self.monitor!r}. Got {sorted(metrics)} from "
                f"{type(module).__name__}.{'validation' if self.data == 'val' else 'test'}_step; "
                f"add self.log({self.monitor!r}, ...), or set monitor=."
            )
        return float(metrics[self.monitor])


def _draw_weights(module: nn.Module, tuned: Sequence[str], seed: int) -> None:
    """Draw fresh weights of all but the tuned tensors."""
    parameters = {
        name: p
        for name, p in module.named_parameters()
        if p.requires_grad and not any(name == path or name.startswith(f"{path}.") for path in tuned)
    }
    if parameters:
        initial = {name: p.detach().clone() for name, p in parameters.items()}
        reinitialize(module, initial, parameters, seed)
    with torch.no_grad():
        for part in module.modules():
            # Running statistics of batch norm.
            reset = getattr(part, "reset_running_stats", None)
            if callable(reset):
                reset()


def _verdict(gains: Sequence[float]) -> str:
    return "holds" if min(gains) > 0 else "lost" if max(gains) <= 0 else "mixed"


def _table(results: dict[str, Any]) -> str:
    name = f"{results['monitor']} ({results['data']})"
    lines = [
        f"\n{'retrained from fresh weights, ' + name:<44}{'plain':>10}{'tuned':>10}{'gain':>10}",
        "-" * 74,
    ]
    for row in results["rows"]:
        label = f"seed {row['seed']}, {row['steps']} steps"
        lines.append(f"{label:<44}{row['plain']:>10.4g}{row['tuned']:>10.4g}{row['gain']:>10.3g}")
    lines.append("-" * 74)
    gain = statistics.median(row["gain"] for row in results["rows"])
    said = {
        "holds": "the gain holds with every seed",
        "mixed": "the gain does not hold with every seed",
        "lost": "there is no gain: the values suit the run that tuned them",
    }[results["verdict"]]
    lines.append(f"median gain {gain:.3g}: {said}; the run itself had {results['tuned_run']:.4g}")
    return "\n".join(lines)
