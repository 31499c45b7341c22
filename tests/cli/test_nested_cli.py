import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_nested.cli.find_configs import shipped_configs
from lightning_nested.cli.main import main
from lightning_nested.cli.nested_cli import NestedCLI
from lightning_nested.datamodules import DigitsDataModule
from lightning_nested.modules import ImageClassifier
from tests.command import error_of

DIGITS = str(shipped_configs()["digits"])
QUICK = ("--trainer.max_epochs=2", "--trainer.enable_progress_bar=false", "--trainer.logger=false")

pytestmark = pytest.mark.usefixtures("own_folder")


def parameters(path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_fit_then_test_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", "--config", "digits", *QUICK])
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    main(["test", "--config", "digits", "--ckpt_path", str(checkpoint), *QUICK[1:]])
    assert "test_accuracy" in capsys.readouterr().out
    main(["fit", "--config", "digits", *QUICK])  # into the same folder, without a refusal


def test_print_config_round_trips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--config", "digits", "--data.wrong_label_fraction=0.4", *QUICK]
    with pytest.raises(SystemExit):
        main(["fit", *options, "--print_config"])
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed)
    with pytest.raises(SystemExit):
        main(["fit", "--config", "printed.yaml", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(printed)

    main(["fit", *options, f"--trainer.default_root_dir={tmp_path / 'a'}"])
    main(["fit", "--config=printed.yaml", f"--trainer.default_root_dir={tmp_path / 'b'}"])
    first, second = (parameters(next((tmp_path / run).rglob("*.ckpt"))) for run in "ab")
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    saved = yaml.safe_load((tmp_path / "b" / "config.yaml").read_text())
    assert saved["data"]["init_args"]["wrong_label_fraction"] == 0.4


def test_threads_are_set_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    main(["fit", "--config", "digits", "--trainer.fast_dev_run=true", *QUICK[1:]])
    assert threads == []  # torch's own choice, unless asked
    main(["fit", "--config", "digits", "--num_threads=3", "--trainer.fast_dev_run=true", *QUICK[1:]])
    assert threads == [3]


def test_classes_go_by_short_name_and_a_module_may_bring_no_data(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--model", "ImageClassifier", "--model.optimizer", "Adam", "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["class_path"].startswith("lightning_nested.")
    assert config["model"]["class_path"].endswith(".ImageClassifier")
    assert config["model"]["init_args"]["optimizer"]["class_path"] == "torch.optim.Adam"
    assert config["data"] is None
    assert config["seed_everything"] is True


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ComplexSGD", ["lr=0.05", "phase=0.3927"]),
        ("ComplexAdam", ["betas=[0, 0.999]", "debias=true"]),
        ("Extragradient", ["lr=0.1"]),
        ("OptimisticAdam", []),
    ],
)
def test_optimizers_for_games_are_options_of_a_module(name: str, options: list[str], tmp_path: Path) -> None:
    chosen = [f"--model.optimizer=lightning_nested.{name}"]
    chosen += [f"--model.optimizer.{option}" for option in options]
    main(["fit", "--config", "digits", *chosen, *QUICK])
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    (state,) = torch.load(checkpoint, weights_only=True)["optimizer_states"]
    (group,) = state["param_groups"]
    if name == "ComplexAdam":
        assert group["betas"] == (0.0, 0.999)
    if name == "ComplexSGD":
        assert (group["lr"], group["phase"]) == (0.05, 0.3927)
    assert ("extrapolated" in group) == (name == "Extragradient")


def test_a_checkpoint_of_the_command_line_loads_in_python(tmp_path: Path) -> None:
    main(["fit", "--config=digits", "--model.network_options.hidden=[5]", *QUICK])
    module = ImageClassifier.load_from_checkpoint(next(tmp_path.rglob("*.ckpt")), weights_only=True)
    assert next(module.parameters()).shape == (5, 64)
    assert isinstance(module.configure_optimizers(), torch.optim.SGD)


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--trainer.max_epoch=3"], "--trainer.max_epoch: did you mean --trainer.max_epochs"),
        (["--sed_everything", "3"], "--sed_everything: did you mean --seed_everything?"),
        (["--model", "ImageClasifier"], "ImageClasifier: did you mean ImageClassifier"),
        (["--data", "Digits"], "Digits: did you mean DigitsDataModule?"),
        (["--model.netwrk", "mlp"], "netwrk: did you mean network"),
        (["--model.optimizer", "SDG"], "SDG: did you mean SGD?"),
        (["--model.optimizer.momentun", "0.5"], "momentun: did you mean momentum?"),
        (["--model", "lightning_nested.modules.ImageClasifier"], "did you mean ImageClassifier"),
        (["--config", "{trainer: {max_epoch: 3}}"], "trainer.max_epoch: did you mean trainer.max_epochs"),
        (
            ["--config", "{trainer: {callbacks: [{class_path: EarlyStoping}]}}"],
            "EarlyStoping: did you mean EarlyStopping?",
        ),
        (["--model.network", "resnet81"], "Got 'resnet81'. Close matches: resnet18"),
        (["--data.train_size", "0"], "Got 0 and 300."),
    ],
)
def test_typos_get_close_matches(
    arguments: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = error_of("fit", "--config", "digits", *arguments, capsys=capsys)
    assert answer in text
    assert len(text.splitlines()) < 30, "the error must not be buried under the usage"


def test_a_missing_model_names_the_configurations(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--config NAME" in error_of("fit", capsys=capsys)


def test_errors_of_other_code_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("not ours")

    monkeypatch.setattr(torchvision.models, "get_model", broken)
    with pytest.raises(Exception, match="not ours"):
        main(["fit", "--config", "digits", "--model.network", "resnet18", "--model.network_options", "null"])


def test_the_class_takes_a_dictionary_and_need_not_run() -> None:
    config = {"model": {"class_path": "ImageClassifier"}, "data": {"class_path": "DigitsDataModule"}}
    program = NestedCLI(args={**config, "trainer": {"logger": False}, "seed_everything": 1}, run=False)
    assert isinstance(program.model, ImageClassifier)
    assert isinstance(program.datamodule, DigitsDataModule)


@pytest.mark.slow
def test_two_processes_from_the_command_line(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "lightning_nested", "fit", "--config", "digits", *QUICK),
        *("--trainer.strategy=ddp", "--trainer.devices=2", "--trainer.callbacks+=HypergradientCallback"),
        "--trainer.callbacks.hyperparameters=WeightDecay",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    callbacks = torch.load(checkpoint, weights_only=True)["callbacks"]
    (state,) = (s for key, s in callbacks.items() if key.startswith("HypergradientCallback"))
    assert (
        state["outer_steps"] == state["inner_steps"] == 8
    )  # two epochs of four steps: 700 images by 2 × 100
