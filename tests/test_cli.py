import gc
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml

import lightning_nested
from lightning_nested.cli.configs import resolve_config, resolve_configs, shipped_configs, shipped_rides
from lightning_nested.cli.lightning import NestedCLI
from lightning_nested.cli.main import COMMANDS, main, paused_collection
from lightning_nested.datamodules import DigitsDataModule
from lightning_nested.modules import ImageClassifier

ROOT = Path(__file__).parents[1]
DIGITS = str(shipped_configs()["digits"])
QUICK = ("--trainer.max_epochs=2", "--trainer.enable_progress_bar=false", "--trainer.logger=false")


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of its own, and the variables that seeding leaves behind taken away."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-nested"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's own LightningCLI raises some
    yield
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)


def error_of(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


# --- the light part


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["configs"], ["fit", "--config", "digts"]])
def test_light_answers_load_neither_torch_nor_lightning_and_take_no_second(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom lightning_nested.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        "print(*{'torch', 'lightning', 'numpy', 'jsonargparse', 'yaml'} & set(sys.modules), file=sys.stderr)"
    )
    seconds = []
    for _ in range(3):  # the best of three: others may be using the machine
        start = time.perf_counter()
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
        )
        seconds.append(time.perf_counter() - start)
        assert run.stderr.splitlines()[-1] == ""
    assert min(seconds) < 1.0


def test_collection_pauses_and_comes_back_after_an_error_or_stays_off_if_it_was() -> None:
    seen: list[bool] = []
    with suppress(KeyError), paused_collection():
        seen.append(gc.isenabled())
        raise KeyError
    assert seen == [False]
    assert gc.isenabled()
    gc.disable()
    try:
        with paused_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_help_lists_commands_and_configurations(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    text = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"{name} " in text
        assert command.summary in text
    for name in shipped_configs():
        assert name in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"lightning-nested {lightning_nested.__version__}\n"


def test_arguments_default_to_those_of_the_process(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-nested", "--version"])
    main()
    assert lightning_nested.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a command is missing"),
        (["fti"], "'fti'. Did you mean fit?"),
        (["xyzzy"], "no command is called 'xyzzy'\n"),
        (["--trainer.max_epochs", "3"], "must be a command"),
        (["fit", "--config", "digit"], "(digits"),
        (["fit", "--config=digit.yaml"], "Did you mean digits?"),
        (["configs", "digts"], "Did you mean digits?"),
        (
            ["fit", "--config", "small_ipd"],
            "belongs to another command: lightning-nested ride --config small_ipd",
        ),
        (["ride", "--config", "digits"], "belongs to another command: lightning-nested fit --config digits"),
    ],
)
def test_slips_are_answered(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if message == "(digits":  # the list of all names
        message = f"({', '.join(shipped_configs())})"
    assert message in error_of(*arguments, capsys=capsys)


def test_configs_lists_the_first_comment_and_prints_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    main(["configs"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*shipped_configs(), *shipped_rides()]
    assert all(len(line.split()) > 3 for line in lines), "every configuration begins with a comment"
    main(["configs", "digits"])
    assert capsys.readouterr().out == Path(DIGITS).read_text(encoding="utf-8")


@pytest.mark.parametrize("value", ["digits", "digits.yaml"])
def test_configurations_are_found_by_name_from_any_folder(value: str) -> None:
    assert resolve_config(value) == DIGITS


def test_a_file_in_the_way_wins_and_a_folder_does_not(tmp_path: Path) -> None:
    (tmp_path / "digits").mkdir()
    assert resolve_config("digits") == DIGITS
    (tmp_path / "digits.yaml").write_text("{}")
    assert resolve_config("digits.yaml") == "digits.yaml"


@pytest.mark.parametrize("value", ["no/such.yaml", "s3://bucket/digits.yaml", "{seed_everything: 3}"])
def test_what_is_no_name_is_left_to_the_parser(value: str) -> None:
    assert resolve_config(value) == value


@pytest.mark.parametrize(
    ("arguments", "resolved"),
    [
        (["fit", "--config", "digits", "--x", "digits"], ["fit", "--config", DIGITS, "--x", "digits"]),
        (["fit", "--config=digits"], ["fit", f"--config={DIGITS}"]),
        (["fit", "-c", "digits", "-c", "digits"], ["fit", "-c", DIGITS, "-c", DIGITS]),
        (["fit", "-c=digits"], ["fit", f"-c={DIGITS}"]),
        (["fit", "-cdigits"], ["fit", f"-c{DIGITS}"]),
        (
            ["fit", "--configs", "digits", "--ckpt_path", "-c"],
            ["fit", "--configs", "digits", "--ckpt_path", "-c"],
        ),
    ],
)
def test_every_form_of_the_option_is_resolved(arguments: list[str], resolved: list[str]) -> None:
    assert resolve_configs(arguments) == resolved


# --- with Lightning


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


def test_the_module_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "lightning_nested", "--version"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.strip() == f"lightning-nested {lightning_nested.__version__}"


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
