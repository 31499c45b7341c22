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
        (["--data.train_size", "0"], "train_size must be at least 1. Got 0."),
    ],
)
def test_typos_get_close_matches(
    arguments: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = error_of("fit", "--config", "digits", *arguments, capsys=capsys)
    assert answer in text
    assert len(text.splitlines()) < 30, "the error must not be buried under the usage"


CALLBACKS = """
trainer:
  callbacks:
    - class_path: HypergradientCallback
      init_args: {%s}
    - class_path: LearningRateMonitor
"""


@pytest.mark.parametrize(
    ("inside", "answer"),
    [
        ("hyperparameters: WeightDecay, solvr: Neumann", "HypergradientCallback has no option 'solvr'."),
        (
            "hyperparameters: WeightDecay, solvr: Neumann",
            "max_skipped, self_check.\nsolvr: did you mean solver?",
        ),
        (
            "hyperparameters: WeightDecay, solver: {class_path: Neumann, init_args: {num_term: 3}}",
            "trainer.callbacks.solver: Neumann has no option 'num_term'.\n"
            "Options of Neumann: num_terms, step_size, tolerance, warm_start.\nnum_term: did you mean num_terms?",
        ),
        (
            "hyperparameters: [{class_path: WeightDecay, init_args: {inti: 1}}]",
            "trainer.callbacks.hyperparameters: WeightDecay has no option 'inti'.",
        ),
        (
            "hyperparameters: WeightDecay, every_n_steps: many",
            "trainer.callbacks.every_n_steps must be of type int. Got many.",
        ),
    ],
)
def test_a_slip_in_a_list_of_callbacks_ends_in_the_innermost_cause(
    inside: str, answer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "slip.yaml").write_text(CALLBACKS % inside)
    text = error_of("fit", "--config", "digits", "--config", "slip.yaml", capsys=capsys)
    assert answer in text
    assert len(text.splitlines()) < 10


def test_only_callbacks_are_suggested_for_a_callback(capsys: pytest.CaptureFixture[str]) -> None:
    text = error_of("fit", "--config", "digits", "--trainer.callbacks", "HypergradientCallbak", capsys=capsys)
    assert "HypergradientCallbak: did you mean HypergradientCallback?\n" in text
    assert len(text.splitlines()) < 10


OF = "--trainer.callbacks.HypergradientCallback"


def test_an_option_of_one_callback_can_be_set(capsys: pytest.CaptureFixture[str]) -> None:
    options = [f"{OF}.every_n_steps", "3", f"{OF}.solver.num_terms=7", "--print_config"]
    with pytest.raises(SystemExit):
        main(["fit", "--config", "clean_digits", *options])
    callbacks = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    assert [c["class_path"].rpartition(".")[2] for c in callbacks][1:] == [
        "HypergradientCallback",
        "LabelNoiseReport",
    ]
    tuned = callbacks[1]["init_args"]
    assert tuned["every_n_steps"] == 3
    assert tuned["solver"]["init_args"]["num_terms"] == 7
    assert len(tuned["hyperparameters"]) == 2


@pytest.mark.parametrize(
    ("option", "answer"),
    [
        (f"{OF}.solvr=1", "solvr: did you mean solver?"),
        (f"{OF}.solver.num_term=1", "num_term: did you mean num_terms?"),
        ("--trainer.callbacks.HypergradintCallback.solver=1", "Did you mean HypergradientCallback?"),
        # the last callback of the list is another one
        ("--trainer.callbacks.init_args.solvr=Neumann", f"solvr: did you mean {OF}.solver?"),
    ],
)
def test_a_slip_in_an_option_of_one_callback(
    option: str, answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = error_of("fit", "--config", "clean_digits", option, capsys=capsys)
    assert answer in text
    assert len(text.splitlines()) < 10


def test_a_configuration_that_changes_another_says_which(capsys: pytest.CaptureFixture[str]) -> None:
    text = error_of("fit", "--config", "biggan_cifar10_1gpu", capsys=capsys)
    assert "give --config biggan_cifar10 --config biggan_cifar10_1gpu." in text


def test_a_model_without_data_is_refused_before_it_trains(capsys: pytest.CaptureFixture[str]) -> None:
    text = error_of("fit", "--model", "ImageClassifier", "--seed_everything=0", capsys=capsys)
    assert "--model ImageClassifier has no train_dataloader of its own, so --data CLASS is needed" in text


def test_completion_needs_shtab(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert "pip install 'lightning-nested[completion]'" in error_of("--print_shtab", "bash", capsys=capsys)


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
        *("--trainer.callbacks.hyperparameters=WeightDecay", "--trainer.callbacks.at=Current"),
        *("--trainer.callbacks.every_n_steps=1", "--trainer.callbacks.warmup_steps=0"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    callbacks = torch.load(checkpoint, weights_only=True)["callbacks"]
    (state,) = (s for key, s in callbacks.items() if key.startswith("HypergradientCallback"))
    assert (
        state["outer_steps"] == state["inner_steps"] == 8
    )  # two epochs of four steps: 700 images by 2 × 100
