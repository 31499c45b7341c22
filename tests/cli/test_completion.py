"""The shell completes commands, options, classes and configurations, by a script that is printed in seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_nested.cli.main import main
from tests.command import ROOT, error_of

shtab = pytest.importorskip("shtab")

# What readline does after a tab.
COMPLETE = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_shtab_lightning_nested 2> /dev/null
printf '%s\\n' "${COMPREPLY[@]}"
"""


def completed(script: Path, *words: str) -> set[str]:
    """Return what bash offers for the last of the words."""
    command = ["bash", "--norc", "-c", COMPLETE, "bash", str(script), "lightning-nested", *words]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, capture = tmp_path_factory.mktemp("completion") / "script", pytest.MonkeyPatch()
    with capture.context() as patch, path.open("w", encoding="utf-8") as file:
        patch.setattr(sys, "stdout", file)
        with pytest.raises(SystemExit) as ended:
            main(["--print_shtab=bash"])
    assert ended.value.code == 0
    return path


def test_the_script_is_valid(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ([""], {"fit", "validate", "test", "predict", "ride", "configs"}),
        (["fit", "--config", "clean"], {"clean_digits"}),
        (["ride", "--config", "small"], {"small_ipd"}),
        (["configs", "clean"], {"clean_digits"}),
        (["fit", "--trainer.max_e"], {"--trainer.max_epochs"}),
        (["fit", "--trainer.deterministic", ""], {"true", "false", "warn"}),
        (["fit", "--model", "ImageC"], {"ImageClassifier"}),
        (["fit", "--model.network_"], {"--model.network_options"}),
        (["fit", "--trainer.callbacks", "Hyperg"], {"HypergradientCallback"}),
        (["fit", "--trainer.callbacks.every_n_s"], {"--trainer.callbacks.every_n_steps"}),
        (
            ["fit", "--trainer.callbacks.HypergradientCallback.every"],
            {"--trainer.callbacks.HypergradientCallback.every_n_steps"},
        ),
        (["ride", "--game", "Small"], {"SmallIPD"}),
        (["ride", "--optimizer", "AdamW"], {"AdamW"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bash_completes(words: list[str], offered: set[str], script: Path) -> None:
    found = completed(script, *words)
    assert found >= offered
    assert all(word.startswith(words[-1]) for word in found)


def test_files_are_completed_too(script: Path) -> None:
    assert str(script) in completed(script, "fit", "--config", str(script)[:-2])


@pytest.mark.parametrize("shell", ["", "csh5"])
def test_another_shell_is_refused(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = error_of("fit", f"--print_shtab={shell}", capsys=capsys)
    assert "--print_shtab must be followed by a shell: bash, " in text
    assert f"Got {shell!r}" in text


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("fit", "--print_shtab", "{}"), ("--print_shtab={}",)], ids=" ".join)
@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_a_script_is_printed_in_seconds(shell: str, arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "lightning_nested", *(part.format(shell) for part in arguments)]
    paths = os.pathsep.join([str(ROOT), str(Path(shtab.__file__).parents[1])])
    before = os.times()
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": paths}
    )
    after = os.times()
    assert done.returncode == 0, done.stderr[-2000:]
    assert "trainer.max_epochs" in done.stdout
    assert "clean_digits" in done.stdout
    # CPU time, most of which imports take: jsonargparse's own script was not there after 300 s.
    assert after.children_user - before.children_user < 30
