"""Eigenvalues of a GAN on the ring of eight Gaussians, at the start, in the middle and at the end of training.

The networks are small enough for the dense matrix, so each eigenvalue can be coloured by the player to whom its
eigenvector belongs.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from _running import script_parser, silent_trainer
from lightning.pytorch import seed_everything
from torch import Tensor

from lightning_nested.callbacks import GameSpectrumCallback
from lightning_nested.datamodules import MixtureOfGaussiansDataModule
from lightning_nested.demos import ModeCoverage
from lightning_nested.figures.game_spectrum import spectrum_figure
from lightning_nested.files import replace_figure
from lightning_nested.modules import GameLoop, GANModule
from lightning_nested.networks import MLP
from lightning_nested.optim import ComplexAdam


def kinds(eigenvalues: Tensor) -> dict[str, float]:
    """Return shares among the eigenvalues above 1e-4 of the largest: single precision knows the angle of these."""
    z = eigenvalues[eigenvalues.abs() > 1e-4 * eigenvalues.abs().max()]
    turning = z.imag.abs() > 1e-3 * z.abs()
    conflict = z.imag.abs() > z.real.abs()
    return {
        "eigenvalues": len(z),
        "complex": float(turning.double().mean()),
        "conflict, |Im| > |Re|": float(conflict.double().mean()),
        "negative real part": float((z.real < 0).double().mean()),
        "largest modulus": float(z.abs().max()),
        "largest modulus in conflict": float(z[conflict].abs().max()) if bool(conflict.any()) else 0.0,
    }


def main() -> None:
    """Train, measure three times, draw, and print what kinds of eigenvalues there are."""
    parser = script_parser(__doc__)
    parser.add_argument("--updates", type=int, default=4000)
    parser.add_argument("--hidden", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/gaussians_spectrum"))
    options = parser.parse_args()
    seed_everything(options.seed, verbose=False)
    hidden = (options.hidden, options.hidden)
    module = GANModule(
        MLP(2, hidden, 2, activation="tanh"),
        MLP(2, hidden, 1, activation="tanh"),
        latent_dim=2,
        optimizer=lambda params: ComplexAdam(params, lr=5e-4),
        loop=GameLoop(reuse_batch=True),
    )
    spectrum = GameSpectrumCallback(options.updates // 2, k=None)
    modes = ModeCoverage(options.updates // 2, name="gaussians_spectrum_modes")
    trainer = silent_trainer(
        spectrum, modes, max_epochs=-1, max_steps=options.updates, default_root_dir=options.folder
    )
    data = MixtureOfGaussiansDataModule(std=0.05)
    trainer.fit(module, datamodule=data)
    covered = {updates: f"{found} of {len(data.centres)} modes" for updates, found, _ in modes.history}
    titles = [
        f"{when}: {s.game_updates} updates, {covered.get(s.game_updates, '0 of 8 modes')}"
        for when, s in zip(("start", "middle", "end"), spectrum.history, strict=True)
    ]
    drawn = [replace(s, own={}) for s in spectrum.history]  # a thousand squares would hide the circles
    figure = spectrum_figure(drawn, list(module.players()), titles)
    replace_figure(options.folder / "gaussians_spectrum.png", figure, dpi=92)
    print(f"n = {sum(p.numel() for p in module.parameters())}, seed {options.seed}")
    for title, measured in zip(titles, spectrum.history, strict=True):
        values = {name: round(value, 4) for name, value in kinds(measured.eigenvalues).items()}
        if measured.shares is not None:
            values["shared by both, ≥ 10 % each"] = round(
                float((measured.shares.min(dim=1).values > 0.1).double().mean()), 4
            )
        for name, own in measured.own.items():
            large = own[own.abs() > 1e-4 * own.abs().max()]
            values[f"negative in the {name}'s own block"] = round(float((large < 0).double().mean()), 4)
        print(title, values)


if __name__ == "__main__":
    main()
