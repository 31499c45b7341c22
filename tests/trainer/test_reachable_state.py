"""An evaluation leaves nothing behind on what a module reaches, however it is held."""

from __future__ import annotations

import array
import copy
import random
import threading
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric, MetricCollection, SumMetric

from lightning_nested.trainer.reachable_state import untouched_networks, untouched_state
from tests.cases import DOUBLE

Pair = namedtuple("Pair", "first second")


@dataclass
class Meter:
    """An object of a user's own class."""

    total: float = 0.0
    history: list[Any] = field(default_factory=list)
    mean: Tensor = field(default_factory=lambda: torch.zeros(3))

    def add(self, value: float) -> None:
        self.total += value
        self.history.append(value)
        self.mean += value


class Slotted:
    __slots__ = ("count", "late")

    def __init__(self) -> None:
        self.count = 0


class Shared:
    """What other threads may change meanwhile."""

    def __init__(self) -> None:
        self.lock, self.count = threading.Lock(), 0


class Data(Dataset[int]):
    def __init__(self) -> None:
        self.read = 0


class Holder(LightningModule):
    """A module with a trained network, and ``held`` in an attribute."""

    seen: list[int] = []  # noqa: RUF012 - a mistake that users make
    count = 0

    def __init__(self, held: Any = None) -> None:
        super().__init__()
        self.net, self.held = nn.Linear(3, 3), held

    def values(self) -> Any:
        return self.held


def frozen(buffers: bool = False) -> nn.Module:
    net = nn.BatchNorm1d(3) if buffers else nn.Linear(3, 3)
    return net.requires_grad_(False)


def moved(net: nn.Module) -> None:
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.9).add_(1.0)


def moved_data(net: nn.Module) -> None:
    for p in net.parameters():
        p.data.mul_(0.9).add_(1.0)


def replaced_data(net: nn.Module) -> None:
    for p in net.parameters():
        p.data = p.data * 0.9 + 1.0


def numbers(net: nn.Module) -> list[Any]:
    return [t.detach().tolist() for t in net.state_dict().values()]


def hook_into(held: list[Any]) -> nn.Module:
    net = nn.Linear(3, 3)
    net.register_forward_hook(lambda _, __, output: held.append(output))
    return net


def first(held: Any) -> Any:
    return held[0]


def itself(held: Any) -> Any:
    return held


