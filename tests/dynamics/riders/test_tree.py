"""Trees of branches: names, order, ancestors."""

from __future__ import annotations

from lightning_nested.dynamics import (
    Branch,
    RideTree,
)


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
