"""Files that are replaced whole, and files that grow by whole lines."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_nested.files import append_line, replace_text, replacing


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_new_file_has_the_usual_permissions_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    replace_text(tmp_path / "a" / "new.txt", "ü")
    (tmp_path / "a" / "plain.txt").write_text("")
    new, plain = tmp_path / "a" / "new.txt", tmp_path / "a" / "plain.txt"
    assert new.read_bytes() == "ü".encode()
    assert stat.S_IMODE(new.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    assert names(tmp_path / "a") == ["new.txt", "plain.txt"]


def test_an_error_inside_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    replace_text(path, "old")

    def interrupted() -> None:
        with replacing(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["results.json"]


def test_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    replace_text(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_text(path, "new")
    with pytest.raises(OSError, match="No space"):
        append_line(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["results.json"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    replace_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


def test_a_name_of_full_length_can_be_written(tmp_path: Path) -> None:
    replace_text(tmp_path / ("x" * 255), "1")
    assert names(tmp_path) == ["x" * 255]


def test_a_line_after_an_unfinished_one_stands_alone(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    append_line(path, "{}")
    with path.open("a") as file:
        file.write('{"fid": 1')
    append_line(path, "{}")
    assert path.read_text() == '{}\n{"fid": 1\n{}\n'


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
def test_kills_at_any_moment_leave_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "settings.txt"
    code = f"""
from lightning_nested.files import replace_text
for n in range(10**9):
    replace_text({str(path)!r}, str(n % 10) * 100_000)
    if n == 0:
        print("go", flush=True)
"""
    for delay in (0.003, 0.007, 0.011, 0.002):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(delay)
            process.kill()
        text = path.read_text()
        assert text == text[0] * 100_000
