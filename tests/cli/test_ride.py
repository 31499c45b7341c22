"""The ``ride`` command: its files, going on in a folder, and what it refuses."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lightning_nested.cli.find_configs import resolve_config, shipped_configs, shipped_rides
from lightning_nested.cli.main import main

QUICK = (
    "--starts=1",
    "--rider.ride_steps=40",
    "--rider.branching.horizon=5",
    "--rider.branching.ascent_steps=1",
    "--rider.branching.candidates=1",
)


@pytest.fixture(scope="module")
def ridden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a ride that is finished, to be copied."""
    folder = tmp_path_factory.mktemp("ridden")
    options = ["--output", str(folder), "--seed_everything", "3", "--figure", "false"]
    main(["ride", "--config", "small_ipd", *QUICK, *options])
    return folder


def test_a_ride_writes_its_solutions_and_goes_on(
    ridden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ridden, tmp_path, dirs_exist_ok=True)
    options = ["ride", "--config", "small_ipd", *QUICK, "--output", str(tmp_path)]
    solutions = json.loads((tmp_path / "solutions.json").read_text())
    assert solutions
    assert all(len(s["losses"]) == 2 for s in solutions)
    for s in solutions:
        expected = torch.sigmoid(torch.tensor(s["parameters"], dtype=torch.float64))
        assert s["policies"] == expected.tolist()
    assert solutions == sorted(solutions, key=lambda s: sum(s["losses"]))
    with (tmp_path / "branches.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["branch"] for r in rows] == ["0", "0+0", "0-0"]
    before = (tmp_path / "solutions.json").read_bytes()
    (tmp_path / "branches" / "0-0.json").unlink()  # as if interrupted
    main([*options, "--seed_everything", "3"])
    assert json.loads(before) == solutions == json.loads((tmp_path / "solutions.json").read_text())
    assert (tmp_path / "ride.png").stat().st_size > 10_000
    assert "solutions in 2 branches" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*options, "--seed_everything", "4"])
    assert "another ride" in capsys.readouterr().err


@pytest.mark.parametrize("name", shipped_rides())
def test_shipped_rides_are_whole_and_apart_from_those_of_fit(name: str) -> None:
    from lightning_nested.cli.ride import ride_parser

    config = ride_parser().parse_args(["--config", resolve_config(name, shipped_rides())])
    assert config.game.class_path.startswith("lightning_nested.")
    assert name not in shipped_configs()


def test_a_misspelt_ride_is_answered(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["ride", "--config", "ipdd"])
    assert "Did you mean ipd" in capsys.readouterr().err


def _ride(folder: Path, *options: str) -> list[str]:
    quick = ["--rider.ride_steps=400", "--rider.branching.horizon=3", "--rider.branching.ascent_steps=1"]
    small = ["--starts=2", "--rider.branching.candidates=2", "--rider.distances=[0.5,1.0,2.0,4.0]"]
    command = [sys.executable, "-W", "ignore", "-m", "lightning_nested", "ride", "--config", "small_ipd"]
    # Chunks of two: eight of them, so that there is a middle.
    return [
        *command,
        *quick,
        *small,
        "--executor.batch_size=2",
        "--figure=false",
        "--output",
        str(folder),
        *options,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--workers=2",)])
def test_a_killed_ride_loses_no_finished_branch(tmp_path: Path, options: tuple[str, ...]) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    branches = cut / "branches"
    with subprocess.Popen(
        _ride(cut, *options), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        try:
            while len(list(branches.glob("*[+-]*.json"))) < 4:
                assert process.poll() is None
                time.sleep(0.005)
        finally:
            process.kill()
        assert process.stdout is not None
        process.stdout.read()  # ends when the last worker does: a killed ride leaves none behind
    finished = {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in branches.glob("*.json")}
    assert 4 <= len(finished) < 18  # 2 points and 16 branches: some are left
    assert not (cut / "solutions.json").exists()
    again = subprocess.run(_ride(cut), check=True, capture_output=True, text=True)
    assert {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in finished} == finished
    if not options:  # with workers the chunks were others, and rounding with them
        subprocess.run(_ride(whole), check=True, capture_output=True)
        for name in ("solutions.json", "branches.csv"):
            assert (cut / name).read_bytes() == (whole / name).read_bytes()
    assert "solutions in 16 branches" in again.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed_everything", "-1"], "-1 does not conform to restriction v>=0"),
        (
            ["--rider.num_directions=3"],
            "num_directions must be at most the number of parameters. Got 3 and 2.",
        ),
        (["--rider.branching.horizon=0"], "horizon must be at least 1. Got 0."),
        (["--game", "SmallIDP"], "Games of the package: Bilinear, DiracGAN, "),
        (["--optimizer", "torch.optim.RMSprop"], "Got RMSprop; pass rule="),
        (["--executor", "Ray", "--workers", "2"], "Got --workers 2 and Ray"),
        (["--output", "{folder}/file"], "--output must be a folder that can be written. Got {folder}/file"),
        (
            ["--config", "{folder}/broken.yaml"],
            "--config must be a YAML file. Got {folder}/broken.yaml: while parsing",
        ),
    ],
)
def test_what_is_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "broken.yaml").write_text("game: [1, 2\n  : x")
    given = [o.format(folder=tmp_path) for o in options]
    with pytest.raises(SystemExit) as status:
        main(["ride", "--config", "small_ipd", "--output", str(tmp_path / "ride"), *QUICK, *given])
    assert status.value.code == 2
    assert message.format(folder=tmp_path) in capsys.readouterr().err


def test_results_that_cannot_be_written_are_told(
    ridden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ridden / "branches", tmp_path / "branches")
    (tmp_path / "solutions.json").mkdir()
    with pytest.raises(SystemExit) as status:
        main(["ride", "--config", "small_ipd", "--output", str(tmp_path), "--seed_everything", "3", *QUICK])
    assert status.value.code == 2
    assert f"--output must be a folder that can be written. Got {tmp_path}" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["branches", "solutions.json"]


def test_a_game_or_a_configuration_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["ride"])
    assert "required: game (class of a game), or --config ipd or small_ipd" in capsys.readouterr().err


def test_the_command_loads_no_lightning() -> None:
    code = (
        "import sys\nfrom lightning_nested.cli import main\n"
        "try: main(['ride', '--help'])\nexcept SystemExit: pass\n"
        "print('lightning.pytorch' in sys.modules, file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr.splitlines()[-1] == "False"
    assert "--rider.branching.horizon" in run.stdout
