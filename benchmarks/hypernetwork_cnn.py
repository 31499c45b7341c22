"""A CNN on Fashion-MNIST whose ten hyperparameters Delta-STN tunes within one training, against searches.

Dropout of three layers, brightness, contrast, noise, cutout's side and number, label smoothing and decay, on 10 000
images (5 000 train, 5 000 tune; the 10 000 test images judge). Searches train from scratch in each trial, over the
same ranges, with the same optimizer, schedule and number of epochs, for Delta-STN's CPU time. Every method's model is
the one of the epoch (and trial) with the lowest validation loss, and only that one meets the test images. A fresh
network is then trained with Delta-STN's last values held fixed: is it the values, or their schedule?
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from _fits import quiet
from _measuring import Spread, load, parser, print_table, report, start
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from lightning_nested.datamodules import FashionMNISTDataModule
from lightning_nested.datamodules.in_memory import TensorBatches
from lightning_nested.files import replace_figure
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
MOMENTUM, BATCH = 0.9, 100
SAMPLERS = {"random search": "RandomSampler", "TPE": "TPESampler"}  # of Optuna
FRESH = "a fresh network, Delta-STN's last values held fixed"
METHODS = ("Delta-STN", FRESH, "STN", "start values held fixed", *SAMPLERS)

# Largest values, the same for ours and for the searches; decays lie in [1e-6, 1e-2].
DROPOUT, STRENGTH, LENGTH, HOLES, SMOOTHING = 0.6, 0.5, 10, 2, 0.2


class Data:
    """Half of the images to train, half to tune, and the 10 000 test images."""

    def __init__(self, seed: int, size: int) -> None:
        source = FashionMNISTDataModule(train_size=size // 2, val_size=size // 2, seed=seed)
        source.prepare_data()
        source.setup("fit")
        mean, scale = source.train_images.mean(), source.train_images.std()
        self.train = ((source.train_images - mean) / scale, source.train_labels)
        self.val = ((source.val_images - mean) / scale, source.val_labels)
        self.test = ((source.test_images - mean) / scale, source.test_labels)


def network() -> nn.Sequential:
    """Two convolutions and two linear layers: 103 k weights."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Dropout2d(0.2),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Dropout(0.2),
        nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10),
    )  # fmt: skip


def hyperparameters() -> list[Hyperparameter]:
    """Ten numbers, at usual values."""
    return [
        DropoutRates(upper=DROPOUT),
        Brightness(init=0.1, upper=STRENGTH),
        Contrast(init=0.1, upper=STRENGTH),
        InputNoise(init=0.1, upper=STRENGTH),
        Cutout(length=4, holes=1, max_length=LENGTH, max_holes=HOLES),
        LabelSmoothing(init=0.05, upper=SMOOTHING),
        WeightDecay(per="model", init=1e-4, include=["*"], transform=Exp(lower=1e-6, upper=1e-2)),
    ]


class Best:
    """Validation loss after each epoch; the network of the lowest is kept and judged on the test images at the end."""

    def __init__(self, data: Data) -> None:
        self.data, self.losses = data, []  # type: ignore[var-annotated]
        self.network: nn.Module | None = None

    @torch.no_grad()
    def look(self, network: nn.Module) -> None:
        """After an epoch, at a network in evaluation mode."""
        loss = float(functional.cross_entropy(network(self.data.val[0]), self.data.val[1]))
        if loss < min(self.losses, default=float("inf")):
            self.network = copy.deepcopy(network)
        self.losses.append(loss)

    @torch.no_grad()
    def result(self) -> Result:
        """Of the best epoch."""
        assert self.network is not None
        images, labels = self.data.test
        logits = self.network(images)
        accuracy = float((logits.argmax(-1) == labels).float().mean())
        return min(self.losses), float(functional.cross_entropy(logits, labels)), accuracy

    @property
    def epoch(self) -> int:
        """The best, from 0."""
        return self.losses.index(min(self.losses))