# What is held, how an evaluation changes it, and how it is read.
KINDS: dict[str, tuple[Callable[[], Any], Callable[[Any], object], Callable[[Any], Any]]] = {
    "list": (lambda: [1], lambda h: h.append(2), itself),
    "list of lists": (lambda: [[1], []], lambda h: h[1].append(2), itself),
    "dict of lists": (lambda: {"a": [1]}, lambda h: (h["a"].append(2), h.update(b=[])), itself),
    "defaultdict": (lambda: defaultdict(list), lambda h: h["new"].append(1), dict),
    "ordered dict": (lambda: OrderedDict(a=[1], b=2), lambda h: (h["a"].append(1), h.move_to_end("a")), list),
    "counter": (lambda: Counter("aab"), lambda h: h.update("abc"), dict),
    "deque": (lambda: deque([[1], 2], maxlen=2), lambda h: (h[0].append(1), h.append(3)), list),
    "set": (lambda: {1, 2}, lambda h: h.add(3), set),
    "tuple of lists": (lambda: ([1], {"a": [2]}), lambda h: h[1]["a"].append(2), itself),
    "bytes": (lambda: bytearray(b"ab"), lambda h: h.extend(b"c"), bytes),
    "array": (lambda: array.array("d", [1.0]), lambda h: h.append(2.0), list),
    "tensor": (lambda: torch.zeros(3), lambda h: h.add_(1), Tensor.tolist),
    "large tensor": (lambda: torch.zeros(2**16), lambda h: h.data.add_(1), lambda h: float(h.sum())),
    "tensors in a list": (lambda: [torch.zeros(2)] * 3, lambda h: h[0].add_(1), lambda h: h[2].tolist()),
    "very many tensors": (
        lambda: [torch.zeros(2) for _ in range(100)],
        lambda h: (h[7].data.add_(1), h.pop()),
        lambda h: torch.stack(h).tolist(),
    ),
    "many scalars": (
        lambda: [torch.tensor(0.0) for _ in range(100)],
        lambda h: h[7].fill_(float("nan")),
        lambda h: torch.stack(h).tolist(),
    ),
    "many tensors of different lengths": (
        lambda: [torch.zeros(i % 3) for _ in range(30) for i in range(3)],
        lambda h: h[5].add_(1),
        lambda h: [t.tolist() for t in h],
    ),
    "tensors in a named tuple": (
        lambda: Pair(torch.zeros(2), [1]),
        lambda h: (h.first.add_(1), h.second.append(2)),
        lambda h: (h.first.tolist(), h.second),
    ),
    "complex view": (
        lambda: torch.zeros(2, dtype=torch.complex64).conj(),
        lambda h: h.add_(1j),
        lambda h: h.resolve_conj().tolist(),
    ),
    "numpy array": (lambda: np.zeros(2), lambda h: np.add(h, 1, out=h), lambda h: h.tolist()),
    "numpy arrays in a dict": (lambda: {"a": np.zeros(2)}, lambda h: h["a"].fill(1), lambda h: h["a"].tolist()),
    "metric": (SumMetric, lambda h: h.update(1.0), lambda h: (float(h.sum_value), h.update_count)),
    "metrics in a dict": (
        lambda: {"a": [SumMetric()]},
        lambda h: h["a"][0].update(1.0),
        lambda h: (float(h["a"][0].sum_value), h["a"][0].update_count),
    ),
    "metrics in a collection": (
        lambda: [MetricCollection([MeanMetric(), SumMetric()])],
        lambda h: h[0].update(2.0),
        lambda h: [float(m.update_count) for m in h[0].values()],
    ),
    "frozen network": (frozen, moved, numbers),
    "frozen network by .data": (frozen, moved_data, numbers),
    "frozen network with new .data": (frozen, replaced_data, numbers),
    "frozen network in a list": (lambda: [frozen()], lambda h: moved(h[0]), lambda h: numbers(h[0])),
    "frozen network in an object": (
        lambda: SimpleNamespace(net=frozen()),
        lambda h: moved_data(h.net),
        lambda h: numbers(h.net),
    ),
    "network that no optimizer moves": (lambda: [nn.Linear(3, 3)], lambda h: moved(h[0]), lambda h: numbers(h[0])),
    "buffers of a network in a list": (
        lambda: [frozen(buffers=True)],
        lambda h: h[0].train()(torch.randn(4, 3)),
        lambda h: (numbers(h[0]), h[0].training),
    ),
    "mode of a network in a list": (lambda: [frozen()], lambda h: h[0].eval(), lambda h: h[0].training),
    "gradient": (lambda: nn.Linear(3, 1), lambda h: h(torch.ones(3)).backward(), lambda h: h.weight.grad),
    "requires_grad": (lambda: nn.Linear(3, 1), lambda h: h.requires_grad_(False), lambda h: h.weight.requires_grad),
    "forward hook": (
        lambda: (lambda kept: [kept, hook_into(kept)])([]),
        lambda h: h[1](torch.ones(3)),
        lambda h: len(h[0]),
    ),
    "closure": (
        lambda: (lambda kept: [kept.append, lambda: kept])([]),
        lambda h: h[1]().append(1),
        lambda h: list(h[1]()),
    ),
    "bound method": (lambda: Meter().add, lambda h: h(1.0), lambda h: (h.__self__.total, h.__self__.history)),
    "partial": (lambda: partial(Meter.add, Meter()), lambda h: h(1.0), lambda h: h.args[0].total),
    "object": (Meter, lambda h: h.add(1.0), lambda h: (h.total, h.history, h.mean.tolist())),
    "objects in a dict": (
        lambda: {"a": [Meter()]},
        lambda h: h["a"][0].add(1.0),
        lambda h: (h["a"][0].total, h["a"][0].history, h["a"][0].mean.tolist()),
    ),
    "new attribute of an object": (Meter, lambda h: setattr(h, "late", 1), lambda h: sorted(vars(h))),
    "slots": (
        Slotted,
        lambda h: (setattr(h, "count", 1), setattr(h, "late", 1)),
        lambda h: (h.count, hasattr(h, "late")),
    ),
    "optimizer of the user's": (
        lambda: torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1, momentum=0.9),
        lambda h: (setattr(h.param_groups[0]["params"][0], "grad", torch.ones(2)), h.step()),
        lambda h: (h.param_groups[0]["params"][0].tolist(), len(h.state)),
    ),
    "random numbers of torch": (
        lambda: torch.Generator().manual_seed(0),
        lambda h: torch.rand(1, generator=h),
        lambda h: h.get_state().tolist(),
    ),
    "random numbers of NumPy": (
        lambda: np.random.default_rng(0),
        lambda h: h.random(),
        lambda h: h.bit_generator.state,
    ),
    "old random numbers of NumPy": (
        lambda: np.random.RandomState(0),
        lambda h: h.rand(),
        lambda h: h.get_state()[2],
    ),
    "random numbers of Python": (lambda: random.Random(0), lambda h: h.random(), lambda h: h.getstate()),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_nothing_is_left(name: str) -> None:
    make, change, read = KINDS[name]
    module = Holder(make())
    held, before = module.held, copy.deepcopy(read(module.held))
    with untouched_state(module, trained=module.net.parameters()):
        change(module.held)
        assert read(module.held) != before, "the change must be seen inside"
    assert module.held is held
    assert read(module.held) == before
    change(module.held)
    assert read(module.held) != before


