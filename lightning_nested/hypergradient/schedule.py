"""Choice of the optimizer states to store when differentiating through many steps in little memory.

A step's graph is a few times larger than its state, so a schedule stores some states, recomputes the graphs
behind them, and frees both on its way back. Sizes are in copies of the state.
Griewank & Walther (2000), ACM TOMS 26:19-45 (Revolve), is the case where a graph is kept for one step only.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from lightning_nested.linalg.vectors import Vector

_ASSUMED_GRAPH = 4.0  # where it cannot be measured: a step built on torch.func refuses hooks


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Cut a run of steps so that stored states and kept graphs fit a memory.

    Args:
        memory: Room for stored states and graphs, in copies of the state; at least one state and one graph.
        graph: Size of one step's graph in copies of the state.
        segment: Cut into equal segments of so many steps instead, whatever their size.

    Example:
        >>> Schedule(memory=12, graph=3).reruns(20)  # graphs of 4, 3, 3, 2, 2, 2, 1 steps
        19
    """

    memory: int = 0
    graph: float = 1.0  # g
    segment: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "memory", max(self.memory, math.ceil(self.graph) + 1))

    def first_segment(self, length: int, memory: int) -> int:
        """Return the steps to the next state to store; 0: keep the graph of all ``length`` steps."""
        if self.segment is not None:
            return self.segment if length > self.segment else 0
        repeats = 0
        while _capacity(memory, self.graph, repeats) < length:
            repeats += 1
        if repeats == 0:
            return 0
        # As late as possible: the tail is then run again no more often than the head.
        head = _capacity(memory, self.graph, repeats - 1)
        return min(head, length - _capacity(memory - 1, self.graph, repeats - 1))

    def reruns(self, length: int) -> int:
        """Count the steps run without a graph; each of the ``length`` steps is run once more with it."""
        total, stack = 0, [(length, self.memory)]
        while stack:
            steps, memory = stack.pop()
            if cut := self.first_segment(steps, memory):
                total += cut
                stack += [(cut, memory), (steps - cut, memory - 1)]
        return total


@lru_cache(maxsize=65536)
def _capacity(memory: int, graph: float, repeats: int) -> int:
    """Count the steps that fit when each is re-run at most ``repeats`` times.

    C(m, 0) = ⌊m/g⌋,  C(m, r) = Σ_{i≥0} C(m−i, r−1): behind i stored states there is room m − i.
    """
    if repeats == 0:
        return int(memory / graph)
    return sum(_capacity(m, graph, repeats - 1) for m in range(math.ceil(graph), memory + 1))


def cheapest(length: int, *, graph: float, reruns: float) -> Schedule:
    """Find the smallest memory in which ``length`` steps are re-run at most ``reruns`` times on average.

    It grows as √(2gT) for one re-run and more slowly for more.
    """
    memory = math.ceil(graph) + 1
    while (schedule := Schedule(memory=memory, graph=graph)).reruns(length) > reruns * length:
        memory += max(1, memory // 32)  # a few per cent of memory are not worth a longer search
    return schedule


def graph_size(step: Callable[[], Sequence[Tensor]], state: Vector, shared: Vector) -> float:
    """Measure what the graph of one step keeps alive, in copies of ``state``, at least 1. Runs the step once.

    Tensors in ``shared`` are not counted.
    """
    saved: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(x: Tensor) -> _Saved:
        holder = _Saved(x.detach())  # detached: a node that holds its own output would be a cycle
        saved.add(holder)
        return holder

    random = RandomState(state)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
            end = step()
    except RuntimeError:  # an error of the step itself comes back in the real run
        return _ASSUMED_GRAPH
    finally:
        random.restore()
    known = {x.untyped_storage().data_ptr() for x in (*state, *shared)}
    kept = {
        storage.data_ptr(): storage.nbytes()
        for x in (*end, *(holder.tensor for holder in saved))
        if (storage := x.untyped_storage()).data_ptr() not in known
    }
    return max(1.0, sum(kept.values()) / max(1, sum(x.untyped_storage().nbytes() for x in state)))


@dataclass(eq=False)
class _Saved:
    """Holder that lives exactly as long as the graph node that saved ``tensor``."""

    tensor: Tensor


class RandomState:
    """Random state of torch on the CPU and on the devices of ``tensors``, so that a step can be run again."""

    def __init__(self, tensors: Vector) -> None:
        self._cpu = torch.get_rng_state()
        self._devices, self._states = get_device_states(*tensors)

    def restore(self) -> None:
        """Restore the state at construction."""
        torch.set_rng_state(self._cpu)
        if self._devices:
            set_device_states(self._devices, self._states)
