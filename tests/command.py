"""The command in a process of its own, as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_nested.cli.main import main

ROOT = Path(__file__).parents[1]


def run_command(*arguments: str, folder: Path) -> str:
    """Run ``lightning-nested`` with these arguments in a folder; return its output, or fail with its errors."""
    run = subprocess.run(
        [sys.executable, "-m", "lightning_nested", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={
            **{name: v for name, v in os.environ.items() if not name.startswith("PL_")},
            "PYTHONPATH": str(ROOT),
        },
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def error_of(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the error that the command ends with on these arguments, run in this process."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err