@pytest.mark.parametrize("name", ["list", "numpy array", "very many tensors", "frozen network"])
def test_an_exception_leaves_nothing_either(name: str) -> None:
    make, change, read = KINDS[name]
    module = Holder(make())
    before = copy.deepcopy(read(module.held))

    def evaluate() -> None:
        with untouched_state(module):
            change(module.held)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        evaluate()
    assert read(module.held) == before


def test_attributes_are_bound_as_before() -> None:
    module = Holder([1])
    with untouched_state(module):
        module.held, module.new = [2], 3
        module.register_buffer("late", torch.zeros(1))
        del module.net
        type(module).count += 1
        module.seen.append(1)
    assert module.held == [1]
    assert not hasattr(module, "new")
    assert not hasattr(module, "late")
    assert isinstance(module.net, nn.Linear)
    assert (Holder.count, Holder.seen) == (0, [])


def test_what_is_held_twice_is_one_inside() -> None:
    tensor, net = torch.zeros(2**16), frozen()
    module = Holder(
        {"a": tensor, "b": [tensor], "view": tensor[:2], "net": net, "params": list(net.parameters())}
    )
    with untouched_state(module):
        module.held["a"][0] = 1.0
        assert float(module.held["b"][0][0]) == float(module.held["view"][0]) == 1.0
        assert module.held["params"][0] is module.held["net"].weight
    assert module.held["b"][0] is tensor
    assert float(tensor[0]) == 0.0


def test_cycles_end() -> None:
    meter = Meter()
    module = Holder(meter)
    meter.history.append(meter)
    meter.history.append(module)
    with untouched_state(module):
        meter.history.append(1)
    assert len(meter.history) == 2


