"""The ``ride`` command: its files, going on in a folder, and what it refuses."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_nested.cli import main, resolve_config, shipped_configs, shipped_rides

QUICK = (
    "--starts=1",
    "--rider.ride_steps=40",
    "--rider.branching.horizon=5",
    "--rider.branching.ascent_steps=1",
    "--rider.branching.candidates=1",
)


def test_a_ride_writes_its_solutions_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["ride", "--config", "small_ipd", *QUICK, "--output", str(tmp_path)]
    main([*options, "--seed_everything", "3", "--figure", "false"])
    solutions = json.loads((tmp_path / "solutions.json").read_text())
    assert solutions
    assert all(len(s["losses"]) == 2 for s in solutions)
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
    from lightning_nested.ride_cli import ride_parser

    config = ride_parser().parse_args(["--config", resolve_config(name, shipped_rides())])
    assert config.game.class_path.startswith("lightning_nested.")
    assert name not in shipped_configs()


def test_a_misspelt_ride_is_answered(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["ride", "--config", "ipdd"])
    assert "Did you mean ipd" in capsys.readouterr().err


def test_the_command_loads_no_lightning() -> None:
    code = (
        "import sys\nfrom lightning_nested.cli import main\n"
        "try: main(['ride', '--help'])\nexcept SystemExit: pass\n"
        "print('lightning.pytorch' in sys.modules, file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr.splitlines()[-1] == "False"
    assert "--rider.branching.horizon" in run.stdout