def annealed(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Every method's rates end at zero, on a cosine."""
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def loader(split: tuple[Tensor, Tensor], batch: int = BATCH) -> DataLoader[Any]:
    return TensorBatches(*split).loader(batch_size=batch, shuffle=True)


def train(data: Data, values: Values, seed: int, setting: Any) -> Best:
    """One training with fixed values."""
    seed_everything(seed, verbose=False)
    net, tuned = network(), hyperparameters()
    tuned[0].install(net)  # type: ignore[attr-defined]
    for hyperparameter in tuned:
        hyperparameter.build(dict(net.named_parameters()))
    vector = HyperparameterVector(tuned)
    h = vector.at_values(values)
    augmentations, smoothing, decay = tuned[1:5], tuned[5], tuned[6]
    optimizer = torch.optim.SGD(net.parameters(), lr=setting.rate, momentum=MOMENTUM)
    scheduler = annealed(optimizer, setting.epochs)
    best = Best(data)
    for _ in range(setting.epochs):
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
        scheduler.step()
        best.look(net.eval())
        net.train()
    return best


class Record(Callback):
    """Losses and values after each epoch, at λ̂."""

    def __init__(self, data: Data) -> None:
        self.best, self.values = Best(data), []  # type: ignore[var-annotated]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Of the exported network."""
        assert isinstance(pl_module, TunedImageClassifier)
        self.best.look(pl_module.export().eval())
        self.values.append({k: v.tolist() for k, v in pl_module.values().items()})


def tune(data: Data, seed: int, loop: STN, setting: Any) -> Record:
    """One run of the hypernetwork."""
    seed_everything(seed, verbose=False)
    outer_steps = setting.epochs * (len(data.train[0]) // BATCH) // setting.every
    module = TunedImageClassifier(
        network(),
        hyperparameters(),
        loop=loop,
        weights_optimizer=lambda p: torch.optim.SGD(p, lr=setting.rate, momentum=MOMENTUM),
        response_optimizer=lambda p: torch.optim.SGD(p, lr=setting.response_rate, momentum=MOMENTUM),
        outer_optimizer=lambda p: torch.optim.Adam(p, lr=setting.outer_rate),
        scale_optimizer=lambda p: torch.optim.Adam(p, lr=0.01),
        weights_scheduler=lambda o: annealed(o, setting.epochs),
        response_scheduler=lambda o: annealed(o, setting.epochs),
        outer_scheduler=lambda o: annealed(o, outer_steps),
        options=ResponseOptions(log_every_n_outer_steps=0, gradient_clip_val=5.0),
    )
    record = Record(data)
    trainer = Trainer(
        max_epochs=setting.epochs, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[record],
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, loader(data.train), loader(data.val, setting.outer_batch))
    return record


def suggested(trial: Any) -> Values:
    """The same ranges as ours."""
    return {
        "dropout": [trial.suggest_float(f"dropout{i}", 0.01, DROPOUT - 0.01) for i in range(3)],
        "brightness": trial.suggest_float("brightness", 0.01, STRENGTH - 0.01),
        "contrast": trial.suggest_float("contrast", 0.01, STRENGTH - 0.01),
        "input_noise": trial.suggest_float("input_noise", 0.01, STRENGTH - 0.01),
        "cutout/length": trial.suggest_int("length", 0, LENGTH),
        "cutout/holes": trial.suggest_int("holes", 0, HOLES),
        "label_smoothing": trial.suggest_float("label_smoothing", 0.005, SMOOTHING - 0.005),
        "weight_decay": trial.suggest_float("weight_decay", 1e-6, 1e-2, log=True),
    }


def search(data: Data, sampler: str, seed: int, setting: Any, budget: float) -> tuple[Result, int]:
    """Trials begun before the CPU budget is spent, so that the last may cross it: the best, and their number."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=getattr(optuna.samplers, SAMPLERS[sampler])(seed=seed))
    begin, results = time.process_time(), []
    while not results or time.process_time() - begin < budget:
        trial = study.ask()
        results.append(train(data, suggested(trial), seed, setting).result())
        study.tell(trial, results[-1][0])
    return min(results), len(results)


def run_seed(setting: Any, seed: int) -> dict[str, Any]:
    """All methods on one split."""
    data = Data(seed, setting.size)
    out: dict[str, Any] = {"seed": seed, "seconds": {}}
    steps = {"train_steps": setting.every, "warmup_steps": setting.warmup}
    perturbation = LearnedScale(init=setting.scale)
    loops = {
        "Delta-STN": DeltaSTN(perturbation=perturbation, response_every=setting.response_every, **steps),
        "STN": STN(perturbation=perturbation, **steps),
    }
    for name in [m for m in METHODS if m in setting.methods]:
        begin = time.process_time()
        if name in loops:
            record = tune(data, seed, loops[name], setting)
            out[name] = record.best.result()
            out[f"{name} epochs"], out[f"{name} values"] = record.best.losses, record.values
        elif name == FRESH:
            values = out["Delta-STN values"]
            out[name] = train(data, values[-1], seed, setting).result()
        elif name in SAMPLERS:
            budget = setting.budget or out["seconds"]["Delta-STN"]
            out[name], out[f"{name} trials"] = search(data, name, seed, setting, budget)
        else:
            out[name] = train(data, {}, seed, setting).result()
        out["seconds"][name] = time.process_time() - begin
        shown = ", ".join(f"{x:.4f}" for x in out[name])
        print(f"seed {seed}: {name}: {shown} in {out['seconds'][name]:.0f} CPU s", flush=True)
        if name in loops:
            print(f"  {out[f'{name} values'][-1]}", flush=True)
    return out


def figure(path: Path, seeds: Sequence[dict[str, Any]]) -> None:
    """The learned schedules, and the losses."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    import matplotlib.ticker

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
        if name.startswith("cutout"):
            axis.yaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
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
    replace_figure(path, fig, dpi=100)
    plt.close(fig)


def merged(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Seeds of several runs, in order; methods of one seed may come from different files."""
    seeds: dict[int, dict[str, Any]] = {}
    for path in files:
        for found in json.loads(path.read_text())["results"]["seeds"]:
            whole = seeds.setdefault(found["seed"], {"seconds": {}})
            seconds = {**whole["seconds"], **found["seconds"]}
            whole.update(found)
            whole["seconds"] = seconds
    return [seeds[seed] for seed in sorted(seeds)]


def show(seeds: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """Median and spread of each method."""
    rows = []
    for name in names:
        columns = [Spread.of([s[name][i] for s in seeds]).text(3) for i in range(3)]
        cost = statistics.median(s["seconds"][name] for s in seeds)
        trials = [str(s[f"{name} trials"]) for s in seeds] if name in SAMPLERS else []
        rows.append([name, *columns, f"{cost:.0f}", ", ".join(trials)])
    print_table(["method", "validation loss", "test loss", "test accuracy", "CPU s", "trials"], rows)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__, rounds=3)
    options.add_argument("--size", type=int, default=10_000, help="images to train and tune on")
    options.add_argument("--epochs", type=int, default=30)
    options.add_argument("--rate", type=float, default=0.05, help="of SGD with momentum 0.9")
    options.add_argument("--response-rate", type=float, default=0.1)
    options.add_argument("--outer-rate", type=float, default=0.03, help="of Adam on unconstrained numbers")
    options.add_argument("--outer-batch", type=int, default=200)
    options.add_argument("--scale", type=float, default=0.5, help="of the perturbation at the start")
    options.add_argument("--every", type=int, default=4, help="training steps per outer step")
    options.add_argument("--warmup", type=int, default=100, help="training steps before the first outer step")
    options.add_argument("--response-every", type=int, default=1, help="Delta-STN's steps per response step")
    options.add_argument("--budget", type=float, help="CPU seconds of a search; default: Delta-STN's")
    options.add_argument("--first-seed", type=int, default=0)
    options.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    options.add_argument("--figure", type=Path, default=None)
    options.add_argument(
        "--merge", type=Path, nargs="+", help="earlier --output files: show their seeds together"
    )
    arguments = options.parse_args(argv)
    if arguments.merge is not None:
        seeds = merged(arguments.merge)
        show(seeds, [m for m in METHODS if all(m in s for s in seeds)])
        if arguments.figure is not None:
            figure(arguments.figure, seeds)
        return {"seeds": seeds}
    if find_spec("optuna") is None:
        arguments.methods = [m for m in arguments.methods if m not in SAMPLERS]
    start(arguments)
    before = load()
    quiet()
    seeds = []
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.rounds):
        seeds.append(run_seed(arguments, seed))
        if arguments.figure is not None:
            figure(arguments.figure, seeds)
    show(seeds, [m for m in METHODS if m in arguments.methods])
    report(arguments, {"seeds": seeds}, packages=("optuna",), load_before=before)
    return {"seeds": seeds}


if __name__ == "__main__":
    main()
