import io
import json
import math
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from lightning_nested.callbacks import HypergradientCallback
from lightning_nested.datamodules import DigitsDataModule
from lightning_nested.demos import LabelNoiseReport
from lightning_nested.figures.label_noise import Trace, label_noise_figure
from lightning_nested.hyperparameters import ExampleWeights, WeightDecay
from lightning_nested.modules import ImageClassifier
from tests import trainers
from tests.callbacks.exact import decay_all, exact

SIZE, EPOCHS = 60, 6


def digits(**options: object) -> DigitsDataModule:
    defaults = {
        "train_size": SIZE,
        "val_size": 40,
        "batch_size": 30,
        "val_batch_size": 2000,
        "with_index": True,
        "wrong_label_fraction": 0.4,
    }
    return DigitsDataModule(**{**defaults, **options})  # type: ignore[arg-type]


def classifier() -> ImageClassifier:
    torch.manual_seed(1)
    return ImageClassifier("mlp", network_options={"hidden": [16], "dropout": 0.3})


def adam(rate: float) -> Callable[[Iterable[Tensor]], torch.optim.Optimizer]:
    return lambda tensors: torch.optim.Adam(tensors, lr=rate)


def tuner(rate: float = 0.3, size: int = SIZE) -> HypergradientCallback:
    return exact([ExampleWeights(size), decay_all()], optimizer=adam(rate))


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    defaults = {"max_epochs": EPOCHS, "num_sanity_val_steps": 2}
    return trainers.trainer(*callbacks, folder=folder, **{**defaults, **options})


def parameters(module: LightningModule) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def plain_accuracy(folder: Path, data: DigitsDataModule) -> float:
    """Test accuracy of an untuned run, as a user would measure it."""
    module, plain = classifier(), trainer(folder)
    torch.manual_seed(5)
    plain.fit(module, data)
    return float(plain.test(module, data, verbose=False)[0]["test_accuracy"])


@dataclass
class Fitted:
    """One run with a report, its output, and what it left right after `fit`."""

    folder: Path
    report: LabelNoiseReport
    tuning: HypergradientCallback
    module: ImageClassifier
    data: DigitsDataModule
    run: Trainer
    out: str
    parameters: dict[str, Tensor]
    stream: Tensor


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    folder = tmp_path_factory.mktemp("fitted")
    report, tuning, module, data = LabelNoiseReport("weights"), tuner(), classifier(), digits()
    run = trainer(folder, report, tuning)  # before the tuner: the order does not matter
    torch.manual_seed(5)
    with redirect_stdout(io.StringIO()) as out:
        run.fit(module, data)
    stream = torch.get_rng_state()
    return Fitted(folder, report, tuning, module, data, run, out.getvalue(), parameters(module), stream)


def test_results_are_those_of_separate_runs(fitted: Fitted, tmp_path: Path) -> None:
    report, tuning, module, data, run = fitted.report, fitted.tuning, fitted.module, fitted.data, fitted.run
    written = json.loads((fitted.folder / "results.json").read_text())
    assert written == report.results

    weights = tuning.values()["example_weights"]
    # AUROC by its meaning: pairs of a right and a wrong label in the right order, ties count half.
    difference = weights[~data.wrong].unsqueeze(1) - weights[data.wrong]
    auroc = float((difference > 0).float().mean() + (difference == 0).float().mean() / 2)
    assert written["auroc"] == pytest.approx(auroc, abs=1e-6)
    count = int(data.wrong.sum())
    assert written["wrong_labels"] == count == 24
    assert written["wrong_among_as_many_lowest_weights"] == int(data.wrong[weights.argsort()[:count]].sum())
    assert written["seed"] == 0
    assert written["steps"] == written["outer_steps"] == 2 * EPOCHS
    assert written["seconds"] > sum(written["seconds_by_training"].values()) > 0

    assert written["test_accuracy"] == run.test(module, data, verbose=False)[0]["test_accuracy"]
    assert written["test_accuracy_untuned"] == plain_accuracy(tmp_path, digits())
    assert written["test_accuracy_clean_labels"] == plain_accuracy(tmp_path, digits(use_clean_labels=True))
    assert written["test_accuracy"] != written["test_accuracy_untuned"]


