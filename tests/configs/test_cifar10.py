"""The shipped runs on CIFAR-10: short ones, of small networks, on files of its format."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_nested.cli.main import main
from tests.datamodules.cifar10_files import write_cifar10

pytestmark = pytest.mark.usefixtures("own_folder")


def run(folder: Path, name: str, *options: str) -> dict[str, Any]:
    """Run a configuration on 150 images, and return its results."""
    write_cifar10(folder / "data", 30)
    common = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--num_threads=1"]
    main(["fit", "--config", name, *common, *options])
    (path,) = folder.glob(f"runs/{name}/version_*/results.json")
    assert (path.parent / f"{name}.png").stat().st_size > 15_000
    return dict(json.loads(path.read_text()))


RESNET = ["--model.network.init_args.blocks=[1,1]", "--model.network.init_args.width=2"]
ALEXNET = ["--model.network=lightning_nested.networks.CIFARAlexNet"] + [
    f"--model.network.init_args.{option}" for option in ("dropout=0.0", "width=2", "hidden=8")
]


@pytest.mark.parametrize("network", [RESNET, ALEXNET], ids=["resnet", "alexnet"])
def test_each_weight_of_a_network_gets_a_decay(tmp_path: Path, network: list[str]) -> None:
    short = ["--trainer.max_epochs=20", "--trainer.check_val_every_n_epoch=20"]
    short += ["--trainer.callbacks.HypergradientCallback.solver.max_iterations=3"]
    found = run(tmp_path, "overfit_cifar10", *short, *network)
    assert found["outer_steps"] == 2
    assert found["skipped_outer_steps"] == 0
    assert found["end"]["weight_decay"] != pytest.approx(found["start"]["weight_decay"], rel=1e-4)


def test_images_of_a_class_are_learned(tmp_path: Path) -> None:
    short = ["--trainer.max_epochs=1", "--model.network_options.width=2", "--model.unrolled_steps=2"]
    small = ["--data.train_size=100", "--data.val_size=50", "--data.batch_size=50"]
    found = run(tmp_path, "distill_cifar10", *short, *small)
    assert (found["images"], found["steps"]) == (10, 2)


def test_a_network_that_augments_needs_no_logger() -> None:
    """``LearningRateMonitor`` would refuse ``--trainer.logger=false``."""
    with resources.files("lightning_nested.configs").joinpath("augment_cifar10.yaml").open() as file:
        config = yaml.safe_load(file)
    callbacks = [callback["class_path"] for callback in config["trainer"]["callbacks"]]
    assert "AugmentationReport" in callbacks
    assert "LearningRateMonitor" not in callbacks
    assert config["model"]["init_args"]["scheduler"]["init_args"]["T_max"] == config["trainer"]["max_epochs"]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_network_that_augments_is_learned_in_every_ninth_step(tmp_path: Path) -> None:
    short = ["--trainer.max_epochs=5", "--data.train_size=100", "--data.val_size=50", "--data.batch_size=25"]
    small = ["--model.augmentation.init_args.width=2", "--data.val_batch_size=25"]
    found = run(tmp_path, "augment_cifar10", *short, *small, *RESNET)
    assert found["steps"] == 20
    assert found["change"] > 0
    assert found["spread"] > 0