def test_a_graph_stays_valid_after_its_tensors_are_restored() -> None:
    module = Holder({"scale": torch.full((3,), 2.0), "net": frozen()})
    x = torch.ones(3, requires_grad=True)
    with untouched_state(module):
        module.held["scale"].add_(1.0)
        moved(module.held["net"])
        weight = module.held["net"].weight.clone()
        loss = (x * module.held["scale"]).sum() + module.held["net"](x).sum()
    (gradient,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(gradient, 3.0 + weight.sum(0))


@pytest.mark.parametrize(
    "held", [[nn.Linear(3, 3)], [torch.ones(3) for _ in range(100)]], ids=["network", "many"]
)
def test_an_earlier_graph_stays_valid_where_values_are_restored_in_place(held: list[Any]) -> None:
    module, x = Holder(held), torch.ones(3, requires_grad=True)
    by = held[0] if len(held) == 1 else held[7].mul
    loss = by(x).sum()
    expected = torch.autograd.grad(by(x).sum(), x)
    with untouched_state(module), torch.no_grad():
        for each in held[0].parameters() if len(held) == 1 else held:
            each.add_(1.0)
    torch.testing.assert_close(torch.autograd.grad(loss, x), expected, rtol=0, atol=0)


def test_trained_parameters_are_the_same_tensors() -> None:
    module = Holder()
    with untouched_state(module, trained=module.net.parameters()):
        loss = module.net(torch.ones(3)).sum()
    assert all(g is not None for g in torch.autograd.grad(loss, list(module.net.parameters())))


def test_items_of_iterators_are_given_back() -> None:
    module = Holder(
        {"items": iter([1, 2, 3]), "generator": (i for i in range(3)), "loader": iter(DataLoader(range(3)))}
    )
    for _ in range(2):
        with untouched_state(module):
            assert next(module.held["items"]) == 1
            assert next(module.held["generator"]) == 0
            assert next(module.held["loader"]) == 0
            with untouched_state(module):
                assert next(module.held["items"]) == 2
            assert next(module.held["items"]) == 2
    assert list(module.held["items"]) == [1, 2, 3]
    assert list(module.held["generator"]) == [0, 1, 2]
    assert list(module.held["loader"]) == [0, 1, 2]


def test_what_others_may_change_is_left_alone() -> None:
    module = Holder([Shared(), Data()])
    with untouched_state(module):
        module.held[0].count = module.held[1].read = 5
    assert (module.held[0].count, module.held[1].read) == (5, 5)


def test_large_arrays_are_read_only_inside() -> None:
    module = Holder(np.zeros(2**23 + 1))
    with untouched_state(module):
        assert module.held[0] == 0.0
        with pytest.raises(ValueError, match="read-only"):
            module.held[0] = 1.0
    module.held[0] = 1.0


def test_large_tensors_are_copied_only_when_written_to() -> None:
    module = Holder([frozen(), torch.zeros(2**20)])
    address = module.held[1].untyped_storage().data_ptr()
    with untouched_state(module):
        assert torch._C._is_cow_tensor(module.held[1])
        module.held[1].sum()
        assert torch._C._is_cow_tensor(module.held[1])
    assert module.held[1].untyped_storage().data_ptr() == address


def test_networks_alone() -> None:
    """What a loss of our own modules leaves on attributes is its own business."""
    module = Holder({"metric": SumMetric(), "net": frozen(), "calls": 0, "seen": []})
    before = numbers(module.held["net"])
    with untouched_networks(module):
        module.held["metric"].update(1.0)
        moved_data(module.held["net"])
        module.held["calls"] += 1
        module.held["seen"].append(1)
    assert float(module.held["metric"].sum_value) == 0.0
    assert numbers(module.held["net"]) == before
    assert (module.held["calls"], module.held["seen"]) == (1, [1])


def test_a_compiled_network_is_restored() -> None:
    net: Any = torch.jit.script(nn.BatchNorm1d(3).to(DOUBLE))
    module = Holder(net)
    with untouched_state(module):
        net(torch.randn(4, 3, dtype=DOUBLE))
        assert int(net.num_batches_tracked) == 1
    assert int(net.num_batches_tracked) == 0