def test_the_table_names_all_three_trainings(fitted: Fitted) -> None:
    report, text = fitted.report, fitted.out
    for key in ("test_accuracy", "test_accuracy_untuned", "test_accuracy_clean_labels"):
        assert f"{100 * report.results[key]:.2f} %" in text
    for words in ("given labels, untuned", "given labels, tuned", "right labels, untuned", "results.json"):
        assert words in text
    assert f"{report.results['auroc']:.3f}" in text


def test_it_does_not_disturb_the_run(fitted: Fitted, tmp_path: Path) -> None:
    module, data, tuning = classifier(), digits(), tuner()
    run = trainer(tmp_path, tuning)
    torch.manual_seed(5)
    run.fit(module, data)
    stream = torch.get_rng_state()
    for m, d, r in ((module, data, run), (fitted.module, fitted.data, fitted.run)):
        assert m.trainer is r
        assert d.trainer is r
        assert not d.use_clean_labels
        assert m.example_weights is None  # taken back at the end of fit, by both
    assert all(torch.equal(value, fitted.parameters[name]) for name, value in parameters(module).items())
    assert all(torch.equal(value, fitted.tuning.values()[name]) for name, value in tuning.values().items())
    assert torch.equal(stream, fitted.stream)


def late_tuner() -> HypergradientCallback:
    """Steps after batches 4, 6, 8 …"""
    tuned = [ExampleWeights(SIZE), decay_all()]
    return exact(tuned, optimizer=adam(0.3), warmup_steps=3, every_n_steps=2)


@pytest.fixture(scope="module")
def logged(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Trainer, LabelNoiseReport, HypergradientCallback]:
    """A run with TensorBoard whose outer steps are fewer than its steps."""
    folder = tmp_path_factory.mktemp("logged")
    report, tuning, logger = LabelNoiseReport("weights"), late_tuner(), TensorBoardLogger(folder, name="logs")
    torch.manual_seed(0)
    run = trainer(folder, tuning, report, logger=logger, log_every_n_steps=1)
    run.fit(classifier(), digits())
    return run, report, tuning


