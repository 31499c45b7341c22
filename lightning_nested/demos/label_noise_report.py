"""Report on the value of tuned example weights where the wrong labels are known: a table, a figure, numbers."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_nested.arguments import checked
from lightning_nested.callbacks.hypergradient import HypergradientCallback
from lightning_nested.demos.report import Report
from lightning_nested.figures.label_noise import Trace, label_noise_figure
from lightning_nested.hyperparameters import BoundHyperparameter, ExampleWeights
from lightning_nested.linalg.saved import require_keys
from lightning_nested.trainer.random_stream import RandomStream
from lightning_nested.trainer.reference_runs import fit_like, test_like
from lightning_nested.trainer.run_folder import run_folder

_QUANTILES = (0.1, 0.5, 0.9)
_METRIC = "test_accuracy"


@checked
class LabelNoiseReport(Report):
    """Measure, at the end of ``fit``, how well tuned example weights found labels known to be wrong.

    A copy of the untrained module is trained twice more without tuning: on the same noisy labels, and on the
    right labels of the same images; as many steps, with the same optimizer, batches and random numbers. The
    three models are then tested, which is the only use of the test set. The area under the ROC curve of the
    weights is the probability that a right label weighs more than a wrong one.

    Prints a table; writes ``results.json`` and the figure ``<name>.png`` into the folder of the run's logger
    (without a logger into ``default_root_dir``), and the figure to TensorBoard.

    The datamodule must be one that knows its wrong labels, as :class:`InMemoryDataModule` with
    ``wrong_label_fraction``; the module must log ``test_accuracy`` in ``test_step``.

    Args:
        name: Name of the figure's file.

    Attributes:
        results: Content of ``results.json``; empty before the end of ``fit``.

    Raises:
        MisconfigurationException: In ``setup``: more than one process, a datamodule without known wrong
            labels, no :class:`HypergradientCallback` that tunes :class:`ExampleWeights` of all images.
    """

    def __init__(self, name: str = "label_noise") -> None:
        super().__init__(name)
        self._trace = Trace()
        self._initial: LightningModule
        self._tuner: HypergradientCallback
        self._stream: RandomStream
        self._began = 0.0
        # Outer steps in the trace.
        self._traced = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if self.use.changed:
            self._trace, self._traced = Trace(), 0
        self._require_one_process(trainer)
        wrong = _known_wrong_labels(trainer)
        self._tuner = _tuner(trainer, len(wrong))
        self._require_test_step(pl_module, _METRIC)
        self._initial = copy.deepcopy(pl_module)
        for hyperparameter in self._tuner.outer.hyperparameters:
            if isinstance(hyperparameter, BoundHyperparameter):
                # The references are untuned.
                setattr(self._initial, hyperparameter.name, None)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The references start from this random state: the tuning callback does not draw from it, so batches agree.
        self._stream = RandomStream.snapshot(trainer.strategy.root_device)
        self._began = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        report = self._tuner.last_report
        step = self._tuner.outer_steps
        if report is None or step == self._traced:
            return
        self._traced = step
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        trace, weights = self._trace, _example_weights(self._tuner)
        wrong = _known_wrong_labels(trainer).to(weights.device)
        trace.step.append(trainer.global_step)
        trace.train_loss.append(float(loss))
        trace.val_loss.append(report.outer_loss)
        trace.right.append(_quantiles(weights[~wrong]))
        trace.wrong.append(_quantiles(weights[wrong]))
        for decay in self._tuner.outer.decays:
            for key, value in decay.values().items():
                trace.decays.setdefault(key, []).append(float(value.median()))

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seconds = {"tuned": time.perf_counter() - self._began}
        # A copy, because pl_module belongs to its own Trainer.
        tuned = copy.deepcopy(self._initial)
        tuned.load_state_dict(pl_module.state_dict())
        accuracy = {"tuned": self._accuracy(trainer, tuned)}
        for row, clean in (("untuned", False), ("clean_labels", True)):
            began = time.perf_counter()
            reference = copy.deepcopy(self._initial)
            with self._stream.replay():
                fit_like(trainer, reference, use_clean_labels=clean)
            accuracy[row] = self._accuracy(trainer, reference)
            seconds[row] = time.perf_counter() - began
        weights, wrong = _example_weights(self._tuner).cpu(), _known_wrong_labels(trainer)
        count = int(wrong.sum())
        self.results = {
            "test_accuracy": accuracy["tuned"],
            "test_accuracy_untuned": accuracy["untuned"],
            "test_accuracy_clean_labels": accuracy["clean_labels"],
            "auroc": _auroc(weights, wrong),
            "seed": getattr(trainer.datamodule, "seed", None),  # type: ignore[attr-defined]
            "wrong_labels": count,
            "wrong_among_as_many_lowest_weights": int(wrong[weights.argsort()[:count]].sum()),
            "training_images": len(wrong),
            "steps": trainer.global_step,
            "outer_steps": self._tuner.outer_steps,
            "skipped_outer_steps": self._tuner.skipped_steps,
            "seconds_by_training": seconds,
        }
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        figure = label_noise_figure(
            weights=weights,
            wrong=wrong,
            images=data.train_images,
            given=data.train_labels,
            clean=data.train_labels_clean,
            trace=self._trace,
            summary=_summary(self.results),
        )
        self.results["seconds"] = time.perf_counter() - self._began
        folder = run_folder(trainer)
        self._write(trainer, folder, figure, trainer.global_step, _table(self.results))

    @override
    def state_dict(self) -> dict[str, Any]:
        return asdict(self._trace)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        require_keys(state_dict, asdict(Trace()), "LabelNoiseReport")
        self._trace = Trace(**state_dict)

    def _accuracy(self, trainer: Trainer, module: LightningModule) -> float:
        # A pass over a loader draws random numbers.
        with self._stream.replay():
            metrics = test_like(trainer, module)
        if _METRIC not in metrics:
            raise MisconfigurationException(
                f"LabelNoiseReport needs {_METRIC!r}. Got {sorted(metrics)} from "
                f"{type(module).__name__}.test_step; add self.log({_METRIC!r}, ...)."
            )
        return float(metrics[_METRIC])


def _known_wrong_labels(trainer: Trainer) -> Tensor:
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    needed = ("wrong", "use_clean_labels", "train_images", "train_labels", "train_labels_clean")
    missing = [name for name in needed if not hasattr(data, name)]
    if data is None or missing:
        raise MisconfigurationException(
            "LabelNoiseReport needs a datamodule that knows which training labels are wrong. "
            f"Got {'none' if data is None else f'{type(data).__name__} without ' + ', '.join(missing)}; "
            "use DigitsDataModule(wrong_label_fraction=0.4, with_index=True), or extend InMemoryDataModule."
        )
    wrong: Tensor = data.wrong
    if data.use_clean_labels or not bool(wrong.any()) or bool(wrong.all()):
        raise MisconfigurationException(
            "LabelNoiseReport needs training on right and wrong labels. "
            f"Got {int(wrong.sum())} wrong of {len(wrong)} and use_clean_labels={data.use_clean_labels}; "
            f"give {type(data).__name__} a wrong_label_fraction between 0 and 1, and use_clean_labels=False."
        )
    return wrong


def _tuner(trainer: Trainer, num_examples: int) -> HypergradientCallback:
    """Return the callback that tunes the weights of all examples."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, HypergradientCallback):
            for hyperparameter in callback.outer.hyperparameters:
                if isinstance(hyperparameter, ExampleWeights) and hyperparameter.num_examples == num_examples:
                    return callback
    raise MisconfigurationException(
        f"LabelNoiseReport judges the weights of all {num_examples} training examples. Got a Trainer whose "
        f"callbacks tune none; add HypergradientCallback(ExampleWeights({num_examples}))."
    )


