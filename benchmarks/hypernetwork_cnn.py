"""A CNN on Fashion-MNIST whose ten hyperparameters Delta-STN tunes within one training, against searches.

Dropout of three layers, brightness, contrast, noise, cutout's side and number, label smoothing and decay, on 10 000
images (8 000 train, 2 000 tune; the 10 000 test images judge). Searches train from scratch in each trial, with the same
optimizer and number of epochs. Cost is the process's CPU time. Every method's model is the one of the epoch with
the lowest validation loss. A fresh network is then trained with Delta-STN's last values held fixed: is it the
values, or their schedule?
"""

from __future__ import annotations

import json
import logging
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from _measuring import Spread, load, parser, print_table, report, start
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from lightning_nested.datamodules import FashionMNISTDataModule
from lightning_nested.datamodules.in_memory import TensorBatches
from lightning_nested.hypernetworks import LearnedScale
from lightning_nested.hyperparameters import (
    Brightness,
    Contrast,
    Cutout,
    DropoutRates,
    Exp,
    Hyperparameter,
    HyperparameterVector,
    InputNoise,
    LabelSmoothing,
    WeightDecay,
)
from lightning_nested.modules import STN, DeltaSTN, ResponseOptions, TunedImageClassifier

Result = tuple[float, float, float]  # validation loss, test loss, test accuracy
Values = Mapping[str, Any]
RATE, MOMENTUM, BATCH = 0.05, 0.9, 100