def test_the_figure_is_a_file_and_in_tensorboard(logged: tuple[Trainer, Any, Any]) -> None:
    run = logged[0]
    assert run.log_dir is not None
    picture = Path(run.log_dir, "weights.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 30_000  # an empty figure of this size has less than 10 kB
    assert Path(run.log_dir, "results.json").exists()
    events = EventAccumulator(run.log_dir).Reload()
    (image,) = events.Images("weights")
    assert (image.step, image.width) == (2 * EPOCHS, 1540)


def test_the_trace_follows_the_outer_steps_and_survives_a_checkpoint(
    logged: tuple[Trainer, LabelNoiseReport, HypergradientCallback], tmp_path: Path
) -> None:
    run, report, tuning = logged
    trace = report.state_dict()
    assert trace["step"] == [4, 6, 8, 10, 12]
    assert trace["val_loss"][-1] == tuning.last_report.outer_loss  # type: ignore[union-attr]
    weights, data = tuning.values()["example_weights"], digits()
    data.setup()
    assert trace["wrong"][-1][1] == pytest.approx(float(weights[data.wrong].double().quantile(0.5)), rel=1e-6)
    assert sorted(trace["decays"]) == sorted(tuning.outer.decays[0].values())
    assert all(len(rows) == 5 for rows in trace["decays"].values())

    path = tmp_path / "run.ckpt"
    run.save_checkpoint(path)
    resumed = LabelNoiseReport()
    trainer(tmp_path, late_tuner(), resumed, max_epochs=EPOCHS + 1).fit(
        classifier(), digits(), ckpt_path=path
    )
    assert resumed.state_dict()["step"] == [4, 6, 8, 10, 12, 14]
    assert resumed.state_dict()["train_loss"][:5] == trace["train_loss"]


@pytest.mark.parametrize(
    ("callbacks", "data", "message"),
    [
        (lambda: [tuner()], digits(wrong_label_fraction=0.0), "Got 0 wrong of 60.*wrong_label_fraction"),
        (lambda: [tuner()], digits(use_clean_labels=True), "use_clean_labels=False"),
        (list, digits(), r"add HypergradientCallback\(ExampleWeights\(60\)\)"),
        (lambda: [HypergradientCallback(WeightDecay())], digits(), r"ExampleWeights\(60\)"),
        (lambda: [tuner(size=SIZE + 1)], digits(), "all 60 training examples"),
    ],
)
def test_runs_without_something_to_judge_are_refused(
    callbacks: Callable[[], list[Callback]], data: DigitsDataModule, message: str, tmp_path: Path
) -> None:
    module = classifier()
    before = parameters(module)
    with pytest.raises(MisconfigurationException, match=message):
        trainer(tmp_path, *callbacks(), LabelNoiseReport()).fit(module, data)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_bare_loaders_are_refused(tmp_path: Path) -> None:
    data = digits()
    data.setup()
    run = trainer(tmp_path, tuner(), LabelNoiseReport())
    with pytest.raises(MisconfigurationException, match="Got none; use DigitsDataModule"):
        run.fit(classifier(), data.train_dataloader(), data.val_dataloader())


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, tuner(), LabelNoiseReport())
    monkeypatch.setattr(type(run), "world_size", property(lambda _: 2))
    with pytest.raises(MisconfigurationException, match=r"Got world_size=2; use Trainer\(devices=1\)"):
        LabelNoiseReport().setup(run, classifier(), "fit")


def test_a_module_without_test_accuracy_is_told(tmp_path: Path) -> None:
    class Silent(ImageClassifier):
        def test_step(self, batch: object, batch_idx: int = 0) -> None:  # type: ignore[override]
            self.log("test_error", 0.0)

    with pytest.raises(MisconfigurationException, match=r"Got \['test_error'\] from Silent.test_step"):
        trainer(tmp_path, tuner(), LabelNoiseReport()).fit(Silent("mlp"), digits())


def test_the_figure_frames_the_right_labels_among_the_lowest() -> None:
    weights = torch.linspace(0, 1, 40)
    wrong = torch.arange(40) < 23  # the 25 lowest hold 23 wrong and 2 right labels
    labels = torch.arange(40) % 10
    figure = label_noise_figure(
        weights=weights,
        wrong=wrong,
        images=torch.rand(40, 3, 8, 8),  # in colour
        given=torch.where(wrong, (labels + 1) % 10, labels),
        clean=labels,
        trace=Trace(),  # a run that ended before its first outer step
    )
    texts = [text.get_text() for text in figure.texts]
    assert "23 of 40 training labels are wrong: their weights fall as the model trains" in texts
    assert "The lowest weights: 23 of 25 labels are wrong" in texts
    pictures = [axes for axes in figure.axes if axes.images]
    assert len(pictures) == 25
    assert pictures[0].get_title(loc="left") == "1"
    assert pictures[0].get_title(loc="right") == "(0)"
    assert [axes.get_title(loc="right") != "" for axes in pictures] == [True] * 23 + [False] * 2
    (histogram,) = (axes for axes in figure.axes if axes.get_xlabel().startswith("weight of the image"))
    heights = [sum(bar.get_height() for bar in bars) for bars in histogram.containers]  # type: ignore[attr-defined]
    assert heights == [23, 17]
    assert not any(
        math.isnan(value) for axes in figure.axes for value in (*axes.get_xlim(), *axes.get_ylim())
    )