def _example_weights(tuner: HypergradientCallback) -> Tensor:
    found = next(h for h in tuner.outer.hyperparameters if isinstance(h, ExampleWeights))
    (weights,) = found.values().values()
    return weights


def _quantiles(values: Tensor) -> list[float]:
    levels: list[float] = values.quantile(values.new_tensor(_QUANTILES)).tolist()
    return levels


def _auroc(weights: Tensor, wrong: Tensor) -> float:
    """Return the probability that a right label weighs more than a wrong one; equal weights count half."""
    right, others = weights[~wrong].contiguous(), weights[wrong].sort().values
    lower = torch.searchsorted(others, right).double()
    not_higher = torch.searchsorted(others, right, right=True).double()
    return float((lower + not_higher).mean() / (2 * len(others)))


def _summary(results: Mapping[str, Any]) -> str:
    untuned, tuned, clean = (
        f"{100 * results[key]:.1f} %"
        for key in ("test_accuracy_untuned", "test_accuracy", "test_accuracy_clean_labels")
    )
    return (
        f"Test accuracy {untuned} untuned, {tuned} with tuned weights and decays, {clean} on right labels "
        f"only.  AUROC of the weights {results['auroc']:.3f}."
    )


def _table(results: Mapping[str, Any]) -> str:
    rows = [
        ("given labels, untuned", "test_accuracy_untuned", "untuned"),
        ("given labels, tuned", "test_accuracy", "tuned"),
        ("right labels, untuned", "test_accuracy_clean_labels", "clean_labels"),
    ]
    lines = [f"\n{'training on':<24}{'test accuracy':>15}{'AUROC':>9}{'seconds':>10}", "-" * 58]
    for label, accuracy, key in rows:
        auroc = f"{results['auroc']:.3f}" if key == "tuned" else "–"
        percent = f"{100 * results[accuracy]:.2f} %"
        lines.append(f"{label:<24}{percent:>15}{auroc:>9}{results['seconds_by_training'][key]:>10.1f}")
    count, caught = results["wrong_labels"], results["wrong_among_as_many_lowest_weights"]
    lines.append("-" * 58)
    lines.append(f"{caught} of the {count} wrong labels are among the {count} lowest weights")
    lines.append(f"seed {results['seed']}, {results['seconds']:.1f} s in all\n")
    return "\n".join(lines)