class Data:
    """Three splits."""

    def __init__(self, seed: int, size: int) -> None:
        source = FashionMNISTDataModule(train_size=size * 4 // 5, val_size=size // 5, seed=seed)
        source.prepare_data()
        source.setup("fit")
        mean, scale = source.train_images.mean(), source.train_images.std()
        self.train = ((source.train_images - mean) / scale, source.train_labels)
        self.val = ((source.val_images - mean) / scale, source.val_labels)
        self.test = ((source.test_images - mean) / scale, source.test_labels)


def network() -> nn.Sequential:
    """Two convolutions and two linear layers: 54 k weights."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(0.05),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.05),
        nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Dropout(0.05), nn.Linear(64, 10),
    )  # fmt: skip


def hyperparameters() -> list[Hyperparameter]:
    """Ten numbers, at weak defaults."""
    return [
        DropoutRates(),
        Brightness(init=0.05),
        Contrast(init=0.05),
        InputNoise(init=0.05),
        Cutout(length=2, holes=1, max_length=12, max_holes=3),
        LabelSmoothing(init=0.02, upper=0.4),
        WeightDecay(per="model", init=1e-4, transform=Exp(lower=1e-6, upper=1e-2)),
    ]


@torch.no_grad()
def judge(model: nn.Module, data: Data, best: float = float("inf")) -> Result:
    """In evaluation mode; the test images only where the validation loss is the lowest so far."""
    training = model.training
    model.eval()
    val = float(functional.cross_entropy(model(data.val[0]), data.val[1]))
    test, accuracy = float("nan"), float("nan")
    if val < best:
        logits = model(data.test[0])
        test = float(functional.cross_entropy(logits, data.test[1]))
        accuracy = float((logits.argmax(-1) == data.test[1]).float().mean())
    model.train(training)
    return val, test, accuracy


def loader(split: tuple[Tensor, Tensor]) -> DataLoader[Any]:
    return TensorBatches(*split).loader(batch_size=BATCH, shuffle=True)


def train(data: Data, values: Values, seed: int, epochs: int) -> tuple[Result, list[Result]]:
    """One training with fixed values: the best epoch by validation loss, and all epochs."""
    seed_everything(seed, verbose=False)
    net, tuned = network(), hyperparameters()
    tuned[0].install(net)  # type: ignore[attr-defined]
    for hyperparameter in tuned:
        hyperparameter.build(dict(net.named_parameters()))
    vector = HyperparameterVector(tuned)
    h = vector.at_values(values)
    augmentations, smoothing, decay = tuned[1:5], tuned[5], tuned[6]
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE, momentum=MOMENTUM)
    results: list[Result] = []
    for _ in range(epochs):
        with vector.bound(h):
            amount = float(decay.decays()["0.weight"])  # type: ignore[attr-defined]
            optimizer.param_groups[0]["weight_decay"] = amount
            for images, labels in loader(data.train):
                for augment in augmentations:
                    images = augment(images)  # type: ignore[operator]
                loss = smoothing(net(images), labels)  # type: ignore[operator]
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        results.append(judge(net, data, min((r[0] for r in results), default=float("inf"))))
    return min(results), results


class Record(Callback):
    """Losses and values after each epoch."""

    def __init__(self, data: Data) -> None:
        self.data, self.results, self.values = data, [], []  # type: ignore[var-annotated]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """At λ̂."""
        assert isinstance(pl_module, TunedImageClassifier)
        best = min((r[0] for r in self.results), default=float("inf"))
        self.results.append(judge(pl_module.network, self.data, best))
        self.values.append({k: v.tolist() for k, v in pl_module.values().items()})


def tune(data: Data, seed: int, epochs: int, loop: STN) -> Record:
    """One run of the hypernetwork."""
    seed_everything(seed, verbose=False)
    module = TunedImageClassifier(
        network(),
        hyperparameters(),
        loop=loop,
        weights_optimizer=lambda p: torch.optim.SGD(p, lr=RATE, momentum=MOMENTUM),
        response_optimizer=lambda p: torch.optim.SGD(p, lr=RATE / 2, momentum=MOMENTUM),
        outer_optimizer=lambda p: torch.optim.Adam(p, lr=0.03),
        scale_optimizer=lambda p: torch.optim.Adam(p, lr=0.01),
        options=ResponseOptions(log_every_n_outer_steps=0, gradient_clip_val=5.0),
    )
    record = Record(data)
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[record],
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, loader(data.train), loader(data.val))
    return record


def suggested(trial: Any) -> Values:
    """The same ranges as ours."""
    return {
        "dropout": [trial.suggest_float(f"dropout{i}", 0.01, 0.85) for i in range(3)],
        "brightness": trial.suggest_float("brightness", 0.01, 0.9),
        "contrast": trial.suggest_float("contrast", 0.01, 0.9),
        "input_noise": trial.suggest_float("input_noise", 0.01, 0.9),
        "cutout/length": trial.suggest_int("length", 0, 12),
        "cutout/holes": trial.suggest_int("holes", 0, 3),
        "label_smoothing": trial.suggest_float("label_smoothing", 0.005, 0.39),
        "weight_decay": trial.suggest_float("weight_decay", 1e-6, 1e-2, log=True),
    }


def search(data: Data, sampler: str, seed: int, epochs: int, budget: float) -> list[tuple[float, Result]]:
    """Trials until the CPU budget is spent: cost and the best result so far after each."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    kinds = {"TPE": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
    study = optuna.create_study(sampler=kinds[sampler](seed=seed))
    begin, best, points = time.process_time(), (float("inf"), 0.0, 0.0), []
    while not points or points[-1][0] < budget:
        trial = study.ask()
        result, _ = train(data, suggested(trial), seed, epochs)
        study.tell(trial, result[0])
        best = min(best, result)
        points.append((time.process_time() - begin, best))
    return points


def last_values(record: Record) -> Values:
    """Of the epoch with the lowest validation loss."""
    return record.values[record.results.index(min(record.results))]


def run_seed(arguments: Any, seed: int) -> dict[str, Any]:
    """All methods on one split."""
    data = Data(seed, arguments.size)
    out: dict[str, Any] = {}

    def timed(name: str, call: Any) -> Any:
        begin = time.process_time()
        result = call()
        out.setdefault("seconds", {})[name] = time.process_time() - begin
        return result

    options = {"train_steps": arguments.every, "warmup_steps": arguments.warmup}
    perturbation = LearnedScale(init=0.5)
    loops = {
        "Delta-STN": DeltaSTN(perturbation=perturbation, **options),
        "STN": STN(perturbation=perturbation, **options),
    }
    records = {
        name: timed(name, lambda loop=loop: tune(data, seed, arguments.epochs, loop))
        for name, loop in loops.items()
    }
    for name, record in records.items():
        out[name] = min(record.results)
        out[f"{name} epochs"] = record.results
        out[f"{name} values"] = record.values
        if name == "Delta-STN":
            out[f"{name}, values held fixed"] = train(data, last_values(record), seed, arguments.epochs)[0]
    out["defaults"] = timed("defaults", lambda: train(data, {}, seed, arguments.epochs)[0])
    if find_spec("optuna") is not None:
        for sampler in ("random", "TPE"):
            out[sampler] = search(
                data, sampler, seed, arguments.epochs, arguments.costs * out["seconds"]["Delta-STN"]
            )
    return out


def at(points: Sequence[tuple[float, Result]], cost: float) -> Result:
    """The best result whose trial was begun within the cost: the search gets the trial that crosses it."""
    begun = [p for i, p in enumerate(points) if i == 0 or points[i - 1][0] < cost]
    return begun[-1][1]


def figure(path: Path, seeds: Sequence[dict[str, Any]]) -> None:
    """The learned schedules, and the losses."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = ["dropout", "brightness", "contrast", "input_noise"]
    names += ["cutout/length", "cutout/holes", "label_smoothing", "weight_decay"]
    fig, axes = plt.subplots(2, 4, figsize=(12, 5), sharex=True)
    colors = ["#3182bd", "#e6550d", "#31a354"]
    for axis, name in zip(axes.flat, names, strict=True):
        for i, seed in enumerate(seeds):
            track = torch.tensor([v[name] for v in seed["Delta-STN values"]]).reshape(
                len(seed["Delta-STN values"]), -1
            )
            for j in range(track.shape[1]):
                style = ["-", "--", ":"][j]
                label = f"layer {j + 1}" if track.shape[1] > 1 and i == 0 else None
                axis.plot(
                    range(1, len(track) + 1),
                    track[:, j],
                    style,
                    color=colors[i % 3],
                    linewidth=1.4,
                    label=label,
                )
        axis.set_title(name.replace("_", " ").replace("/", ": "), fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.5)
        if name == "weight_decay":
            axis.set_yscale("log")
        if name == "dropout":
            axis.legend(frameon=False, fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("epoch")
    fig.suptitle(
        "Hyperparameters that Delta-STN learned within one training (one colour a seed)", fontsize=11
    )
    fig.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=100)
    plt.close(fig)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__, rounds=3)
    options.add_argument("--size", type=int, default=10_000, help="images to train and tune on")
    options.add_argument("--epochs", type=int, default=15)
    options.add_argument("--every", type=int, default=4, help="training steps per outer step")
    options.add_argument("--warmup", type=int, default=80, help="training steps before the first outer step")
    options.add_argument(
        "--costs", type=float, default=1.0, help="budget of a search in Delta-STN's CPU time"
    )
    options.add_argument("--figure", type=Path, default=None)
    arguments = options.parse_args(argv)
    start(arguments)
    before = load()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    seeds = []
    for seed in range(arguments.rounds):
        seeds.append(run_seed(arguments, seed))
        short = {k: v for k, v in seeds[-1].items() if not k.endswith(("epochs", "values"))}
        print(f"seed {seed}: {json.dumps(short)}", flush=True)
        if arguments.figure is not None:
            figure(arguments.figure, seeds)
    single = ["Delta-STN", "Delta-STN, values held fixed", "STN", "defaults"]
    rows = []
    for name in [*single, *(s for s in ("random", "TPE") if s in seeds[0])]:
        results = [s[name] if name in single else at(s[name], s["seconds"]["Delta-STN"]) for s in seeds]
        cost = [s["seconds"].get(name, s[name][-1][0] if name not in single else float("nan")) for s in seeds]
        columns = [Spread.of([r[i] for r in results]).text(4) for i in range(3)]
        rows.append([name, *columns, f"{statistics.median(cost):.0f}"])
    print_table(["method", "validation loss", "test loss", "test accuracy", "CPU s"], rows)
    report(arguments, {"seeds": seeds}, packages=("optuna",), load_before=before)
    return {"seeds": seeds}


if __name__ == "__main__":
    main()
