"""Trees of branches: names, order, ancestors."""

from __future__ import annotations

from pathlib import Path

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
