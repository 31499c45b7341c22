"""Weights of named groups of examples, such as sources of a mixture: in the loss, or in how often they are drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler

from lightning_nested.arguments import at_least, checked
from lightning_nested.hyperparameters.transforms import Simplex
from lightning_nested.hyperparameters.weights import BoundHyperparameter


@checked
class GroupWeights(BoundHyperparameter):
    """One weight per named group of training examples; weights are positive and sum to one: p = softmax(raw).

    ``weights(groups)`` returns p_g/q_g for each example of a batch, where q is the share of each group in batches: the
    mean of weighted losses is then Σ_g p_g·L_g, with L_g the mean loss of group g. A data loader with
    :meth:`sampler` draws each group as often as its weight says, so that q = p: the weights are all 1, a group of
    weight 0 costs nothing, and their derivative is that of log p_g.

    Args:
        names: Names of the groups. Batches carry the index of each example's group in this list.
        init: Initial weights, any positive numbers, which are divided by their sum; None: equal.
        shares: Shares of the groups in batches, such as their sizes; divided by their sum. None: equal. Not read where
            :meth:`sampler` draws the batches.
        name: Attribute of the module that it becomes, and key in logs.

    Example:
        >>> weights = GroupWeights(["web", "books"], init=[3, 1])
        >>> weights(torch.tensor([0, 1, 1]))
        tensor([1.5000, 0.5000, 0.5000])
    """

    weighs_examples = True
    usage = (
        "self.group_weights = None  # in __init__\n"
        "if self.group_weights is not None:  # in training_step, with per-example losses and the index of their group\n"
        "    losses = losses * self.group_weights(group)"
    )

    def __init__(
        self,
        names: Sequence[str],
        init: Sequence[float] | None = None,
        shares: Sequence[float] | None = None,
        name: str = "group_weights",
    ) -> None:
        super().__init__()
        if len(names) < 2 or len(set(names)) != len(names):
            raise ValueError(f"names must be a list of two or more different names. Got {names!r}.")
        self.names, self.name = tuple(names), name
        self.init, self.shares = self._of_sum_one("init", init), self._of_sum_one("shares", shares)
        self.drives_sampler = False
        self._use(Simplex(), self.init)

    def _of_sum_one(self, argument: str, given: Sequence[float] | None) -> tuple[float, ...]:
        numbers = [1.0] * len(self.names) if given is None else [float(number) for number in given]
        if len(numbers) != len(self.names) or not min(numbers) > 0:
            raise ValueError(
                f"{argument} must be one positive number per name. Got {given!r} for {list(self.names)}."
            )
        return tuple(number / sum(numbers) for number in numbers)

    def _initial(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"weights": torch.tensor(self.init, dtype=dtype)}

    def entries(self) -> tuple[str, ...]:
        """Return the names of the groups."""
        return self.names

    def __call__(self, groups: Tensor) -> Tensor:
        """Return p_g/q_g of shape ``groups``, indices of groups (any shape, integers), with its graph to p.

        Raises:
            ValueError: ``groups`` holds no integers; or one that is no index of a name, if it is on the CPU.
        """
        _check_groups(groups, self.names)
        p = self.transform.forward(self.raw("weights", groups.device))
        q = p.detach() if self.drives_sampler else p.new_tensor(self.shares)
        return (p / q)[groups.to(p.device)]

    def sampler(self, groups: Tensor, num_samples: int | None = None) -> GroupSampler:
        """Return a sampler for a data loader that draws groups by their weights; from then on it is what q means.

        Args:
            groups: Index of the group of each example of the dataset, shape (examples,).
            num_samples: Examples in an epoch; None: as many as the dataset has.
        """
        self.drives_sampler = True
        return GroupSampler(self, groups, num_samples)


@checked
class GroupSampler(Sampler[int]):
    """Draws indices of examples so that each group's share follows its current weight, from draw to draw.

    Groups take turns by smooth weighted round robin: any run of n draws has n·p_g of group g, but for one or two. A
    group's examples come in random order, each once before any comes again; random numbers are torch's. Weights are
    read in the process that loads: with worker processes a change takes as many batches as they load ahead. Lightning
    draws a whole epoch at its start in a data-parallel run.

    Args:
        weights: Weights that are followed.
        groups: Index of the group of each example of the dataset, shape (examples,).
        num_samples: Examples in an epoch; None: as many as the dataset has.

    Raises:
        ValueError: A group has no example, or an index is none of a group.
    """

    def __init__(self, weights: GroupWeights, groups: Tensor, num_samples: int | None = None) -> None:
        at_least(1, num_samples=num_samples)
        _check_groups(groups, weights.names)
        self.weights = weights
        self.rows = [(groups == g).nonzero().flatten() for g in range(len(weights.names))]
        empty = [name for name, rows in zip(weights.names, self.rows, strict=True) if not len(rows)]
        if empty:
            raise ValueError(f"groups must have examples of every name. Got none of {', '.join(empty)}.")
        self.num_samples = len(groups) if num_samples is None else num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(int(torch.empty((), dtype=torch.int64).random_()))
        # Random, so that the first draws of an epoch favour no group.
        credit = (torch.rand(len(self.rows), generator=generator) - 0.5).tolist()
        waiting: list[list[int]] = [[] for _ in self.rows]
        read = _Reader(self.weights)
        for _ in range(self.num_samples):
            credit = [c + p for c, p in zip(credit, read(), strict=True)]
            group = max(range(len(credit)), key=credit.__getitem__)
            credit[group] -= 1.0
            if not waiting[group]:
                order = torch.randperm(len(self.rows[group]), generator=generator)
                waiting[group] = self.rows[group][order].tolist()
            yield waiting[group].pop()


class _Reader:
    """Current weights as numbers; the tensor is read again only when it has changed, as a GPU would have to wait."""

    def __init__(self, weights: GroupWeights) -> None:
        self._weights = weights
        self._seen: tuple[Tensor | None, int] = (None, 0)
        self._numbers: list[float] = []

    def __call__(self) -> list[float]:
        raw = self._weights.raw("weights")
        if self._seen[0] is not raw or self._seen[1] != raw._version:
            self._seen = raw, raw._version
            self._numbers = self._weights.transform.forward(raw.detach()).tolist()
        return self._numbers


def _check_groups(groups: Tensor, names: Sequence[str]) -> None:
    if not isinstance(groups, Tensor) or groups.dtype not in (
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
    ):
        got = groups.dtype if isinstance(groups, Tensor) else type(groups).__name__
        raise ValueError(f"groups must be a tensor of integers. Got {got}.")
    # A look at a GPU's tensor would wait for the device.
    if groups.device.type == "cpu" and groups.numel():
        lowest, highest = (int(i) for i in groups.aminmax())
        if lowest < 0 or highest >= len(names):
            outside = lowest if lowest < 0 else highest
            raise ValueError(
                f"groups must lie in [0, {len(names)}), the indices of {list(names)}. Got {outside}."
            )
