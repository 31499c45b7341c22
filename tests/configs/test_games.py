"""The shipped games: short runs in this process, whole ones and two processes from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_nested.cli.find_configs import shipped_configs
from lightning_nested.cli.main import main
from lightning_nested.demos import ZooGame
from lightning_nested.modules import GANModule
from tests.command import run_command

GAMES = ("bilinear", "dirac_gan", "gaussians_gan")


pytestmark = pytest.mark.usefixtures("own_folder")


def command(name: str, folder: Path, *options: str) -> str:
    """Return the output of a real run."""
    place = f"--trainer.logger.init_args.save_dir={folder}"
    return run_command("fit", "--config", name, place, *options, folder=folder)


def results(folder: Path) -> dict[str, Any]:
    (path,) = folder.rglob("results.json")
    found: dict[str, Any] = json.loads(path.read_text())
    assert list(path.parent.glob("*.png"))
    return found


@pytest.mark.parametrize("name", GAMES)
def test_a_short_run(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--trainer.max_steps=6", f"--trainer.logger.init_args.save_dir={tmp_path}"]
    if name == "gaussians_gan":
        options += ["--data.num_batches=4", "--data.batch_size=8"]
    main(["fit", "--config", name, *options])
    found = results(tmp_path)
    assert found["game_updates"] == 6
    out = capsys.readouterr().out
    assert ("of 8 modes covered" if name == "gaussians_gan" else "distance to the solution") in out


def test_each_player_has_its_own_optimizer_from_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    changed = "--model.optimizers.generator.init_args.phase=0.5"
    with pytest.raises(SystemExit):
        main(["fit", "--config", "dirac_gan", changed, "--print_config"])
    optimizers = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["optimizers"]
    assert {name: o["init_args"]["phase"] for name, o in optimizers.items()} == {
        "discriminator": pytest.approx(0.3927, abs=1e-4),
        "generator": 0.5,
    }


@pytest.mark.parametrize("name", ["bilinear", "gaussians_gan"])
def test_a_checkpoint_of_the_command_line_loads_in_python(name: str, tmp_path: Path) -> None:
    options = ["--trainer.max_steps=2", "--trainer.logger=false", "--trainer.enable_checkpointing=true"]
    main(["fit", "--config", name, *options, f"--trainer.default_root_dir={tmp_path}"])
    kind = ZooGame if name == "bilinear" else GANModule
    module = kind.load_from_checkpoint(next(tmp_path.rglob("*.ckpt")), weights_only=True)
    if isinstance(module, ZooGame):
        assert module.distances[-1] == float(module.distance())
    else:
        assert module.sample(3).shape == (3, 2)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.optimizer.init_args.momentum=1.0", "Got 1.0"),
        ("--model.optimizer.init_args.phase=4", "Got 4"),
    ],
)
def test_momentum_out_of_range(option: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        main(["fit", "--config", "bilinear", option, f"--trainer.logger.init_args.save_dir={tmp_path}"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bilinear", "dirac_gan"])
def test_a_zoo_game_goes_at_the_predicted_rate(name: str, tmp_path: Path) -> None:
    assert "rate per update: measured" in command(name, tmp_path)
    found = results(tmp_path)
    assert found["measured_rate"] == pytest.approx(found["predicted_rate"], abs=1e-3)
    assert found["distance_at_end"] < 1e-4 * found["distance_at_start"]


@pytest.mark.slow
def test_the_gan_covers_the_ring(tmp_path: Path) -> None:
    assert "8 of 8 modes covered" in command("gaussians_gan", tmp_path)
    assert results(tmp_path)["high_quality"] > 0.7


@pytest.mark.slow
def test_two_processes_from_the_command_line(tmp_path: Path) -> None:
    command(
        "gaussians_gan",
        tmp_path,
        "--trainer.max_steps=6",
        "--trainer.strategy=ddp",
        "--trainer.devices=2",
        "--data.num_batches=4",
        "--data.batch_size=8",
    )
    assert results(tmp_path)["game_updates"] == 6


def test_games_are_listed() -> None:
    assert set(GAMES) <= set(shipped_configs())
