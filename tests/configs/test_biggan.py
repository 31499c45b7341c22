import re
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from lightning_nested.callbacks import GeneratorEMA
from lightning_nested.cli.find_configs import shipped_configs
from lightning_nested.cli.main import main
from lightning_nested.cli.nested_cli import NestedCLI
from lightning_nested.modules import BigGAN
from tests.command import ROOT

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.mark.filterwarnings(
    "ignore:The classifier labels only", "ignore:Checkpoint directory", "ignore:The dirpath has changed"
)
def test_the_smoke_run_trains_scores_and_loads(tmp_path: Path) -> None:
    quick = ["--trainer.max_steps=2", "--trainer.val_check_interval=8", "--trainer.enable_progress_bar=false"]
    # An integer zero is what people write; Adam refuses it.
    main(["fit", "--config", "biggan_smoke", *quick, "--model.generator_optimizer.betas=[0, 0.999]"])
    assert (tmp_path / "runs/biggan_smoke/scores.jsonl").is_file()
    assert (tmp_path / "runs/biggan_smoke/grids/000002.png").is_file()
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    gan = BigGAN.load_from_checkpoint(checkpoint, weights_only=True)
    assert gan.networks.width == 4
    assert gan.game_updates == 2
    network = GeneratorEMA.generator_from_checkpoint(checkpoint)
    average = next(
        state["average"]
        for name, state in torch.load(checkpoint, weights_only=True)["callbacks"].items()
        if name.startswith("GeneratorEMA")
    )
    for name, value in network.named_parameters():
        assert torch.equal(value, average[name]), name
    assert network(torch.zeros(2, 16), torch.tensor([0, 9])).shape == (2, 3, 32, 32)
    main(["predict", "--config", "biggan_smoke", "--ckpt_path", str(checkpoint), *quick[2:]])
    assert len(list(tmp_path.rglob("samples/class_*/*.png"))) == 100


@pytest.mark.parametrize(
    ("configs", "devices", "batch"),
    [
        (["biggan_cifar10"], 8, 7),
        (["biggan_cifar10", "biggan_cifar10_2gpu"], 2, 25),
        (["biggan_cifar10", "biggan_cifar10_1gpu"], 1, 50),
    ],
)
def test_the_reference_run_is_the_reference(configs: list[str], devices: int, batch: int) -> None:
    options = [part for name in configs for part in ("--config", name)]
    # What needs GPUs is parsed by the real options and then replaced.
    replaced = ["--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.strategy=auto"]
    program = NestedCLI(args=[*options, *replaced, "--trainer.devices=1"], run=False)
    gan = program.model
    assert isinstance(gan, BigGAN)
    assert [sum(p.numel() for p in m.parameters()) for m in (gan.generator, gan.discriminator)] == [
        4_304_387,
        4_207_361,
    ]
    assert gan.steps_per_player == {"discriminator": 4}
    assert program.trainer.max_steps == 125_000
    assert program.datamodule.batch_size == batch
    text = [(ROOT / f"lightning_nested/configs/{name}.yaml").read_text() for name in configs]
    assert f"devices: {devices}" in text[-1]
    discriminator, generator = (gan._make_optimizers[n](gan.players()[n].parameters()) for n in gan.players())
    assert type(discriminator).__name__ == "ComplexAdam"
    assert isinstance(generator, torch.optim.Adam)
    assert generator.defaults["betas"] == (0.0, 0.999)


def test_the_number_of_gpus_changes_no_update() -> None:
    """Images of a step over all processes: the reference's 50, or what its comment says."""
    images = {}
    for name in ("biggan_cifar10", "biggan_cifar10_1gpu", "biggan_cifar10_2gpu"):
        found = yaml.safe_load((ROOT / f"lightning_nested/configs/{name}.yaml").read_text())
        images[name] = found["trainer"]["devices"] * found["data"]["init_args"]["batch_size"]
        # What would change updates: their number, steps in each, rates.
        assert name == "biggan_cifar10" or set(found) == {"trainer", "data"}
        assert name == "biggan_cifar10" or "max_steps" not in found["trainer"]
    assert images == {"biggan_cifar10": 56, "biggan_cifar10_1gpu": 50, "biggan_cifar10_2gpu": 50}


@pytest.mark.parametrize(
    "name", [name for name in shipped_configs() if not name.startswith("biggan_cifar10")]
)
def test_what_runs_on_a_cpu_asks_for_nothing_that_some_lack(name: str) -> None:
    """Without bf16 instructions an update in bf16 takes up to ten times as long as in float32."""
    found = yaml.safe_load((ROOT / f"lightning_nested/configs/{name}.yaml").read_text())
    assert found["trainer"].get("accelerator") != "gpu"
    assert found["trainer"].get("precision", "32-true") in ("32-true", "64-true")


@pytest.mark.parametrize("name", ["biggan_cifar10", "biggan_smoke", "biggan_fashion_small"])
def test_a_printed_configuration_is_the_same_configuration(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(config: str) -> str:
        with pytest.raises(SystemExit) as end:
            NestedCLI(args=["fit", "--config", config, "--print_config"])
        assert end.value.code == 0
        return capsys.readouterr().out

    first = printed(name)
    assert re.search(r"class_path: lightning_nested\S*\.BigGAN$", first, re.MULTILINE)
    (tmp_path / "again.yaml").write_text(first)
    assert printed(str(tmp_path / "again.yaml")) == first


def test_the_rates_of_the_small_run_are_constant_and_then_fall_to_zero() -> None:
    program = NestedCLI(args=["--config", "biggan_fashion_small", "--trainer.precision=32-true"], run=False)
    for make in program.model._make_schedulers.values():
        optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1e-3)
        schedule = make(optimizer)
        for update in range(1251):
            # To a part in a million: the options of OneCycleLR place the corner within 5e-4 of update 625.
            expected = 1e-3 * min(1.0, (1250 - update) / 625)
            assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, abs=1e-9)
            if update < 1250:
                optimizer.step()
                schedule.step()


@pytest.mark.parametrize(
    "script", ["scripts/verify_biggan.sh", "docs/launch/biggan_torchrun.sh", "docs/launch/biggan.slurm"]
)
def test_launch_files_are_valid_shell(script: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
