"""Trees of branches: names, order, ancestors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_nested.dynamics import Branch, RideTree, RidgeRider


def test_names_are_in_the_order_of_their_numbers() -> None:
    tree = RideTree()
    for name, parent in (
        ("10", None),
        ("2", None),
        ("2.1", None),
        ("2+0", "2"),
        ("10-0", "10"),
        ("2.1+10", "2.1"),
    ):
        tree.add([Branch(name=name, parent=parent, start=[], end=[], losses=[0.0])])
    assert [b.name for b in tree.roots] == ["2", "2.1", "10"]
    assert [b.name for b in tree.leaves] == ["2+0", "2.1+10", "10-0"]
    assert tree.origin("2.1+10") == "2.1"


def test_a_folder_given_as_text_is_a_path(tmp_path: Path) -> None:
    rider = RidgeRider(max_ridge_steps=1, descent_steps=1, max_depth=1)
    start = (torch.zeros(1, dtype=torch.float64),)
    tree = rider.ride(lambda w: ((w[0] ** 2 - 1) ** 2).sum(), start, folder=str(tmp_path))
    assert tree.folder == tmp_path
    assert RideTree(folder=str(tmp_path), settings=tree.settings).folder == tmp_path  # type: ignore[arg-type]


def node(name: str, parent: str | None = None) -> Branch:
    return Branch(name=name, parent=parent, start=[[0.1]], end=[[0.2]], losses=[1.0, 3.0])


def family(folder: Path) -> Path:
    """Keep a root with two branches in the folder, and return where their files are."""
    RideTree(folder=folder, settings="a: 1\n").add([node("0"), node("0+0", "0"), node("0-0", "0")])
    return folder / "branches"


def test_opening_a_folder_again_writes_nothing(tmp_path: Path) -> None:
    kept = family(tmp_path)
    before = {f: f.stat().st_mtime_ns for f in (kept, *kept.iterdir())}
    RideTree(folder=tmp_path, settings="a: 1\n")
    assert {f: f.stat().st_mtime_ns for f in (kept, *kept.iterdir())} == before
    assert sorted(f.name for f in kept.iterdir()) == ["0+0.json", "0-0.json", "0.json", "settings.txt"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:40],
        lambda text: "",
        lambda text: "[1]",
        lambda text: text.replace("[1.0, 3.0]", '"abc"', 1),
        lambda text: text.replace("[1.0, 3.0]", "[NaN, 3.0]", 1),
        lambda text: text.replace("[1.0, 3.0]", "[9.0, 3.0]", 1),
        lambda text: text.replace('"parent": "0"', '"parent": "7"'),
        lambda text: text.replace("{", '{"new": 1, ', 1),
    ],
)
def test_a_damaged_branch_is_refused_with_its_file(tmp_path: Path, damage: Callable[[str], str]) -> None:
    file = family(tmp_path) / "0+0.json"
    file.write_text(damage(file.read_text()))
    with pytest.raises(ValueError, match=r"0\+0\.json: .* Delete it"):
        RideTree(folder=tmp_path, settings="a: 1\n")


def test_branches_without_their_root_are_left_out_with_a_warning(tmp_path: Path) -> None:
    kept = family(tmp_path)
    RideTree(folder=tmp_path, settings="a: 1\n").add([node("0+0/", "0+0")])
    (kept / "0.json").unlink()
    with pytest.warns(UserWarning, match=r"Got none for 0\+0, 0\+0/, 0-0 in "):
        tree = RideTree(folder=tmp_path, settings="a: 1\n")
    assert not tree.branches
    tree.add([node("0"), node("0+0", "0")])
    assert [b.name for b in RideTree(folder=tmp_path, settings="a: 1\n").leaves] == ["0+0/", "0-0"]


def test_a_branch_of_a_version_without_digests_is_read(tmp_path: Path) -> None:
    file = family(tmp_path) / "0+0.json"
    text = file.read_text()
    file.write_text(text[: text.index(', "digest"')] + "}")
    assert RideTree(folder=tmp_path, settings="a: 1\n").branches["0+0"] == node("0+0", "0")


def test_empty_settings_say_how_to_go_on(tmp_path: Path) -> None:
    settings = family(tmp_path) / "settings.txt"
    settings.write_text("")
    with pytest.raises(ValueError, match=r"Got an empty file.*: delete it to go on"):
        RideTree(folder=tmp_path, settings="a: 1\n")
    settings.unlink()
    assert len(RideTree(folder=tmp_path, settings="a: 1\n").branches) == 3
