"""Draw the diagnostics of healthy and of sick runs, for the page that says how to read them.

Every curve is of a real run on the digits, or of a small game; all together they take under a minute.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _running import script_parser, silent_trainer
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from matplotlib.figure import Figure

from lightning_nested.callbacks import GameSpectrumCallback, HypergradientCallback, LyapunovCallback
from lightning_nested.datamodules import DigitsDataModule
from lightning_nested.demos import ZooGame
from lightning_nested.figures.style import BLUE, ORANGE, open_axes, styled_figure
from lightning_nested.games import Bilinear
from lightning_nested.hypergradient import ConjugateGradient, Current, InverseSolver
from lightning_nested.hyperparameters import Exp, LabelSmoothing, OuterReport, WeightDecay
from lightning_nested.modules import (
    DeltaSTN,
    ImageClassifier,
    ResponseMonitor,
    ResponseOptions,
    TunedImageClassifier,
)
from lightning_nested.optim import ComplexSGD

Series = dict[str, list[float]]


class Recorder(Callback):
    """Keeps the Trainer's metrics of each step that logs new ones."""

    def __init__(self, prefix: str) -> None:
        self.prefix, self.series, self.steps = prefix, dict[str, list[float]](), list[int]()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Take what was logged."""
        logged = trainer.logged_metrics.items()
        found = {k.removeprefix(self.prefix): float(v) for k, v in logged if k.startswith(self.prefix)}
        if found and (not self.steps or any(found[k] != v[-1] for k, v in self.series.items() if k in found)):
            self.steps.append(trainer.global_step)
            for name, value in found.items():
                self.series.setdefault(name, []).append(value)


def outer_steps(solver: InverseSolver, *, batch_size: int, epochs: int, warmup: int) -> list[OuterReport]:
    """Tune a decay per tensor, and return the report of each outer step."""

    class Reporting(HypergradientCallback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
            before = self.outer_steps
            super().on_train_batch_end(trainer, pl_module, *rest)
            if self.outer_steps > before and self.last_report is not None:
                reports.append(self.last_report)

    reports: list[OuterReport] = []
    seed_everything(0, verbose=False)
    tuner = Reporting(
        WeightDecay(init=1e-2, transform=Exp(lower=3e-3, upper=1.0)),
        solver=solver,
        at=Current(),
        every_n_steps=5,
        warmup_steps=warmup,
        log_every_n_outer_steps=1,
        max_skipped=1000,
    )
    network = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 20), torch.nn.Tanh(), torch.nn.Linear(20, 10)
    )
    data = DigitsDataModule(train_size=400, batch_size=batch_size)
    silent_trainer(tuner, max_epochs=epochs).fit(ImageClassifier(network), datamodule=data)
    return reports


def draw_outer_steps(path: Path) -> None:
    """Residual, curvature and identity cosine of two runs."""
    runs = {
        "healthy: whole batches, after a warm-up, damped": outer_steps(
            ConjugateGradient(max_iterations=30, damping=0.01), batch_size=400, epochs=700, warmup=400
        ),
        "sick: batches of 10, from the start": outer_steps(
            ConjugateGradient(max_iterations=30), batch_size=10, epochs=8, warmup=0
        ),
    }
    panels = ("residual", "curvature", "identity_cosine")
    titles = ("Residual of the solve", "Smallest curvature met", "Cosine to the identity's answer")

    def fill(figure: Figure) -> None:
        axes = figure.subplots(1, 3)
        for axis, name, title in zip(axes, panels, titles, strict=True):
            for (label, reports), colour in zip(runs.items(), (BLUE, ORANGE), strict=True):
                axis.plot([getattr(r, name) for r in reports], ".-", color=colour, label=label, linewidth=0.8)
            open_axes(axis, title, "outer step", "")
        axes[0].set_yscale("log")
        axes[1].axhline(0, color="black", linewidth=0.8)
        axes[2].set_ylim(-1.05, 1.05)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=2)
        figure.subplots_adjust(bottom=0.27, left=0.06, right=0.99, wspace=0.25)

    save(path, 12, 3.6, fill)


def response(rate: float) -> Recorder:
    """Watch the error of a response that is trained at a rate."""
    seed_everything(0, verbose=False)
    recorder = Recorder("response/")
    module = TunedImageClassifier(
        "mlp",
        [WeightDecay(init=3e-3, include=["*"]), LabelSmoothing()],
        network_options={"hidden": [30]},
        loop=DeltaSTN(train_steps=3, warmup_steps=40, response_every=1),
        response_optimizer=lambda p: torch.optim.Adam(p, lr=rate),
        options=ResponseOptions(monitor=ResponseMonitor(every_n_outer_steps=5)),
    )
    silent_trainer(recorder, max_epochs=60, log_every_n_steps=1).fit(
        module, datamodule=DigitsDataModule(train_size=400)
    )
    return recorder


def draw_response(path: Path) -> None:
    """Cosine of a response that learns, and of one that cannot."""
    runs = {"healthy: response rate 0.01": response(1e-2), "sick: response rate 1e-6": response(1e-6)}

    def fill(figure: Figure) -> None:
        axes = figure.subplots()
        for (label, run), colour in zip(runs.items(), (BLUE, ORANGE), strict=True):
            axes.plot(run.series["implicit_cosine"], ".-", color=colour, label=label)
        axes.set_ylim(-1.05, 1.05)
        axes.axhline(0, color="black", linewidth=0.8)
        open_axes(axes, "Cosine of the response's gradient to the implicit one", "measurement", "")
        axes.legend(loc="lower right")
        figure.subplots_adjust(bottom=0.17, left=0.1, right=0.98)

    save(path, 7.5, 3.6, fill)


def game(momentum: float, phase: float) -> tuple[list[float], GameSpectrumCallback]:
    """Play the game xy with one momentum."""
    spectrum = GameSpectrumCallback(every_n_updates=50, k=None)
    module = ZooGame(
        Bilinear(),
        start=[[1.0], [1.0]],
        update="simultaneous",
        optimizer=lambda p: ComplexSGD(p, lr=0.1, momentum=momentum, phase=phase),
    )
    silent_trainer(spectrum, max_steps=300).fit(module)
    return module.distances, spectrum


def draw_rate(path: Path) -> None:
    """Distance to the solution, with the predicted rate as a line, of two momenta."""
    runs = {
        "healthy: phase π/8": (*game(0.8, torch.pi / 8), BLUE),
        "sick: phase 0": (*game(0.8, 0.0), ORANGE),
    }

    def fill(figure: Figure) -> None:
        axes = figure.subplots()
        for label, (distances, spectrum, colour) in runs.items():
            rate = float(spectrum.history[-1].rate or 0)
            axes.semilogy(distances, color=colour, label=f"{label}, predicted rate {rate:.3f}")
            line = [distances[0] * rate**t for t in range(len(distances))]
            axes.semilogy(line, "--", color=colour, linewidth=0.8)
        open_axes(axes, "Distance to the solution; dashed: the predicted rate", "update of the game", "")
        axes.legend()
        figure.subplots_adjust(bottom=0.17, left=0.1, right=0.98)

    save(path, 7.5, 3.6, fill)


def exponents(rate: float) -> list[float]:
    """Local Lyapunov exponents of training with one learning rate."""
    seed_everything(0, verbose=False)
    callback = LyapunovCallback(k=1)
    network = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 20), torch.nn.Tanh(), torch.nn.Linear(20, 10)
    )
    module = ImageClassifier(network, optimizer=lambda p: torch.optim.SGD(p, lr=rate))
    silent_trainer(callback, max_epochs=300).fit(
        module, datamodule=DigitsDataModule(train_size=400, batch_size=400)
    )
    local = torch.as_tensor(callback.local_exponents)[:, 0]
    return local.unfold(0, 20, 1).mean(-1).tolist()


def draw_exponents(path: Path) -> None:
    """Smoothed first exponents at three learning rates."""
    runs = {
        "sick: learning rate 8": (exponents(8.0), ORANGE),
        "healthy: learning rate 0.1": (exponents(0.1), BLUE),
    }

    def fill(figure: Figure) -> None:
        axes = figure.subplots()
        for label, (values, colour) in runs.items():
            axes.plot(values, color=colour, label=label)
        axes.axhline(0, color="black", linewidth=0.6, zorder=0)
        open_axes(axes, "First Lyapunov exponent, mean of 20 steps", "training step", "nats per step")
        axes.legend()
        figure.subplots_adjust(bottom=0.17, left=0.1, right=0.98)

    save(path, 7.5, 3.6, fill)


def save(path: Path, width: float, height: float, fill: Callable[[Figure], None]) -> None:
    """Draw in the shared style, and write a PNG."""
    with styled_figure(width, height) as figure:
        fill(figure)
        figure.savefig(path, dpi=110)
    print(path)


def main() -> None:
    """Draw all of them."""
    parser = script_parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/images"), help="folder of the pictures")
    parser.add_argument("--only", choices=list(FIGURES), nargs="*", default=list(FIGURES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        FIGURES[name](options.output / f"diagnostics_{name}.png")


FIGURES = {
    "outer_steps": draw_outer_steps,
    "response": draw_response,
    "rate": draw_rate,
    "exponents": draw_exponents,
}

if __name__ == "__main__":
    main()
